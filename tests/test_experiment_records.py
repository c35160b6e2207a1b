"""What experiments keep is used again only where it was made with what is asked for."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

HERE = Path(__file__).parents[1] / "experiments"


@pytest.fixture(autouse=True)
def experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments import one another as scripts do."""
    monkeypatch.syspath_prepend(str(HERE))


def test_baselines_are_made_anew_for_other_settings_or_further_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import unseen_shifts  # pyright: ignore[reportMissingImports]

    asked: list[tuple[set[str], int]] = []

    def choose_and_play(*_: Any, names: Any, max_stages: int, **more: Any) -> Any:
        asked.append((set(names), max_stages))
        runs = {name: [] for name in ("full_best", *names)}
        return SimpleNamespace(runs=runs, settings={"full_best": {"learning_rate": 0.1}})

    monkeypatch.setattr(unseen_shifts, "choose_and_play", choose_and_play)
    monkeypatch.setattr(unseen_shifts, "full_curve", lambda here, rate: {})
    context = SimpleNamespace(spec=None, utility=None)
    here = SimpleNamespace(
        config=lambda seed: None,
        context=lambda config: context,
        stages=lambda: None,
        suite=SimpleNamespace(train_tasks=(), val_tasks=(), test_tasks=(), levels=("a",)),
    )

    def names(max_stages: int, *names: str) -> set[str]:
        found = unseen_shifts.schedules(here, tmp_path, 5, max_stages, names)
        return set(found["runs"])

    file = tmp_path / "baselines-5.json"
    file.write_text(json.dumps({"runs": {"full_best": [], "tpe": [], "asha": []}}))
    assert names(10, "tpe") == {"full_best", "tpe", "asha"} and not asked  # as it is
    assert names(10, "tpe", "lp_ft") == {"full_best", "tpe", "asha", "lp_ft"}
    assert asked.pop() == ({"full_best", "tpe", "asha", "lp_ft"}, 10)
    assert names(10, "asha") and not asked
    assert names(11, "asha") and asked.pop()[1] == 11
    monkeypatch.setattr(unseen_shifts, "SEARCH_STAGES", 99)
    assert names(11, "asha") and len(asked) == 1


def test_a_seeds_record_follows_the_stages_of_the_guided_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import unseen_shifts  # pyright: ignore[reportMissingImports]

    learned = SimpleNamespace(policy=SimpleNamespace(metadata={"values": {}}), distinct=1, cost=1.0)
    stages: list[Any] = []

    def run(learned: Any, seed: int, name: str, n_stages: int = 0) -> list[Any]:
        stages.append(n_stages)
        return []

    here = SimpleNamespace(learn=lambda seed: learned, test=run, test_schedule=run)
    first = unseen_shifts.learn_and_test(here, tmp_path, 0)
    assert unseen_shifts.learn_and_test(here, tmp_path, 0) == first and len(stages) == 3
    monkeypatch.setattr(unseen_shifts, "GUIDED_STAGES", 7)
    unseen_shifts.learn_and_test(here, tmp_path, 0)
    assert len(stages) == 6 and 7 in stages


def test_a_variants_record_follows_its_changes(tmp_path: Path) -> None:
    import learning_variants  # pyright: ignore[reportMissingImports]

    made: list[Any] = []
    here = SimpleNamespace(learn=lambda seed, **changes: made.append(changes), test=lambda *_: [])

    def tested(**changes: Any) -> int:
        assert learning_variants.tested(here, tmp_path, "a variant", changes, 0) == []
        return len(made)

    assert [tested(gamma=(0.9,)), tested(gamma=(0.9,)), tested(gamma=(0.8,))] == [1, 1, 2]
    (file,) = tmp_path.rglob("seed0.json")
    file.write_text("[]")  # as earlier versions wrote it
    assert tested(gamma=(0.7,)) == 2


def test_runs_of_the_known_optimum_follow_settings_and_episodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import known_optimum  # pyright: ignore[reportMissingImports]

    rows = pd.read_csv(HERE / "known_optimum.csv").to_dict("records")
    assert len(rows) == 294 and all(map(known_optimum.holds, rows))
    row = {**rows[0], "method": "dqn stock", "levels": 2, "episodes": 500}
    now = {**row, "settings": known_optimum.settings_of("dqn stock")}
    assert now["settings"] == "epsilon=0.1" and known_optimum.holds(now)
    assert not known_optimum.holds({**now, "settings": "epsilon=0.2"})
    monkeypatch.setitem(known_optimum.EPISODES, "dqn", {2: 501})
    assert not known_optimum.holds(row)
