"""Training steps as CUDA graphs: the same to the last bit, and only where that can be relied on.

On a GPU where there is one, else on `simulated_cuda`.
"""

import dataclasses
import functools
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from simulated_cuda import cuda_device
from test_stages import path_of, suite_of, train
from torch import nn

from rlhf_ray.engine import graphs
from rlhf_ray.engine.graphs import StepGraphs
from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import FailedStageError
from rlhf_ray.operations import Operation, Train
from rlhf_ray.outcomes import Outcome, StageRequest
from rlhf_ray.tasks import Suite
from rlhf_ray.tree.stage_tree import LocalStages

pytestmark = pytest.mark.gpu
EAGER = EngineSettings(device="cuda", val_size=10, probe_size=6, cuda_graphs=False)
GRAPHS = dataclasses.replace(EAGER, cuda_graphs=True)
ON_A_GPU = torch.cuda.is_available()
# packing sequences takes lengths on the CPU and all else on the device: that is not simulated
ALL_CASES = {**zoo.CASES, "packed": zoo.PACKED} if ON_A_GPU else zoo.CASES
ROUNDING = {"unet"} if ON_A_GPU else set[str]()
"""Cases that no two runs round the same: torch adds a loss per pixel up in any order."""
DRAWING = {"norm_cnn", "net", "transformer", "torch_transformer", "convnext"}
"""Cases with dropout and its like: the simulated device draws their masks on the CPU."""


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with cuda_device():
        yield


def stages_of(suite: Suite, settings: EngineSettings) -> tuple[LocalStages, StepGraphs | None]:
    stages = LocalStages(Engine(suite, settings))
    return stages, stages.engine._loaded.graphs  # type: ignore[attr-defined]


def carried_out(
    stages: LocalStages, *operations: Operation
) -> tuple[Outcome, dict[str, torch.Tensor]]:
    paths = [path_of((0,), (1,), (0, 1), (1,), operation=operation) for operation in operations]
    request = StageRequest(task="task", path=sum(paths, ()))
    return stages.outcome(request).outcome, stages.state_dict(request)


def assert_equal(
    a: tuple[Outcome, dict[str, torch.Tensor]], b: tuple[Outcome, dict[str, torch.Tensor]]
) -> None:
    for name in ("key", "metric", "loss", "entropy", "train_loss", "versions", "flops"):
        assert getattr(a[0], name) == getattr(b[0], name), name
    for key, value in a[1].items():
        torch.testing.assert_close(value, b[1][key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "adam") for name in ALL_CASES), ("cnn2", "sgd"), ("lstm", "sgd"), ("normed", "sgd")],
)
def test_graphs_change_nothing(name: str, optimizer: Any) -> None:
    operations = (
        train(optimizer=optimizer, steps=6),
        train(optimizer=optimizer, steps=6, learning_rate=1e-3, l2_sp=0.1),
        train(optimizer=optimizer, steps=None, batch_size=6, keep_optimizer_state=False),
    )
    suite = suite_of(ALL_CASES[name])
    (eager, none), (replayed, made) = (stages_of(suite, s) for s in (EAGER, GRAPHS))
    found = carried_out(eager, *operations), carried_out(replayed, *operations)
    if name in ROUNDING:
        assert found[0][0].loss == pytest.approx(found[1][0].loss, rel=1e-4)
    else:
        assert_equal(*found)
    assert none is None and made is not None
    if name == "packed":  # lengths are read on the CPU
        assert not len(made) and set(made.refused.values()) == {"it waits for the device"}
    elif ON_A_GPU or name not in DRAWING:
        assert len(made) >= 6 and not made.refused, made.refused


def test_bf16_and_graphs_learn_as_fp32_does() -> None:
    """Half precision is that of each step's weights, not of those that were cast first."""
    suite = suite_of(zoo.CASES["cnn2"])
    path = path_of((0, 1), (1,), operation=train(steps=12, batch_size=20, learning_rate=3e-2))
    requests = [StageRequest(task="task", replica=replica, path=path) for replica in range(3)]
    found = []
    for settings in (EAGER, dataclasses.replace(EAGER, precision="bf16"),
                     dataclasses.replace(GRAPHS, precision="bf16")):  # fmt: skip
        stages, _ = stages_of(suite, settings)
        found.append([stages.outcome(request).outcome.train_loss for request in requests])
        stages.release()
    full, half, replayed = found
    assert half == replayed
    assert half == pytest.approx(full, rel=0.02)
    assert (
        full[0]
        < 0.9
        * LocalStages(Engine(suite, EAGER)).outcome(StageRequest(task="task")).outcome.train_loss
    )


def test_few_graphs_and_none_after_release_do_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    operations = train(steps=6), train(steps=6, learning_rate=1e-3), train(steps=6)
    suite = suite_of(zoo.CASES["cnn2"])
    (eager, _), (replayed, made) = (stages_of(suite, s) for s in (EAGER, GRAPHS))
    assert_equal(carried_out(eager, *operations), carried_out(replayed, *operations))
    assert made is not None and len(made) == 1
    replayed.release()
    operations = (*operations, train(steps=9))
    assert_equal(carried_out(eager, *operations), carried_out(replayed, *operations))


@pytest.mark.parametrize("name", ["cnn2", "lstm", "pre_activation"])
@pytest.mark.parametrize(("steps", "n_bytes"), [(1, 1 << 24), (4, 1 << 24), (32, 0)])
def test_windows_of_any_size_change_nothing(
    name: str, steps: int, n_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "WINDOW_STEPS", steps)
    monkeypatch.setattr(graphs, "WINDOW_BYTES", n_bytes)
    suite = suite_of(zoo.CASES[name])
    (eager, _), (replayed, made) = (stages_of(suite, s) for s in (EAGER, GRAPHS))
    operations = train(steps=11), train(steps=None, batch_size=5)
    assert_equal(carried_out(eager, *operations), carried_out(replayed, *operations))
    assert made is not None and len(made) >= 6, made.refused


def test_levels_below_that_are_run_for_every_batch_are_captured_with_it() -> None:
    suite = suite_of(zoo.CASES["cnn2"])
    settings = (dataclasses.replace(s, cache_bytes=0) for s in (EAGER, GRAPHS))
    (eager, _), (replayed, made) = (stages_of(suite, s) for s in settings)
    operations = train(steps=6), train(steps=6, batch_size=4)
    assert_equal(carried_out(eager, *operations), carried_out(replayed, *operations))
    assert made is not None and {kind.boundary for kind in made._graphs} == {0}
    kept, _ = stages_of(suite, GRAPHS)
    assert carried_out(kept, *operations)[0].loss == pytest.approx(
        carried_out(replayed, *operations)[0].loss, rel=1e-3
    )


class Odd(nn.Module):
    """A network whose code does something that a graph would not do again."""

    def __init__(self, what: Callable[["Odd", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.what, self.calls, self.pair = what, 0, None
        self.generator = np.random.default_rng(0) if what is draws else None
        self.helper = types.SimpleNamespace(calls=0)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.what(self, self.first(x)))


def looks(model: Odd, x: torch.Tensor) -> torch.Tensor:
    return x if x.mean().item() > 0 else -x


def throws(model: Odd, x: torch.Tensor) -> torch.Tensor:
    return x * random.random()


def counts(model: Odd, x: torch.Tensor) -> torch.Tensor:
    model.calls += 1
    return x * (1 + model.calls % 3)


def delegates(model: Odd, x: torch.Tensor) -> torch.Tensor:
    model.helper.calls += 1
    return x * (1 + model.helper.calls % 3)


def replaces(model: Odd, x: torch.Tensor) -> torch.Tensor:
    model.seen = model.seen + 1.0
    return x + model.seen


def remembers(model: Odd, x: torch.Tensor) -> torch.Tensor:
    model.pair = (x.detach(), 1)
    return x


def bounds(model: Odd, x: torch.Tensor) -> torch.Tensor:
    model.head.weight.data = torch.renorm(model.head.weight.data, 2, 0, 0.5)
    return x


def draws(model: Odd, x: torch.Tensor) -> torch.Tensor:
    return x * float(model.generator.random())


def objects(model: Odd, x: torch.Tensor) -> torch.Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError("not now")
    return x


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (looks, "it waits for the device"),
        (throws, "it draws random numbers on the CPU"),
        (counts, "a module keeps account of its calls"),
        (delegates, "a module keeps account of its calls"),
        (replaces, "a module keeps account of its calls"),
        (remembers, "a module keeps account of its calls"),
        (bounds, ""),  # seen when the engine is made
        (draws, "a module keeps account of its calls"),
        (objects, "NotImplementedError: not now"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_graph_would_not_do_again_is_not_captured(
    what: Callable[[Odd, torch.Tensor], torch.Tensor], why: str
) -> None:
    case = zoo.Case(
        lambda: Odd(what), {"first": ["first"], "head": ["head"]},
        lambda n: torch.randn(n, 6), lambda n: torch.arange(n) % 3, "fx",
    )  # fmt: skip
    operations = train(steps=6), train(steps=6)  # its levels twice, from another state
    (eager, _), (watched, made) = (stages_of(suite_of(case), s) for s in (EAGER, GRAPHS))
    assert_equal(carried_out(eager, *operations), carried_out(watched, *operations))
    assert made is not None
    if why:
        assert any(why in reason for reason in made.refused.values()), made.refused
    else:
        assert not len(made)


class Weighted(nn.Module):
    """A loss that weighs classes by how often it met them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("met", torch.ones(10))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.met.index_add_(0, targets, torch.ones_like(targets, dtype=self.met.dtype))
        return F.cross_entropy(outputs, targets, weight=1 / self.met)


def measures(model: Odd, x: torch.Tensor) -> torch.Tensor:
    """In units of what the last evaluation met."""
    if not model.first.training:
        model.scale = x.detach().std()
    return x / model.scale


def masks(model: Odd, x: torch.Tensor) -> torch.Tensor:
    """A mask of the inputs' length, made when it changes."""
    mask = getattr(model, "mask", torch.empty(0))
    if mask.shape != x.shape[1:] or mask.device != x.device:
        model.mask = torch.ones(x.shape[1:], device=x.device).tril()
    return x * model.mask


@pytest.mark.parametrize(
    ("what", "shapes"), [(measures, [(6,)]), (masks, [(5, 6), (7, 6)])], ids=["evaluation", "mask"]
)
def test_what_changes_between_stages_is_not_replayed(
    what: Callable[[Odd, torch.Tensor], torch.Tensor], shapes: list[tuple[int, ...]]
) -> None:
    class Mean(Odd):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).flatten(1, -2).mean(1) if x.dim() > 2 else super().forward(x)

    cases = [
        zoo.Case(
            lambda: Mean(what), {"first": ["first"], "head": ["head"]},
            lambda n, shape=shape: torch.randn(n, *shape), lambda n: torch.arange(n) % 3, "fx",
        )
        for shape in shapes
    ]  # fmt: skip
    suites = [suite_of(case) for case in cases]
    tasks = [dataclasses.replace(s.train_tasks[0], name=str(i)) for i, s in enumerate(suites)]
    suite = dataclasses.replace(suites[0], train_tasks=tasks)
    path = path_of((0, 1), (0, 1), operation=train(steps=6, learning_rate=0.1))
    found = []
    for settings in (EAGER, GRAPHS):
        stages, made = stages_of(suite, settings)
        requests = [
            StageRequest(task=task.name, replica=replica, path=path)
            for replica in (0, 1)
            for task in tasks
        ]
        found.append([stages.outcome(request).outcome.loss for request in requests])
    assert found[0] == found[1]
    assert made is not None and set(made.refused.values()) == {"a module has changed since"}


class Transposed(nn.Module):
    """The output of its first level has the input's name, and its shape at a batch size of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.x(tokens.transpose(0, 1)).relu().mean(0))


def test_boundaries_do_not_share_a_window() -> None:
    case = zoo.Case(
        Transposed, {"x": ["x"], "head": ["head"]},
        lambda n: torch.randn(n, 8, 6), lambda n: torch.arange(n) % 3, "fx",
    )  # fmt: skip
    (eager, _), (replayed, made) = (stages_of(suite_of(case), s) for s in (EAGER, GRAPHS))
    operations = train(steps=6, batch_size=8), train(steps=6, batch_size=8)
    assert_equal(carried_out(eager, *operations), carried_out(replayed, *operations))
    assert made is not None and len(made) == 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaid(Train):
    """A user's operation that trains weights in another order in memory."""

    def run(self, session: Any) -> None:
        for parameter in session.parameters().values():
            parameter.data = parameter.data.contiguous()
        session.train(self)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_weights_that_an_operation_moves_are_trained_without_graphs(optimizer: Any) -> None:
    plain = train(steps=6, optimizer=optimizer)
    relaid = Relaid(name="relaid", learning_rate=1e-2, steps=6, batch_size=8, optimizer=optimizer)
    suite = suite_of(zoo.CASES["cnn2"])
    (eager, _), (replayed, _) = (stages_of(suite, s) for s in (EAGER, GRAPHS))
    operations = plain, relaid, plain
    assert_equal(carried_out(eager, *operations), carried_out(replayed, *operations))


def test_numbers_of_64_bits_by_default_change_nothing() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        case = zoo.Case(
            lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), {"0": ["0"], "1": ["1"]},
            lambda n: torch.randn(n, 6), lambda n: torch.arange(n) % 3, "fx",
        )  # fmt: skip
        (eager, _), (replayed, made) = (stages_of(suite_of(case), s) for s in (EAGER, GRAPHS))
        operation = train(steps=6, optimizer="adam")
        assert_equal(carried_out(eager, operation), carried_out(replayed, operation))
    finally:
        torch.set_default_dtype(torch.float32)
    assert made is not None and len(made) == 3
    assert made._states and all(
        place.dtype == (torch.float32 if slot == "step" else torch.float64)
        for (_, slot), place in made._states.items()
    )


def test_a_step_that_failed_is_watched_when_it_is_tried_again() -> None:
    """A device that was full for a moment must not let a step through unseen."""
    full = [True]

    def once(model: Odd, x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.get_sync_debug_mode() and full and torch.is_grad_enabled():
            full.clear()
            raise torch.OutOfMemoryError("full")
        return looks(model, x)

    case = zoo.Case(
        lambda: Odd(once), {"first": ["first"], "head": ["head"]},
        lambda n: torch.randn(n, 6), lambda n: torch.arange(n) % 3, "fx",
    )  # fmt: skip
    stages, made = stages_of(suite_of(case), GRAPHS)
    with pytest.raises(FailedStageError, match="full"):
        carried_out(stages, train(steps=6))
    assert made is not None and not made.refused
    carried_out(stages, train(steps=6))
    assert not full and set(made.refused.values()) == {"it waits for the device"}


class Scaled(nn.Module):
    """A loss in units of the first batch that it met."""

    scale: torch.Tensor | None = None

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(outputs, targets)
        self.scale = loss.detach() if self.scale is None else self.scale
        return loss / self.scale


class Counting:
    """A loss that counts its calls, without being a module."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, targets) * (1 + 1 / self.calls)

    def method(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self(outputs, targets)


def counting() -> Any:
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(outputs, targets) * (1 + 1 / calls)

    return loss


def around_a_module() -> Any:
    inner = nn.Module()
    inner.forward = Counting()  # type: ignore[assignment]
    return lambda outputs, targets: inner(outputs, targets)


def applied(outputs: torch.Tensor, targets: torch.Tensor, by: Any) -> torch.Tensor:
    return by(outputs, targets)


def called(loss: nn.Module, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return loss(outputs, targets)


@pytest.mark.parametrize(
    "loss",
    [
        Weighted,
        Scaled,
        lambda: functools.partial(called, Weighted()),
        Counting,
        lambda: Counting().method,
        counting,
        lambda: functools.partial(applied, by=counting()),
        around_a_module,
    ],
    ids=["weighted", "scaled", "partial", "object", "method", "closure", "keyword", "around"],
)
def test_a_loss_with_a_memory_is_not_captured(loss: Any) -> None:
    suite = suite_of(zoo.CASES["cnn2"])
    (task,) = suite.train_tasks
    operations, found = (train(steps=6), train(steps=6)), []
    for settings in (EAGER, GRAPHS):
        own = dataclasses.replace(task, loss=loss())
        stages, made = stages_of(dataclasses.replace(suite, train_tasks=[own]), settings)
        found.append(carried_out(stages, *operations))
    assert_equal(*found)
    assert made is not None and made.refused and not len(made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warm(Train):
    """A user's operation, with settings of its own that must fit those of `Train`."""

    warm: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.steps is not None and len(self.warm) < self.steps


def test_operations_of_ones_own_are_captured_too() -> None:
    operation = Warm(name="warm", learning_rate=1e-2, steps=6, batch_size=8, warm=[1])
    suite = suite_of(zoo.CASES["cnn2"])
    (eager, _), (replayed, made) = (stages_of(suite, s) for s in (EAGER, GRAPHS))
    assert_equal(carried_out(eager, operation), carried_out(replayed, operation))
    assert made is not None and len(made) == 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twice(Train):
    """A user's operation that keeps the optimizer's state of the first half alone."""

    def run(self, session: Any) -> None:
        session.train(self)
        session.train(dataclasses.replace(self, keep_optimizer_state=False))


def test_the_state_that_a_training_keeps_outlasts_the_next() -> None:
    operation = Twice(name="twice", learning_rate=1e-2, steps=6, batch_size=8)
    suite = suite_of(zoo.CASES["cnn2"])
    (eager, _), (replayed, made) = (stages_of(suite, s) for s in (EAGER, GRAPHS))
    operations = operation, operation
    assert_equal(carried_out(eager, *operations), carried_out(replayed, *operations))
    assert made is not None and len(made) == 3


def test_losses_and_tasks_do_not_mix() -> None:
    suite = suite_of(zoo.CASES["cnn2"])
    (task,) = suite.train_tasks
    n_classes = int(task.train[1].max()) + 1
    weights = [torch.ones(n_classes), torch.arange(1.0, 1.0 + n_classes)]
    tasks = [
        dataclasses.replace(task, name=f"{i}", loss=nn.CrossEntropyLoss(weight=weight))
        for i, weight in enumerate([*weights, weights[0]])
    ]
    suite = dataclasses.replace(suite, train_tasks=tasks)
    path = path_of((1,), operation=train(steps=8))
    found = []
    for settings in (EAGER, GRAPHS):
        stages, made = stages_of(suite, settings)
        requests = [StageRequest(task=name, path=path) for name in "0120"]
        found.append([stages.outcome(request).outcome.loss for request in requests])
    assert found[0] == found[1]
    assert made is not None and len(made) == 2
