"""The engine: exact with and without caches, deterministic, and right about what diverged."""

import copy
import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rlhf_ray.digests import derive_seed
from rlhf_ray.engine.batches import batch_order
from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import FailedStageError, InputError
from rlhf_ray.operations import Operation, Refit, StageSession, Train, default_operations
from rlhf_ray.outcomes import PRETRAINED, StagePath, StageRequest, StageStep
from rlhf_ray.tasks import Metric, Suite, Task, call_model, map_inputs
from rlhf_ray.tree.stage_tree import LocalStages

N_TRAIN, N_VAL, N_TEST = 20, 12, 8
LEARNING_RATE = 1e-2
SETTINGS = EngineSettings(device="cpu", val_size=10, probe_size=6)
# dropout draws its masks in memory order: plain torch's, for the comparison with plain torch
PLAIN_FORMAT = EngineSettings(device="cpu", val_size=10, probe_size=6, channels_last=False)
ALL_CASES = {**zoo.CASES, "packed": zoo.PACKED}


def suite_of(case: zoo.Case, seed: int = 0) -> Suite:
    torch.manual_seed(seed)
    split = {
        name: (case.inputs(n), case.targets(n))
        for name, n in (("train", N_TRAIN), ("val", N_VAL), ("test", N_TEST))
    }
    task = Task(name="task", loss=case.loss, **split)
    return Suite(
        name="zoo",
        model=case.model(),
        levels=case.levels,
        train_tasks=[task],
        val_tasks=[],
        test_tasks=[],
        source=case.inputs(6),
    )


def train(**changes: Any) -> Train:
    # SGD: Adam blows the rounding of gradients that vanish (a bias below a batch norm) up to steps
    settings = {"optimizer": "sgd", "steps": 4, "batch_size": 8, **changes}
    return Train(**{"name": "train", "learning_rate": LEARNING_RATE, **settings})


def path_of(*levels: tuple[int, ...], operation: Operation | None = None) -> StagePath:
    return tuple(StageStep(operation=operation or train(), levels=lv) for lv in levels)


def paths_for(n_levels: int) -> list[StagePath]:
    last = n_levels - 1
    return [
        path_of((last,), (0,), (last,)),
        path_of((last,), tuple(range(n_levels)), (last,)),
        path_of((max(0, last - 1), last), (last,)),
    ]


@pytest.mark.parametrize("name", ALL_CASES)
def test_stages_cached_and_uncached_agree(name: str) -> None:
    suite = suite_of(ALL_CASES[name])
    cached = LocalStages(Engine(suite, SETTINGS))
    plain = LocalStages(Engine(suite, EngineSettings(device="cpu", val_size=10, cache_bytes=0)))
    for path in paths_for(len(suite.levels)):
        request = StageRequest(task="task", path=path)
        a, b = cached.outcome(request).outcome, plain.outcome(request).outcome
        assert a.loss == pytest.approx(b.loss, rel=1e-3, abs=1e-5)
        assert a.flops == b.flops
        for key, value in cached.state_dict(request).items():
            torch.testing.assert_close(value, plain.state_dict(request)[key], rtol=1e-3, atol=1e-4)


def plain_loop(suite: Suite, path: StagePath, engine: Engine) -> nn.Module:
    """What a stage means, without engine, caches or memory formats."""
    model, task = copy.deepcopy(suite.model), suite.train_tasks[0]
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for i, step in enumerate(path):
        request = StageRequest(task="task", path=path[: i + 1])
        seed = derive_seed("stage", engine.identity.key(request))
        generator = torch.Generator().manual_seed(seed)
        model.eval().requires_grad_(False)
        for level in step.levels:
            for module in list(suite.levels.values())[level]:
                model.get_submodule(module).train().requires_grad_(True)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(named.values(), lr=LEARNING_RATE, momentum=0.9)
        for n, p in named.items():
            if n in kept:
                optimizer.state[p] = kept[n]
        torch.manual_seed(seed)
        for index in batch_order(N_TRAIN, 4, 8, generator):
            x, y = task.train
            outputs = call_model(model, map_inputs(lambda value: value[index], x))  # noqa: B023
            optimizer.zero_grad()
            task.loss(outputs, y[index]).backward()
            optimizer.step()
        kept |= {n: optimizer.state[p] for n, p in named.items()}
    return model.eval()


@pytest.mark.parametrize("name", ALL_CASES)
def test_stages_agree_with_the_plain_loop(name: str) -> None:
    suite = suite_of(ALL_CASES[name])
    stages = LocalStages(Engine(suite, PLAIN_FORMAT))
    path = paths_for(len(suite.levels))[0]
    expected = plain_loop(suite, path, stages.engine).state_dict()  # type: ignore[arg-type]
    found = stages.state_dict(StageRequest(task="task", path=path))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-4)


def cnn_suite() -> Suite:
    return suite_of(zoo.CASES["cnn2"])


def test_start_leaves_the_users_model_as_it_was() -> None:
    suite = cnn_suite()
    before = copy.deepcopy(suite.model.state_dict())
    stages = LocalStages(Engine(suite, SETTINGS))
    stages.outcome(StageRequest(task="task", path=path_of((0, 1))))
    assert suite.model.training
    assert all(p.requires_grad for p in suite.model.parameters())
    for key, value in suite.model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_run_same_request_twice_gives_the_same_outcome() -> None:
    suite = cnn_suite()
    request = StageRequest(task="task", replica=3, path=path_of((0,), (1,)))
    first, second = (LocalStages(Engine(suite, SETTINGS)) for _ in range(2))
    second.outcome(StageRequest(task="task", path=path_of((1,), (0,), (1,))))  # other work before
    a, b = first.outcome(request).outcome, second.outcome(request).outcome
    assert (a.metric, a.loss, a.train_loss, a.key) == (b.metric, b.loss, b.train_loss, b.key)


def test_an_engine_that_gave_its_memory_back_goes_on_as_before() -> None:
    kept, released = (LocalStages(Engine(cnn_suite(), SETTINGS)) for _ in range(2))
    for path in (path_of((1,)), path_of((1,), (1,)), path_of((1,), (1,), (0, 1))):
        request = StageRequest(task="task", path=path)
        expected, found = kept.outcome(request).outcome, released.outcome(request).outcome
        assert (found.key, found.loss, found.flops) == (expected.key, expected.loss, expected.flops)
        released.release()


def test_an_engine_for_accounts_prices_what_another_machine_carries_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = EngineSettings(device="cuda", precision="bf16", val_size=SETTINGS.val_size)
    with pytest.raises(InputError, match="device must be there, got device='cuda'"):
        Engine(cnn_suite(), settings)
    engine = Engine(cnn_suite(), settings, carries_out=False)
    assert engine.identity.precision == "bf16"
    plain = Engine(cnn_suite(), SETTINGS)
    assert engine.reference_flops() == plain.reference_flops()
    path = path_of((1,), (0,))
    prices, expected = (each.prices(default_operations())("task", path) for each in (engine, plain))
    assert prices == expected > 0


def test_key_replicas_differ_but_share_the_start() -> None:
    engine = Engine(cnn_suite(), SETTINGS)
    path = path_of((1,))
    keys = {engine.identity.key(StageRequest(task="task", replica=r, path=path)) for r in range(3)}
    starts = {engine.identity.key(StageRequest(task="task", replica=r)) for r in range(3)}
    assert (len(keys), len(starts)) == (3, 1)


def test_run_diverged_stage_keeps_the_parents_weights() -> None:
    stages = LocalStages(Engine(cnn_suite(), SETTINGS))
    good = path_of((1,))
    bad = (*good, *path_of((0,), operation=train(learning_rate=1e30)))
    parent = stages.outcome(StageRequest(task="task", path=good)).outcome
    outcome = stages.outcome(StageRequest(task="task", path=bad)).outcome
    assert outcome.diverged
    assert (outcome.metric, outcome.versions) == (parent.metric, parent.versions)
    assert outcome.flops["train"] > 0
    after = stages.outcome(StageRequest(task="task", path=(*bad, *good))).outcome
    assert math.isfinite(after.loss)
    assert not after.diverged


def test_run_optimizer_state_is_kept_or_reset() -> None:
    stages = LocalStages(Engine(cnn_suite(), SETTINGS))
    kept = path_of((1,), (1,))
    reset = path_of((1,), (1,), operation=train(keep_optimizer_state=False))
    losses = {
        stages.outcome(StageRequest(task="task", path=path)).outcome.loss for path in (kept, reset)
    }
    assert len(losses) == 2


def test_run_stores_only_the_levels_it_changed() -> None:
    engine = Engine(cnn_suite(), SETTINGS)
    start = engine.start(StageRequest(task="task"))
    request = StageRequest(task="task", path=path_of((1,)))
    outcome, states = engine.run(request, start, lambda version, level: pytest.fail("no load"))
    assert set(states) == {1}
    assert outcome.versions == (PRETRAINED, outcome.key)


@pytest.mark.parametrize("name", ["cnn2", "cnn4", "resnet18", "transformer"])
@pytest.mark.parametrize("steps", [1, 4])  # fewer examples than the train split holds, and more
def test_account_is_what_torch_counts_on_the_executed_path(name: str, steps: int) -> None:
    suite = dataclasses.replace(suite_of(zoo.CASES[name]), source=None)
    last = len(suite.levels) - 1
    path = path_of((last,), (0,), (last,), tuple(range(last + 1)), operation=train(steps=steps))
    priced = LocalStages(Engine(suite, SETTINGS))
    charged = 0.0
    for length in range(len(path) + 1):
        outcome = priced.outcome(StageRequest(task="task", path=path[:length])).outcome
        charged += sum(outcome.flops.values())
    engine = Engine(suite, SETTINGS)
    engine._flop_models = priced.engine._flop_models  # type: ignore[attr-defined]  # measured
    with FlopCounterMode(display=False) as counter:
        LocalStages(engine).outcome(StageRequest(task="task", path=path))
    assert charged == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_caches_stay_within_their_bound() -> None:
    settings = EngineSettings(device="cpu", val_size=10, cache_bytes=40_000)
    stages = LocalStages(Engine(cnn_suite(), settings))
    for path in (path_of((1,)), path_of((0,), (1,)), path_of((0,), (0,), (1,))):
        stages.outcome(StageRequest(task="task", path=path))
    assert stages.engine._loaded._activations.n_bytes <= 40_000  # type: ignore[attr-defined]


def test_run_one_epoch_draws_every_example_once() -> None:
    batches = list(batch_order(10, None, 4, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(torch.cat(batches).tolist()) == list(range(10))


class Halve(Operation):
    """A user's operation: halves the weights of a level."""

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        return (level,)

    def run(self, session: StageSession) -> None:
        with torch.no_grad():
            for parameter in session.parameters().values():
                parameter.mul_(0.5)
        session.charge(7.0)


def test_run_users_own_operation_changes_weights_and_is_charged() -> None:
    suite = cnn_suite()
    stages = LocalStages(Engine(suite, SETTINGS))
    path = path_of((1,), operation=Halve(name="halve"))
    request = StageRequest(task="task", path=path)
    assert stages.outcome(request).outcome.flops["train"] == 7.0
    key = suite.levels["dense"][0] + ".weight"
    torch.testing.assert_close(stages.state_dict(request)[key], suite.model.state_dict()[key] / 2)


def mlp_suite(model: nn.Module, x: torch.Tensor, *more: tuple[str, torch.Tensor]) -> Suite:
    """Levels a, b and c of a model, a task on x, and tasks on other inputs; x is the source."""
    pairs = {name: (data, torch.arange(len(data)) % 3) for name, data in (("task", x), *more)}
    return Suite(
        name="mlp",
        model=model,
        levels={"a": ["a"], "b": ["b"], "c": ["c"]},
        train_tasks=[Task(name=n, train=d, val=d, test=d) for n, d in pairs.items()],
        val_tasks=[],
        test_tasks=[],
        source=x,
    )


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


class Masked(Mlp):
    """Has a class that never is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.tensor([False, False, False, True])
        return super().forward(x).masked_fill(mask, float("-inf"))


class Pooled(Mlp):
    """Takes the mean over positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).tanh()).mean(1))


def test_classes_that_are_masked_out_do_not_make_a_stage_diverge() -> None:
    suite = mlp_suite(Masked(), torch.randn(24, 4))
    outcome = LocalStages(Engine(suite, SETTINGS)).outcome(
        StageRequest(task="task", path=path_of((2,)))
    ).outcome  # fmt: skip
    assert not outcome.diverged and 0 < outcome.entropy < 1


def test_frozen_parameters_stay_as_they_are() -> None:
    model = Mlp()
    model.c.weight.requires_grad_(False)
    model.b.scale = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    stages = LocalStages(Engine(mlp_suite(model, torch.randn(24, 4)), SETTINGS))
    state = stages.state_dict(StageRequest(task="task", path=path_of((0, 1, 2))))
    assert torch.equal(state["c.weight"], model.c.weight)
    assert not torch.equal(state["c.bias"], model.c.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precision_can_be_tuned_by_every_operation(dtype: torch.dtype) -> None:
    suite = mlp_suite(Mlp().to(dtype), torch.randn(24, 4, dtype=dtype))
    stages = LocalStages(Engine(suite, SETTINGS))
    for operation in (train(), Refit(name="refit", margin=-1.0)):
        path = path_of((0, 1, 2), operation=operation)
        outcome = stages.outcome(StageRequest(task="task", path=path)).outcome
        assert not outcome.diverged
        state = stages.state_dict(StageRequest(task="task", path=path))
        assert {value.dtype for value in state.values()} == {dtype}


def test_caches_are_measured_for_every_size_of_input() -> None:
    short, long = torch.randn(40, 4, 4), torch.randn(40, 64, 4)
    suite = mlp_suite(Pooled(), short, ("long", long))
    limit = replace(SETTINGS, cache_bytes=40 * 8 * 8 * 4)  # what the short ones need
    stages = LocalStages(Engine(suite, limit))
    for task in ("task", "long"):
        stages.outcome(StageRequest(task=task, path=path_of((2,), operation=train(steps=None))))


def test_a_start_without_figures_is_refused() -> None:
    def undefined(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        return math.nan

    suite = mlp_suite(Mlp(), torch.randn(24, 4))
    object.__setattr__(suite.train_tasks[0], "metric", Metric(name="f1", function=undefined))
    with pytest.raises(FailedStageError, match="figures on val must be finite, got metric=nan"):
        LocalStages(Engine(suite, SETTINGS)).outcome(StageRequest(task="task"))


def test_other_source_data_are_other_starts_and_alignments_with_the_same_draws() -> None:
    x = torch.randn(24, 4)
    first, second = (mlp_suite(Mlp(), x) for _ in range(2))
    second.model.load_state_dict(first.model.state_dict())
    object.__setattr__(second, "source", x + 1)
    one, other = (Engine(suite, SETTINGS).identity for suite in (first, second))
    refit = path_of((0, 1, 2), operation=Refit(name="refit"))
    for path, same in (((), False), (refit, False), ((*refit, *path_of((1,))), False),
                       (path_of((1,)), True)):  # fmt: skip
        request = StageRequest(task="task", path=path)
        assert (one.key(request) == other.key(request)) == same
        assert one.drawn_by(request) == other.drawn_by(request)


def test_settings_bf16_without_cuda_is_refused() -> None:
    with pytest.raises(InputError, match="bf16"):
        EngineSettings(device="cpu", precision="bf16")
