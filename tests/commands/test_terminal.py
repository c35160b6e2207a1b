import io

import pandas as pd
import pytest
from rich.cells import cell_len
from sweep_files import METHODS, write_sweep

from rlhf_ray.commands import tables
from rlhf_ray.commands.terminal import PLAIN_INTERVAL_S, Terminal, duration, printable, shortened
from rlhf_ray.sweep.results import SearchResult

HOSTILE = "[bold]\x1b[2J<script>" + "数据" * 60 + '"; rm -rf $HOME\n'


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(show) -> list[str]:
    file = io.StringIO()
    with Terminal(file) as terminal:
        show(terminal)
    return file.getvalue().splitlines()


def assert_fits(lines: list[str]) -> None:
    assert lines
    assert max(map(cell_len, lines)) <= 80
    assert "\x1b" not in "".join(lines)


# -- progress


def test_plain_progress_says_at_most_one_line_per_interval():
    clock, file = Clock(), io.StringIO()
    with Terminal(file, clock=clock) as terminal:
        terminal.phase("sweep", total=100)
        for done in range(101):
            clock.now += PLAIN_INTERVAL_S / 10
            terminal.update(done, logical=done * 10, distinct=done)
    lines = file.getvalue().splitlines()
    assert lines[0] == "sweep: 0/100 in 0 s"
    assert len(lines) == 1 + 10 + 1
    assert lines[1] == "sweep: 9/100 in 5 s; about 51 s left; logical 90, distinct 9"
    assert lines[-1] == "sweep: 100/100 in 50 s; logical 1,000, distinct 100"


def test_plain_progress_is_silent_while_nothing_happens():
    clock, file = Clock(), io.StringIO()
    with Terminal(file, clock=clock) as terminal:
        terminal.phase("starting")
        terminal.phase("sweep", total=2)
        for _ in range(50):
            clock.now += PLAIN_INTERVAL_S
            terminal.update(1, distinct=3)
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["starting ...", "starting: done in 0 s"]
    assert len(lines) == 5


def test_time_left_does_not_count_what_an_earlier_run_had_done():
    clock, file = Clock(), io.StringIO()
    with Terminal(file, clock=clock) as terminal:
        terminal.phase("sweep", total=100)
        terminal.update(90)
        clock.now += 10
        terminal.update(95)
    assert "sweep: 95/100 in 10 s; about 10 s left" in file.getvalue()


def test_a_phase_that_was_broken_off_does_not_end_as_if_done():
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Terminal(file) as terminal:
        terminal.phase("sweep", total=3)
        raise KeyboardInterrupt
    assert file.getvalue() == "sweep: 0/3 in 0 s\n"


def test_live_progress_on_a_terminal_leaves_one_line_per_phase(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = FakeTerminal()
    with Terminal(file) as terminal:
        terminal.phase("sweep", total=4)
        terminal.update(2, distinct=17)
        terminal.message("a line between")
        terminal.phase("judging")
    shown = file.getvalue()
    assert "\x1b[" in shown
    assert "a line between" in shown
    assert "sweep: 2/4 in 0 s; distinct 17" in shown
    assert "judging: done in 0 s" in shown


def test_quiet_shows_what_is_said_only():
    def show(terminal):
        terminal.quiet = True
        terminal.message("no")
        terminal.phase("no", 3)
        terminal.update(2)
        terminal.show_lines("no")
        terminal.say("yes")

    assert plain(show) == ["yes"]


def test_what_an_encoding_lacks_is_replaced():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="latin-1")
    sweep = {"name": "x" * 40, "suite": "数据", "state": "finished", "utility": 0.9}
    with Terminal(file) as terminal:
        terminal.show(tables.sweeps_table([{**sweep, "trials_done": 1, "trials": 1}]))
    file.flush()
    assert "x" * 27 + "?" in raw.getvalue().decode("latin-1")


def test_no_colours_where_they_are_not_wanted(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert_fits(plain(lambda terminal: terminal.message("word " * 60)))
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    file = FakeTerminal()
    with Terminal(file) as terminal:
        terminal.console.print("[red]text[/red]")
    assert file.getvalue() == "text\n"


# -- tables


def test_tables_fit_80_columns_with_hostile_names(tmp_path):
    write_sweep(tmp_path, n_trials=500, failed=(3,), error=HOSTILE)
    result = SearchResult.load(tmp_path / "small-1")
    frame = result.table()
    frame.loc[5, "trial"] = HOSTILE
    frame.loc[7, "tuning_cost_weight"] = 123456.789
    frame["gamma"] += 0.0123456789
    methods = result.methods().rename(index={"head": f"level:{HOSTILE}"})
    sweeps = [
        {"name": HOSTILE, "suite": HOSTILE, "state": "unfinished", "trials_done": 400,
         "trials": 500, "utility": None}
    ]  # fmt: skip
    trace = [
        {"level": HOSTILE, "operation": HOSTILE, "metric": 0.5, "cost": 123.456, "diverged": True}
    ]

    def show(terminal):
        for metric in ("accuracy", HOSTILE):
            terminal.show(tables.trials_table(frame, "000-abcdef", metric=metric))
            terminal.show(tables.front_table(frame, metric=metric, unit="seconds"))
            terminal.show(tables.methods_table(methods, metric=metric, unit="seconds"))
            differences = {HOSTILE: {"mean": 0.1234, "low": None, "high": 9.9, "worst": -1.0}}
            terminal.show(tables.differences_table(differences, metric=metric))
            start = {"start_metric": 0.1, "cost": 200.0, "unit": "full stages"}
            terminal.show(tables.trace_table(trace, metric=metric, **start))
        terminal.show(tables.sweeps_table(sweeps))
        terminal.message(HOSTILE)

    lines = plain(show)
    assert_fits(lines)
    assert any("[bold]?[2J<" in line for line in lines)
    assert any("460 more rows" in line for line in lines)


def test_trials_table_shows_every_figure_and_marks_best_and_front(tmp_path):
    write_sweep(tmp_path, failed=(1,))
    result = SearchResult.load(tmp_path / "small-1")
    shown = tables.trials_table(result.table(), result.best_trial, metric="accuracy")
    lines = plain(lambda terminal: terminal.show(shown))
    assert_fits(lines)
    rows = [line.split() for line in lines if "abcdef" in line]
    assert rows[0] == [
        "*f", "000-abcdef", "0.9", "0.05", "0.01", "0.001", "0.900", "0.800", "1.000", "0.884",
    ]  # fmt: skip
    assert rows[1][0] == "f"
    assert rows[2] == ["001-abcdef", "0.9", "0.05", "0.02", "0.001", "failed"]


def test_heads_are_cut_only_where_the_table_would_not_fit(tmp_path):
    write_sweep(tmp_path)
    result = SearchResult.load(tmp_path / "small-1")
    trace = [
        {"level": "low", "operation": "refit", "metric": 0.5, "cost": 1.0, "diverged": False}
    ]  # fmt: skip
    start = {"start_metric": 0.1, "cost": 2.0, "unit": "full stages"}
    metric = "balanced_accuracy"
    for shown in (
        tables.trace_table(trace, metric=metric, **start),
        tables.front_table(result.front(), metric=metric, unit="full stages"),
        tables.methods_table(result.methods(), metric=metric, unit="full stages"),
    ):
        lines = plain(lambda terminal, shown=shown: terminal.show(shown))
        assert_fits(lines)
        assert "…" not in "".join(lines)
    shown = tables.trials_table(result.table(), None, metric="m" * 80)
    lines = plain(lambda terminal: terminal.show(shown))
    assert_fits(lines)
    assert max(map(cell_len, lines)) == 80
    assert "000-abcdef" in " ".join(lines) and "utility" in " ".join(lines)


def test_a_title_wider_than_its_table_is_not_cut():
    shown = tables.differences_table(
        {"head": {"mean": 0.01, "low": None, "high": None, "worst": 0.0}}, metric="accuracy"
    )
    lines = plain(lambda terminal: terminal.show(shown))
    assert lines[0] == "Utility: the policy minus each method"
    assert max(map(cell_len, lines[1:])) < len(lines[0])


def test_trials_table_shows_what_was_learned_from_others(tmp_path):
    write_sweep(tmp_path, n_trials=2)
    table = SearchResult.load(tmp_path / "small-1").table()
    table["episodes_of_others"] = [0, 112]
    lines = plain(lambda t: t.show(tables.trials_table(table, None, metric="accuracy")))
    assert_fits(lines)
    assert any("others" in line for line in lines)
    assert [line.split()[-1] for line in lines if "abcdef" in line] == ["0", "112"]


def test_one_replica_seed_has_no_spread(tmp_path):
    write_sweep(tmp_path, judge_replicas=1)
    methods = SearchResult.load(tmp_path / "small-1").methods()
    assert methods["metric_sd"].isna().all() and methods["metric_sd"].dtype == float
    shown = tables.methods_table(methods, metric="accuracy", unit="full stages")
    lines = plain(lambda terminal: terminal.show(shown))
    assert ["policy", "0.912", "-", "0.310"] in [line.split()[:4] for line in lines]


def as_methods(figures):
    return {name: {"metric_mean": m, "cost_mean": c} for name, (m, c) in figures.items()}


def test_comparison_names_points_and_cost_ratios():
    assert tables.comparison(as_methods(METHODS), metric="accuracy") == (
        "On the test tasks the policy reaches accuracy 0.912 at cost 0.31: 1.2 points below "
        "full_best at 10% of its cost, 0.3 points above full at 31% of its cost, 1.2 points above "
        "fixed at 77% of its cost, 20.1 points above random at 34% of its cost."
    )


@pytest.mark.parametrize(
    ("other", "metric", "higher", "expected"),
    [
        ((0.9, 0.5), "accuracy", True, "level with full at 100% of its cost"),
        ((0.8, 0.0), "accuracy", True, "10.0 points above full at a cost of its own"),
        ((0.8, 0.01), "accuracy", True, "at 50 times its cost"),
        ((1.2, 1.0), "rmse", False, "0.3 better than full at 50% of its cost"),
        ((1.2, 1.0), "R2", True, "0.3 worse than full at 50% of its cost"),
    ],
)
def test_comparison_says_it_plainly_whatever_the_numbers(other, metric, higher, expected):
    figures = as_methods({"policy": (0.9, 0.5), "full": other})
    assert expected in tables.comparison(figures, metric=metric, higher_is_better=higher)


def test_differences_are_in_points_only_where_the_metric_is_an_accuracy():
    found = {"full": {"mean": 4.781, "low": None, "high": 5.0, "worst": -0.25}}
    for metric, higher in (("rmse", False), ("R2", True)):
        shown = tables.differences_table(found, metric=metric, higher_is_better=higher)
        lines = plain(lambda terminal, shown=shown: terminal.show(shown))
        assert ["full", "+4.781", "-", "+5.000", "-0.250"] in [line.split() for line in lines]
        assert not {"points", "hundredths;"} & set(" ".join(lines).split())
    lines = plain(
        lambda terminal: terminal.show(tables.differences_table(found, metric="accuracy"))
    )
    assert ["full", "+478.1", "-", "+500.0", "-25.0"] in [line.split() for line in lines]
    assert {"points", "hundredths;"} <= set(" ".join(lines).split())


@pytest.mark.parametrize(
    ("metric", "higher", "amount"), [("accuracy", True, "1.0 hundredths"), ("rmse", False, "0.01")]
)
def test_comparison_says_who_is_ahead_of_the_policy(metric, higher, amount):
    utilities = {"policy": 0.90, "full": 0.91, "random": 0.5}
    figures = {
        name: {"metric_mean": 0.9, "cost_mean": 1.0, "utility_mean": u}
        for name, u in utilities.items()
    }
    said = tables.comparison(figures, metric=metric, higher_is_better=higher)
    assert f"By utility full is ahead of it, by {amount}: more tasks" in said
    figures["full"]["utility_mean"], figures["optimum"] = 0.9001, {"utility_mean": 0.99}
    assert "ahead" not in tables.comparison(figures, metric=metric, higher_is_better=higher)


def test_small_figures_are_told_to_three_digits(tmp_path):
    figures = {
        name: {"metric_mean": m, "metric_sd": 2e-6, "cost_mean": 0.5, "switches_mean": 1.0,
               "utility_mean": -m, "rank_mean": 1.0}
        for name, m in (("policy", 1.23e-4), ("full", 1.1e-4))
    }  # fmt: skip
    shown = tables.methods_table(pd.DataFrame(figures).T, metric="mse", unit="full stages")
    lines = [line.split() for line in plain(lambda terminal: terminal.show(shown))]
    assert ["policy", "0.000123", "2e-06", "0.500", "1.000", "-0.000123", "1.000"] in lines
    said = tables.comparison(figures, metric="mse", higher_is_better=False)
    assert "the policy reaches mse 0.000123 at cost 0.50: 1.3e-05 worse than full" in said
    assert "By utility full is ahead of it, by 1.3e-05" in said
    found = {"full": {"mean": -1.3e-5, "low": None, "high": None, "worst": -1.3e-5}}
    shown = tables.differences_table(found, metric="mse", higher_is_better=False)
    lines = [line.split() for line in plain(lambda terminal: terminal.show(shown))]
    assert ["full", "-1.3e-05", "-", "-", "-1.3e-05"] in lines


def test_drawn_values_are_not_cut(tmp_path):
    write_sweep(tmp_path)
    table = SearchResult.load(tmp_path / "small-1").table()
    drawn = {"gamma": 0.913725, "epsilon": 0.012345, "tuning_cost_weight": 0.0333333,
             "switch_cost_weight": 0.00123456, "cost": 12.345, "switches": 2.5,
             "episodes_of_others": 120}  # fmt: skip
    shown = tables.trials_table(table.assign(**drawn), None, metric="accuracy")
    lines = plain(lambda terminal: terminal.show(shown))
    assert_fits(lines)
    assert {"0.914", "0.0123", "0.0333", "0.00123", "12.345", "120"} <= set(lines[3].split())


def test_swept_values_that_differ_are_told_apart(tmp_path):
    write_sweep(tmp_path)
    table = SearchResult.load(tmp_path / "small-1").table().assign(gamma=[0.9995, 0.9999, 0.99])
    lines = plain(lambda t: t.show(tables.trials_table(table, None, metric="accuracy")))
    assert {"0.9995", "0.9999", "0.99"} <= set(" ".join(lines).split())


def test_comparison_without_baselines():
    assert tables.comparison({}, metric="accuracy").startswith("The policy was not compared")
    alone = tables.comparison(as_methods({"policy": (0.9, 0.5)}), metric="accuracy")
    assert alone == "On the test tasks the policy reaches accuracy 0.900 at cost 0.50."


def test_tables_of_nothing_are_shown():
    empty = pd.DataFrame(columns=["trial", "on_front", "utility", "cost", "metric", "status"])
    assert_fits(plain(lambda t: t.show(tables.trials_table(empty, None, metric="accuracy"))))


def test_copyable_lines_are_the_command(tmp_path):
    import shlex

    command = ["python", "-m", "x", "--policy", "/a b/" + "c" * 60, "--task", "it's; $HOME"] * 3
    lines = tables.copyable(command)
    assert shlex.split("\n".join(lines).replace("\\\n", " ")) == command
    assert all(cell_len(line) <= 78 for line in lines)


def test_words():
    assert duration(59.6) == "1 min 00 s"
    assert printable("a\u202eb\x07") == "a?b?"
    assert shortened("数据数据", 5).plain == "数据…"
