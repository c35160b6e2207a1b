"""What a run shows at its end: short tables of 80 columns, and the comparison in words.

Everything here takes plain data (frames and dictionaries of `results`) and gives rich renderables
or text. Names come from users: they are never taken for markup or control characters.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf_ray.commands.terminal import WIDTH, duration, number, printable, shortened
from rlhf_ray.evaluation.statistics import FIGURES
from rlhf_ray.numerals import are_fine, figure

if TYPE_CHECKING:
    import pandas as pd

_figure = partial(figure, none="-")

MAX_ROWS = 40
"""Rows of a table at most; the results page shows all."""

GAP = 2
"""Between two columns of a table."""

NAMED_IN_WORDS = ("full_best", "full", "fixed", "random")
"""The baselines that the comparison names, in its order."""

SHORT = {
    "gamma": "gamma",
    "epsilon": "eps",
    "tuning_cost_weight": "w cost",
    "switch_cost_weight": "w swi",
}
"""Headers of the swept settings."""


def trials_table(table: "pd.DataFrame", best: str | None, *, metric: str) -> Group:
    """The trials, best utility first; `best` is marked with *, the front with f."""
    shares = "episodes_of_others" in table
    headers = ("", "trial", *SHORT.values(), metric, "cost", "switch", "utility")
    headers += ("others",) if shares else ()
    shown = _table("Trials, judged on the val tasks", headers, left=2)
    fine = are_fine(table["metric"])
    digits = {name: _digits(table[name]) for name in SHORT if name in table}
    ordered = table.sort_values("utility", ascending=False, na_position="last")
    for row in ordered.head(MAX_ROWS).to_dict("records"):
        is_best = row["trial"] == best
        mark = ("*" if is_best else "") + ("f" if row["on_front"] else "")
        done = row["status"] == "done"
        figures = [
            _figure(row["metric"], fine=fine),
            *(_figure(row[name]) for name in ("cost", "switches")),
            _figure(row["utility"], fine=fine),
        ]
        shown.add_row(
            mark,
            shortened(str(row["trial"]), 12),
            *(f"{row[name]:.{digits[name]}g}" for name in SHORT),
            *(figures if done else [shortened(str(row["status"]), 8), "", "", ""]),
            *([str(row["episodes_of_others"]) if done else ""] if shares else []),
            style="bold" if is_best else "" if done else "dim",
        )
    others = "; others: episodes of theirs learned from" if shares else ""
    shown.caption = "* best utility, f on the front" + others + _left_out(len(table))
    return _headed(shown)


def front_table(front: "pd.DataFrame", *, metric: str, unit: str) -> Group:
    """The trials that no other beats in both metric and cost, cheapest first."""
    shown = _table(f"Front of {metric} against cost", ("cost", metric, "utility", "trial"), left=0)
    shown.columns[3].justify = "left"
    fine = are_fine(front["metric"])
    for row in front.head(MAX_ROWS).to_dict("records"):
        figures = (_figure(row[name], fine=fine) for name in ("metric", "utility"))
        shown.add_row(_figure(row["cost"]), *figures, shortened(str(row["trial"]), 30))
    shown.caption = f"cost in {unit}" + _left_out(len(front))
    return _headed(shown)


def methods_table(methods: "pd.DataFrame", *, metric: str, unit: str) -> Group:
    """The policy and the baselines on the test tasks, in the order given."""
    headers = ("method", metric, "+-", "cost", "switches", "utility", "rank")
    shown = _table("Methods on the test tasks", headers, left=1)
    fine = are_fine(methods["metric_mean"])
    alike = ("metric_mean", "metric_sd", "utility_mean")  # in the metric's unit
    for name, row in methods.to_dict("index").items():
        shown.add_row(
            shortened(str(name), 26),
            *(_figure(row[column], fine=fine and column in alike) for column in FIGURES),
            style="bold" if name == "policy" else "",
        )
    shown.caption = f"+- over replica seeds; cost in {unit}"
    return _headed(shown)


def differences_table(
    differences: Mapping[str, Mapping[str, float | None]],
    *,
    metric: str,
    higher_is_better: bool = True,
) -> Group:
    """How far the policy's utility is above each method's on the test tasks."""
    points = in_points(metric, higher_is_better=higher_is_better)
    headers = ("method", "points" if points else "mean", "from", "to", "worst")
    shown = _table("Utility: the policy minus each method", headers, left=1)
    fine = are_fine(found["mean"] for found in differences.values())
    for method, found in differences.items():
        cells = (found[name] for name in ("mean", "low", "high", "worst"))
        shown.add_row(
            shortened(method, 26),
            *(difference(value, fine=fine, points=points) for value in cells),
        )
    unit = "hundredths; " if points else ""
    shown.caption = f"{unit}95% interval over tasks;\nworst: on a single task"
    return _headed(shown)


def sweeps_table(sweeps: Sequence[Mapping[str, Any]]) -> Group:
    """The sweeps under a storage path."""
    shown = _table("Sweeps", ("name", "suite", "state", "trials", "utility"), left=3)
    for sweep in sweeps:
        shown.add_row(
            shortened(str(sweep["name"]), 28),
            shortened(str(sweep["suite"]), 18),
            str(sweep["state"]),
            f"{sweep['trials_done']}/{sweep['trials']}",
            _figure(sweep["utility"], fine=are_fine([sweep["utility"]])),
        )
    return _headed(shown)


def trace_table(
    trace: Sequence[Mapping[str, Any]], *, metric: str, start_metric: float, cost: float, unit: str
) -> Group:
    """The steps of one fine-tuning; the first row is what looking at the start cost.

    Args:
        trace: `FineTuned.trace`.
        metric: its name.
        start_metric: on val, before the first step.
        cost: of the whole.
        unit: of the costs.
    """
    shown = _table(
        f"What was done, {metric} on val", ("step", "level", "operation", "val", "cost"), left=0
    )
    for position in (1, 2):
        shown.columns[position].justify = "left"
    start_cost = cost - sum(record["cost"] for record in trace)
    fine = are_fine([start_metric, *(record["metric"] for record in trace)])
    shown.add_row("0", "", "start", _figure(start_metric, fine=fine), _figure(start_cost))
    for step, record in enumerate(trace, 1):
        shown.add_row(
            str(step),
            shortened(str(record["level"]), 20),
            shortened(str(record["operation"]), 24),
            _figure(record["metric"], fine=fine) + (" diverged" if record["diverged"] else ""),
            _figure(record["cost"]),
        )
    shown.caption = f"cost in {unit}"
    return _headed(shown)


def comparison(
    methods: Mapping[str, Mapping[str, float]], *, metric: str, higher_is_better: bool = True
) -> str:
    """One sentence: the policy beside the best-known baselines, whatever the numbers are.

    >>> comparison({"policy": {"metric_mean": 0.90, "cost_mean": 0.5},
    ...             "full": {"metric_mean": 0.88, "cost_mean": 2.0}}, metric="accuracy")
    'On the test tasks the policy reaches accuracy 0.900 at cost 0.50: 2.0 points above full at 25% of its cost.'
    """  # noqa: E501
    if "policy" not in methods:
        return "The policy was not compared on the test tasks."
    own = methods["policy"]
    against = [
        f"{_difference(own, methods[name], metric, higher_is_better)} {name} "
        f"at {_cost_ratio(own, methods[name])}"
        for name in NAMED_IN_WORDS
        if name in methods
    ]
    reached = _figure(own["metric_mean"], fine=are_fine([own["metric_mean"]]))
    begin = (
        f"On the test tasks the policy reaches {printable(metric)} {reached} "
        f"at cost {own['cost_mean']:.2f}"
    )
    said = f"{begin}: {', '.join(against)}." if against else f"{begin}."
    return said + _ahead(methods, points=in_points(metric, higher_is_better=higher_is_better))


def _ahead(methods: Mapping[str, Mapping[str, float]], *, points: bool) -> str:
    """A sentence where a method has more utility than the policy; else ""."""
    by_utility = {
        name: method["utility_mean"]
        for name, method in methods.items()
        if "utility_mean" in method and name != "optimum"  # which is known by hindsight alone
    }
    if "policy" not in by_utility:
        return ""
    best = max(by_utility, key=lambda name: by_utility[name])
    lead = by_utility[best] - by_utility["policy"]
    if lead <= (5e-4 if points else 5e-4 * abs(by_utility[best])):  # nothing of it would be seen
        return ""
    amount = f"{100 * lead:.1f} hundredths" if points else f"{lead:.3g}"
    return (
        f" By utility {printable(best)} is ahead of it, by {amount}: more tasks, episodes or "
        "operations may help."
    )


def in_points(metric: str, *, higher_is_better: bool) -> bool:
    """Whether differences are told in points, which are hundredths: those of accuracies.

    >>> [in_points(m, higher_is_better=h) for m, h in (("accuracy", True), ("rmse", False))]
    [True, False]
    """
    return higher_is_better and metric.lower().endswith("accuracy")


def difference(
    value: float | None, digits: int = 3, *, fine: bool = False, points: bool = False
) -> str:
    """A difference of utilities; in points with two decimals less.

    >>> difference(0.0123, points=True), difference(-4.781), difference(1.3e-5, fine=True)
    ('+1.2', '-4.781', '+1.3e-05')
    """
    if points and value is not None:
        return f"{100 * value:+.{digits - 2}f}"
    return _figure(value, digits, fine, sign="+")


def stages_account(stages: Mapping[str, float]) -> str:
    """What the tree of stages spared."""
    return (
        f"Stages: {number(stages['logical'])} asked for, {number(stages['distinct'])} distinct; "
        f"{duration(stages['seconds_spent'])} spent on them, "
        f"{duration(max(0.0, stages['seconds_saved']))} saved by sharing."
    )


def copyable(command: Sequence[str], *, columns: int = 78) -> list[str]:
    r"""A shell command in lines that can be copied; a flag keeps its value where both fit.

    >>> copyable(["run", "--name", "a b", "--list"], columns=20)
    ["run --name 'a b' \\", '    --list']
    """
    parts: list[str] = []
    for word in map(shlex.quote, command):
        flag = parts[-1] if parts else ""
        value = flag.startswith("--") and " " not in flag and not word.startswith("--")
        if value and 4 + len(flag) + 1 + len(word) <= columns - 2:
            parts[-1] = f"{flag} {word}"
        else:
            parts.append(word)
    lines, line = [], ""
    for part in parts:
        if line and len(line) + 1 + len(part) > columns - 2:
            lines.append(line + " \\")
            line = "    " + part
        else:
            line = f"{line} {part}" if line else part
    return [*lines, line]


def _table(title: str, headers: Sequence[str], *, left: int) -> Table:
    """An empty table; the first `left` columns are names, the others figures."""
    table = Table(
        title=shortened(title, 60),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for position, header in enumerate(headers):
        justify = "left" if position < left else "right"
        table.add_column(Text(printable(header)), justify=justify, no_wrap=True)
    return table


def _headed(table: Table) -> Group:
    """The same table, its heads cut, to no less than 8 columns, where it would be too wide.

    Its title stands above it whole: rich would cut it to the table's width.
    """
    cells = [max(map(cell_len, map(str, column.cells)), default=0) for column in table.columns]
    heads = [cell_len(str(column.header)) for column in table.columns]
    least = [max(cell, min(head, 8)) for cell, head in zip(cells, heads, strict=True)]
    gap = GAP if sum(least) + GAP * (len(least) - 1) <= WIDTH else GAP - 1
    table.padding = (0, gap - 1, 0, 0)  # the box has one column between two, too
    free = max(0, WIDTH - sum(least) - gap * (len(least) - 1))
    for column, head, narrow in zip(table.columns, heads, least, strict=True):
        wider = min(max(0, head - narrow), free)
        free -= wider
        column.header = shortened(str(column.header), narrow + wider)
    title, table.title = Text(str(table.title), style="bold"), None
    return Group(title, table)


def _digits(values: Iterable[float]) -> int:
    """As few as tell swept values apart; at least 3 and at most 6.

    >>> _digits([0.123456, 0.9]), _digits([0.9995, 0.9999])
    (3, 4)
    """
    distinct = set(values)
    enough = (n for n in range(3, 6) if len({f"{v:.{n}g}" for v in distinct}) == len(distinct))
    return next(enough, 6)


def _left_out(rows: int) -> str:
    return f"; {rows - MAX_ROWS} more rows are on the results page" if rows > MAX_ROWS else ""


def _difference(
    own: Mapping[str, float], other: Mapping[str, float], metric: str, higher_is_better: bool
) -> str:
    difference = own["metric_mean"] - other["metric_mean"]
    points = in_points(metric, higher_is_better=higher_is_better)
    amount = f"{abs(difference) * 100:.1f} points" if points else f"{abs(difference):.3g}"
    if float(amount.split()[0]) == 0:
        return "level with"
    if points:
        return f"{amount} {'above' if difference > 0 else 'below'}"
    better = (difference > 0) == higher_is_better
    return f"{amount} {'better' if better else 'worse'} than"


def _cost_ratio(own: Mapping[str, float], other: Mapping[str, float]) -> str:
    if other["cost_mean"] <= 0:
        return "a cost of its own, where that costs nothing"
    ratio = own["cost_mean"] / other["cost_mean"]
    if ratio < 2:
        return f"{ratio:.0%} of its cost"
    return f"{ratio:.1f} times its cost" if ratio < 10 else f"{ratio:.0f} times its cost"
