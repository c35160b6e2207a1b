"""What a user's code does on the side reaches no other stage, neither the caller nor their data."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.engine.support import against_the_flow, what_there_is
from rlhf_ray.errors import FailedStageError, InputError
from rlhf_ray.levels import split_levels
from rlhf_ray.operations import Operation, StageSession, Stop, Train
from rlhf_ray.outcomes import Outcome, StageRequest, StageStep
from rlhf_ray.tasks import Loss, Suite, Task
from rlhf_ray.tree.stage_tree import LocalStages

SETTINGS = EngineSettings(device="cpu", val_size=64)
TRAIN = Train(name="train", learning_rate=1e-2, steps=8, batch_size=16)


def suite_of(
    *modules: nn.Module, loss: Loss = F.cross_entropy, n_train: int = 96, width: int = 16
) -> Suite:
    """Some modules between two linear layers, as three levels or two; two tasks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), *modules, nn.Linear(width, 3))

    def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
        return x, x[:, :3].argmax(1)

    tasks = [Task(name=str(i), train=data(n_train, 3 * i), val=data(64, 3 * i + 1),
                  test=data(8, 3 * i + 2), loss=loss) for i in range(2)]  # fmt: skip
    low = [
        str(i)
        for i in range(len(modules) + 1)
        if any(True for _ in model[i].parameters()) or any(True for _ in model[i].buffers())
    ]
    levels = {"low": low, "head": [str(len(modules) + 1)]}
    return Suite(name="s", model=model, levels=levels, train_tasks=tasks, val_tasks=[],
                 test_tasks=[])  # fmt: skip


def request_of(*levels: int, task: str = "0", operation: Operation = TRAIN) -> StageRequest:
    path = tuple(StageStep(operation=operation, levels=(level,)) for level in levels)
    return StageRequest(task=task, path=path)


def figures(outcome: Outcome) -> tuple[float, ...]:
    return outcome.metric, outcome.loss, outcome.entropy, outcome.train_loss


def found_by(stages: LocalStages, request: StageRequest) -> tuple[float, ...]:
    return figures(stages.outcome(request).outcome)


class DropsAlways(nn.Module):
    """Functional dropout drops in eval mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3)


class DropsByNumPy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.tensor(np.random.rand(16) < 0.7) * (random.random() + 0.5)


@pytest.mark.parametrize("module", [DropsAlways, DropsByNumPy])
def test_draws_follow_from_the_stage_alone(module: type[nn.Module]) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        suite = suite_of(nn.Sequential(module(), nn.LayerNorm(16)))
        torch.manual_seed(seed)  # for the model's weights suite_of has seeded it
        stages = LocalStages(Engine(suite, SETTINGS))
        found.append([found_by(stages, request_of(*path)) for path in ((), (0,), (0, 1))])
        torch_state, (_, keys, *_), python = before
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert (np.random.get_state()[1] == keys).all() and random.getstate() == python
    assert found[0] == found[1]


class Centred(nn.Module):
    """Subtracts a running mean, which it changes in place or puts another tensor in place of."""

    mean: Tensor

    def __init__(self, *, in_place: bool, persistent: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(16), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            if self.in_place:
                self.mean.copy_(mean)
            else:
                self.mean = mean
        return x - self.mean


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_are_those_of_the_state(in_place: bool, persistent: bool) -> None:
    suite = suite_of(Centred(in_place=in_place, persistent=persistent), nn.ReLU())
    alone, others = (LocalStages(Engine(suite, SETTINGS)) for _ in range(2))
    others.outcome(request_of(0, task="1"))
    for request in (request_of(0), request_of(0, 1)):
        assert found_by(alone, request) == found_by(others, request)
    model = copy.deepcopy(suite.model)
    model.load_state_dict(alone.state_dict(request_of(0)))
    x, y = suite.task("0").val
    loss = F.cross_entropy(model.eval()(x), y).item()
    assert loss == pytest.approx(alone.outcome(request_of(0)).outcome.loss, rel=1e-5)
    assert bool(model[1].mean.any()) == persistent


def test_a_buffer_that_changes_its_shape_is_refused() -> None:
    class Growing(Centred):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean = torch.cat([self.mean, self.mean])
            return x

    stages = LocalStages(Engine(suite_of(Growing(in_place=False)), SETTINGS))
    with pytest.raises(FailedStageError, match=r"must keep its shape, got another one for '1.mean"):
        stages.outcome(request_of(0))


class RunningLoss(nn.Module):
    """Weighs classes by how frequent they were so far."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.seen += targets.bincount(minlength=3)
        return F.cross_entropy(outputs, targets, self.seen.sum() / self.seen)


def test_losses_begin_each_stage_as_the_task_has_them() -> None:
    suite = suite_of(nn.ReLU(), loss=RunningLoss())
    digest = suite.task("0").digest
    alone, others = (LocalStages(Engine(suite, SETTINGS)) for _ in range(2))
    others.outcome(request_of(0, task="1"))
    others.outcome(request_of(1))
    assert found_by(alone, request_of(0)) == found_by(others, request_of(0))
    assert torch.equal(suite.task("0").loss.seen, torch.ones(3))  # type: ignore[attr-defined]
    assert suite_of(nn.ReLU(), loss=RunningLoss()).task("0").digest == digest


def test_the_users_data_stay_as_they_are() -> None:
    class Normalised(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(0.5).div_(2.0)

    def relabelling(outputs: Tensor, targets: Tensor) -> Tensor:
        targets[targets == 2] = 0
        return F.cross_entropy(outputs, targets)

    plain = suite_of(nn.ReLU(), loss=relabelling)
    model = nn.Sequential(Normalised(), *plain.model.children())
    before = [[part.clone() for part in (*task.train, *task.val)] for task in plain.tasks()]
    suite = Suite(name="s", model=model, levels={"low": ["1"], "head": ["3"]},
                  train_tasks=plain.train_tasks, val_tasks=[], test_tasks=[])  # fmt: skip
    what_there_is(suite)
    stages = LocalStages(Engine(suite, SETTINGS))
    stages.outcome(request_of(1, 0))
    for task, parts in zip(suite.tasks(), before, strict=True):
        assert all(map(torch.equal, (*task.train, *task.val), parts))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode,
                                  lambda: torch.autocast("cpu", dtype=torch.bfloat16)])  # fmt: skip
def test_the_callers_modes_do_not_count(mode: Callable[[], torch.no_grad]) -> None:
    suite = suite_of(nn.ReLU())
    expected = found_by(LocalStages(Engine(suite, SETTINGS)), request_of(0, 1))
    with mode():
        assert found_by(LocalStages(Engine(suite, SETTINGS)), request_of(0, 1)) == expected


def test_what_a_task_costs_does_not_depend_on_those_before_it() -> None:
    def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.01 * (outputs @ outputs.T).square().mean()

    suite = suite_of(nn.ReLU())
    dear = suite.task("1")
    object.__setattr__(dear, "loss", contrastive)
    alone, others = (LocalStages(Engine(suite, SETTINGS)) for _ in range(2))
    cheap = others.outcome(request_of(0)).outcome.flops["train"]
    found = others.outcome(request_of(0, task="1")).outcome.flops["train"]
    assert found == alone.outcome(request_of(0, task="1")).outcome.flops["train"] > cheap


def test_in_place_dropout_leaves_values_of_no_batch_alone() -> None:
    class Positions(nn.Module):
        """Adds what is one for all examples, dropped out in place in the level above it."""

        def __init__(self) -> None:
            super().__init__()
            self.low, self.positions = nn.Linear(8, 16), nn.Parameter(torch.ones(16))
            self.drop, self.middle = nn.Dropout(0.5, inplace=True), nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            positions = self.positions * 2
            x = self.low(x)
            return self.head(self.middle(x + self.drop(positions)))

    plain = suite_of(nn.ReLU())
    torch.manual_seed(0)
    suite = Suite(
        name="s",
        model=nn.Sequential(Positions()),
        levels={"low": ["0.low"], "middle": ["0.drop", "0.middle"], "head": ["0.head"]},
        train_tasks=plain.train_tasks,
        val_tasks=[],
        test_tasks=[],
    )
    uncached = LocalStages(Engine(suite, EngineSettings(device="cpu", val_size=64, cache_bytes=0)))
    cached = LocalStages(Engine(suite, SETTINGS))
    assert cached.engine.plan.usable == (True,) * 3  # type: ignore[attr-defined]
    for request in (request_of(2, 1), request_of(1), request_of(1, 1)):
        assert found_by(cached, request) == pytest.approx(found_by(uncached, request), rel=1e-5)


def test_a_full_device_is_not_taken_for_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, calls = F.linear, 0

    def full(*args: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return linear(*args)

    suite = suite_of(nn.ReLU())
    monkeypatch.setattr(F, "linear", full)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(suite, SETTINGS)


def test_levels_against_the_flow_are_told_of() -> None:
    suite = suite_of(nn.ReLU())
    assert against_the_flow(suite) == ""
    turned = Suite(name="s", model=suite.model, levels={"head": ["2"], "low": ["0"]},
                   train_tasks=suite.train_tasks, val_tasks=[], test_tasks=[])  # fmt: skip
    assert "from the input on: 'low' runs before 'head'" in against_the_flow(turned)
    assert not suite.model[0]._forward_pre_hooks


@dataclass(frozen=True, kw_only=True)
class Pair(Operation):
    """This level and the next."""

    def applies(self, level: int, n_levels: int) -> bool:
        return level < n_levels - 1

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        return (level, level + 1)

    def examples_drawn(self, n_train: int) -> int:
        return TRAIN.examples_drawn(n_train)

    def run(self, session: StageSession) -> None:
        session.train(TRAIN)


def test_levels_that_an_operation_is_not_open_to_have_no_price() -> None:
    engine = Engine(suite_of(nn.ReLU()), SETTINGS)
    path = (StageStep(operation=Pair(name="pair"), levels=(0, 1)),)
    outcome = LocalStages(engine).outcome(StageRequest(task="0", path=path)).outcome
    price = engine.prices([Pair(name="pair"), Stop()])("0", path)
    assert price == sum(outcome.flops.values())


def test_a_single_example_left_over_joins_the_batch_before() -> None:
    suite = suite_of(nn.BatchNorm1d(16), nn.ReLU(), n_train=65)
    epoch = Train(name="epoch", learning_rate=1e-2, steps=None, batch_size=64)
    outcome = LocalStages(Engine(suite, SETTINGS)).outcome(request_of(0, operation=epoch)).outcome
    assert not outcome.diverged and outcome.flops["train"] > 0


def test_a_model_that_costs_nothing_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    tasks = suite_of(nn.ReLU()).train_tasks
    suite = Suite(name="s", model=nn.Sequential(Scale()), levels={"all": ["0"]},
                  train_tasks=tasks, val_tasks=[], test_tasks=[])  # fmt: skip
    with pytest.raises(InputError, match="a full stage must cost something"):
        Engine(suite, SETTINGS).reference_flops()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_cannot_be_trained_or_handed_over_is_refused() -> None:
    spectral = nn.Linear(8, 3, dtype=torch.complex64)
    with pytest.raises(InputError, match=r"must be real, got '0.weight' of torch.complex64"):
        split_levels(nn.Sequential(spectral), {"all": ["0"]})

    scripted = torch.jit.trace(nn.Linear(8, 3), torch.zeros(1, 8))
    with pytest.raises(InputError, match="must be Python's, got a TorchScript at '0'"):
        split_levels(nn.Sequential(scripted), {"all": ["0"]})

    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    with pytest.raises(InputError, match=r"parameters and buffers, got '0._extra_state'"):
        split_levels(nn.Sequential(Extra(8, 3)), {"all": ["0"]})
