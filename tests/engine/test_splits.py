from collections.abc import Callable

import pytest
import torch
import zoo
from test_stages import path_of, suite_of

from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.splits import Splits
from rlhf_ray.engine.stages import Engine
from rlhf_ray.outcomes import Outcome, StageRequest
from rlhf_ray.tasks import Inputs, Suite, Task
from rlhf_ray.tree.stage_tree import LocalStages

BYTES = 40 * 4 * 4 + 40 * 8
"""Of a train split below."""


def task(seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    return Task(name=f"task{seed}", train=(x, y), val=(x[:30], y[:30]), test=(x[:9], y[:9]))


@pytest.fixture
def splits() -> Callable[[int], Splits]:
    def place(inputs: Inputs) -> dict[str, torch.Tensor]:
        assert isinstance(inputs, torch.Tensor)
        return {"x": inputs.clone()}

    return lambda max_bytes: Splits(place, val_size=10, max_bytes=max_bytes)


def test_the_least_recently_used_leave_over_the_bound(splits: Callable[[int], Splits]) -> None:
    kept, a, b, c = splits(2 * BYTES), task(0), task(1), task(2)
    first, second = kept.get(a, "train"), kept.get(b, "train")
    assert first.n_bytes == BYTES
    assert kept.get(a, "train") is first
    kept.get(c, "train")
    assert sum(data.n_bytes for data in kept.kept) == 2 * BYTES
    assert kept.get(a, "train") is first
    again = kept.get(b, "train")
    assert again is not second
    torch.testing.assert_close(again.values, second.values, rtol=0, atol=0)


def test_the_task_at_work_keeps_all_its_splits(splits: Callable[[int], Splits]) -> None:
    kept, a, b = splits(0), task(0), task(1)
    found = [kept.get(a, split) for split in ("train", "val", "test")]
    assert [kept.get(a, split) for split in ("train", "val", "test")] == found
    kept.get(b, "val")
    assert [data.name for data in kept.kept] == ["val"]


def test_val_examples_are_the_same_ones_when_placed_anew(splits: Callable[[int], Splits]) -> None:
    kept, a, b = splits(0), task(0), task(1)
    first = kept.get(a, "val")
    kept.get(b, "val")
    again = kept.get(a, "val")
    assert again is not first and again.n == 10
    torch.testing.assert_close(again.values, first.values, rtol=0, atol=0)
    torch.testing.assert_close(again.targets, first.targets, rtol=0, atol=0)


def test_outcomes_do_not_depend_on_which_data_have_left() -> None:
    suites = [suite_of(zoo.CASES["cnn4"], seed) for seed in (0, 1)]
    tasks = [
        Task(name=f"task{i}", train=t.train, val=t.val, test=t.test)
        for i, t in enumerate(suite.train_tasks[0] for suite in suites)
    ]
    suite = Suite(name="two", model=suites[0].model, levels=suites[0].levels, train_tasks=tasks,
                  val_tasks=[], test_tasks=[])  # fmt: skip

    def outcomes(cache_bytes: int) -> list[Outcome]:
        stages = LocalStages(
            Engine(suite, EngineSettings(device="cpu", val_size=10, cache_bytes=cache_bytes))
        )
        return [
            stages.outcome(StageRequest(task=name, path=path_of(*[(3,)] * n))).outcome
            for n in range(3)
            for name in ("task0", "task1")
        ]

    roomy, tight = outcomes(1 << 28), outcomes(0)
    assert [o.metric for o in roomy] == [o.metric for o in tight]
    assert [o.loss for o in roomy] == pytest.approx([o.loss for o in tight], rel=1e-4)
