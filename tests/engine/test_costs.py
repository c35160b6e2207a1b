import copy
import functools
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES, Case, Lstm, TorchTransformer

from rlhf_ray.engine.costs import CacheLedger, FlopModel, StageFlops, stage_flops, start_flops
from rlhf_ray.engine.segments import SegmentPlan, Values, plan_segments
from rlhf_ray.levels import LevelSplit, split_levels
from rlhf_ray.tasks import Task

N_TRAIN, N_VAL, BATCH = 12, 5, 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _flops(case: Case, model: nn.Module | None = None) -> tuple[FlopModel, Task, LevelSplit]:
    model = model or case.model()
    split = split_levels(model, case.levels)
    data = [(case.inputs(n), case.targets(n)) for n in (N_TRAIN, N_VAL, N_VAL)]
    task = Task(name="t", train=data[0], val=data[1], test=data[2], loss=case.loss)
    plan = plan_segments(model, split, task.train[0])
    return FlopModel(plan, model, split, task), task, split


def _stage_flops(
    flops: FlopModel, history: Sequence[tuple[int, ...]], *, n_train: int, n_val: int, n_drawn: int
) -> StageFlops:
    """The last stage of several that each train some levels on as many examples."""
    passes = [((levels, n_drawn),) for levels in history]
    return stage_flops(flops, passes, n_train=n_train, n_val=n_val)


def _path_flops(flops: FlopModel, history: Sequence[tuple[int, ...]], **sizes: int) -> float:
    """Total of a path: the start and every stage."""
    stages = [_stage_flops(flops, history[: i + 1], **sizes).total for i in range(len(history))]
    return start_flops(flops, sizes["n_val"]).total + sum(stages)


def _execute(
    flops: FlopModel, task: Task, split: LevelSplit, history: Sequence[tuple[int, ...]], steps: int
) -> int:
    """FLOPs that torch counts while a plain reading of the caching rule is carried out.

    Attention is counted as its plain formula, which is the same on all devices.
    """
    plan, model = flops.plan, flops._model
    n_train, top = N_TRAIN, split.n_levels
    caches: dict[str, dict[int, Values]] = {
        "train": {0: plan.start(task.train[0])},
        "val": {0: plan.start(task.val[0])},
    }

    def nearest(cache: dict[int, Values], boundary: int) -> int:
        return max(b for b in cache if b <= boundary)

    def climb(cache: dict[int, Values], to: int) -> None:
        for b in range(nearest(cache, to) + 1, to + 1):
            if plan.usable[b]:
                below = nearest(cache, b)
                cache[b] = plan.forward(cache[below], below, b)

    def evaluate() -> None:
        model.eval()
        climb(caches["val"], top - 1)
        last = max(caches["val"])
        plan.output(caches["val"][last], last)

    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, torch.no_grad(), FlopCounterMode(display=False) as counter:
        evaluate()
        for levels in history:
            start = plan.nearest(min(levels))
            model.eval()
            if n_train <= steps * BATCH:
                climb(caches["train"], start)
            _train(plan, model, split, task, levels, caches["train"], steps)
            for cache in caches.values():
                for b in [b for b in cache if b > min(levels)]:
                    del cache[b]
            evaluate()
    return counter.get_total_flops()


def _train(
    plan: SegmentPlan, model: nn.Module, split: LevelSplit, task: Task, levels: tuple[int, ...],
    cache: dict[int, Values], steps: int,
) -> None:  # fmt: skip
    start = plan.nearest(min(levels))
    source = max(b for b in cache if b <= start)
    weights = dict(model.named_parameters())
    model.requires_grad_(False)
    chosen = [weights[n].requires_grad_(True) for lev in levels for n in split.parameters[lev]]
    optimizer = torch.optim.SGD(chosen, lr=0.01)
    for step in range(steps):
        index = torch.arange(step * BATCH, (step + 1) * BATCH) % N_TRAIN
        values = plan.forward(plan.take(cache[source], index, source), source, start)
        for level in levels:
            for name in split.modules[level]:
                model.get_submodule(name).train()
        with torch.enable_grad():
            loss = task.loss(plan.output(values, start), task.train[1][index])
            loss.backward()
        model.eval()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("steps", [2, 3])  # fewer examples than the train split holds, and as many
@pytest.mark.parametrize(
    "history",
    [[(3,)], [(3,), (1,), (2,), (3,)], [(0, 1, 2, 3), (2, 3)], [(1, 3), (0,), (3,), (2,)]],
)
def test_ledger_agrees_with_torch_on_executed_paths(
    history: list[tuple[int, ...]], steps: int
) -> None:
    flops, task, split = _flops(CASES["cnn4"])
    executed = _execute(flops, task, split, history, steps)
    assert _path_flops(
        flops, history, n_train=N_TRAIN, n_val=N_VAL, n_drawn=steps * BATCH
    ) == pytest.approx(executed, rel=1e-9)


@pytest.mark.parametrize(
    "name", ["resnet18", "norm_cnn", "unet", "transformer", "torch_transformer"]
)
def test_ledger_agrees_with_torch_on_other_models(name: str) -> None:
    flops, task, split = _flops(CASES[name])
    history = [(2,), (1, 2), (split.n_levels - 1,)]
    executed = _execute(flops, task, split, history, steps=3)
    sizes = {"n_train": N_TRAIN, "n_val": N_VAL, "n_drawn": 3 * BATCH}
    assert _path_flops(flops, history, **sizes) == pytest.approx(executed, rel=1e-9)


def test_cnn_matches_hand_formulas() -> None:
    flops, _, _ = _flops(CASES["cnn4"])
    conv1, conv2 = 2 * 256 * 9 * 8, 2 * 64 * 9 * 8 * 16
    dense, head = 2 * 256 * 32, 2 * 32 * 10
    assert [flops.forward(i, i + 1) for i in range(4)] == [conv1, conv2, dense, head]
    assert flops.train_step((3,)) == 2 * head  # no gradient of the cached input
    assert flops.train_step((2,)) == 2 * dense + 2 * head  # through the head, not into it
    assert flops.train_step((2, 3)) == 2 * dense + 3 * head
    assert flops.train_step((0, 1, 2, 3)) == 2 * conv1 + 3 * (conv2 + dense + head)
    assert flops.full_stage(steps=20, batch_size=64) == 1280 * flops.train_step((0, 1, 2, 3))


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_match_hand_formulas(cell: type[nn.RNNBase], gates: int) -> None:
    class Classifier(Lstm):
        def __init__(self) -> None:
            super().__init__()
            self.first = cell(8, 12, batch_first=True)
            self.second = cell(12, 12, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, state = self.first(self.embedding(x))
            return self.head(self.second(out, state)[0][:, -1])

    flops, _, _ = _flops(CASES["lstm"], Classifier())
    time = 5
    into_1, into_2, over = (2 * gates * 12 * width * time for width in (8, 12, 12))
    assert flops.forward(1, 2) == into_1 + over
    assert flops.forward(2, 3) == into_2 + over
    # backward: the weights' gradients, the states' but for the given first one, not the input's
    assert flops.train_step((2,)) >= (into_2 + over) * 2 + over * (time - 1) / time
    assert flops.train_step((2,)) <= (into_2 + over) * 3 + 4 * 2 * 12 * 10


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_transformer_layers_match_hand_formulas(dropout: float) -> None:
    flops, _, _ = _flops(CASES["torch_transformer"], TorchTransformer(dropout))
    time, width, hidden = 7, 16, 24
    linear = 2 * time * (4 * width * width + 2 * width * hidden)
    attention = 2 * 2 * time * time * width
    assert [flops.forward(i, i + 1) for i in (1, 2, 3)] == [linear + attention] * 3
    assert flops.forward(0, 5) == 3 * (linear + attention) + 2 * width * 10
    # backward into weights and inputs is twice the forward; fused attention computes scores again
    assert flops.train_step((3, 4)) >= 2 * linear + attention
    assert flops.train_step((2, 3)) >= 3 * (linear + attention) + 2 * linear + attention
    assert flops.train_step((2, 3)) <= 6 * (linear + attention) + attention + 4 * width * 10


@pytest.mark.parametrize("name", ["norm_cnn", "torch_transformer"])
def test_measuring_leaves_the_model_as_it_was(name: str) -> None:
    model = CASES[name].model().train()
    next(model.parameters()).requires_grad_(False)
    flops, _, split = _flops(CASES[name], model)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    onednn = torch._C._get_mkldnn_enabled()
    for level in range(split.n_levels):
        flops.train_step((level,))
    flops.full_stage()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert torch._C._get_mkldnn_enabled() == onednn
    assert torch.backends.mha.get_fastpath_enabled()


def test_probe_is_a_training_step_over_all_levels() -> None:
    flops, _, _ = _flops(CASES["cnn2"])
    cost = start_flops(flops, n_val=10, n_probe=3)
    assert (cost.fill, cost.train) == (0, 0)
    assert cost.evaluate == 10 * flops.forward(0, 2)
    assert cost.probe == 3 * flops.train_step((0, 1))
    assert cost.total == cost.evaluate + cost.probe


def test_ledger_charges_a_fill_once_and_again_after_a_change_below() -> None:
    flops, _, _ = _flops(CASES["cnn4"])
    sizes = {"n_train": 12, "n_val": 5, "n_drawn": 16}
    first = _stage_flops(flops, [(3,)], **sizes)
    assert first.fill == 12 * flops.forward(0, 3)
    assert first.evaluate == 5 * flops.forward(3, 4)
    assert _stage_flops(flops, [(3,), (3,)], **sizes).fill == 0
    assert _stage_flops(flops, [(3,), (1,)], **sizes).fill == 0  # boundary 1 was passed
    assert _stage_flops(flops, [(3,), (1,), (3,)], **sizes).fill == 12 * flops.forward(1, 3)


def test_ledger_does_not_fill_for_fewer_examples_than_the_split_holds() -> None:
    ledger, work = CacheLedger.started([True] * 3).fold((2,), n_train=100, n_drawn=10)
    assert (work.fill_from, work.fill_to, work.n_filled) == (0, 2, 10)
    assert ledger.train == {0}
    ledger, work = ledger.fold((2,), n_train=100, n_drawn=200)
    assert (work.n_filled, ledger.train) == (100, {0, 1, 2})
    _, work = ledger.fold((2,), n_train=100, n_drawn=10)
    assert (work.fill_from, work.fill_to) == (0, 2)  # whatever an earlier stage had filled


def test_ledger_evaluates_once_after_several_passes() -> None:
    flops, _, _ = _flops(CASES["cnn4"])
    two = (((0, 1), 4), ((3,), 12))
    cost = stage_flops(flops, [two], n_train=12, n_val=5)
    assert cost.evaluate == 5 * flops.forward(0, 4)  # from the lowest level that changed
    assert cost.fill == 12 * flops.forward(0, 3)
    # and what the second pass filled serves the next stage
    after = stage_flops(flops, [two, (((2, 3), 16),)], n_train=12, n_val=5)
    assert after.fill == 0 and after.evaluate == 5 * flops.forward(2, 4)


def test_ledger_goes_around_boundaries_that_cannot_be_cached() -> None:
    ledger, work = CacheLedger.started([True, False, True]).fold((1,), n_train=10, n_drawn=20)
    assert (work.fill_from, work.fill_to, work.evaluate_from) == (0, 0, 0)
    assert (ledger.train, ledger.val) == ({0}, {0, 2})


@functools.cache
def _cnn_flops() -> FlopModel:
    return _flops(CASES["cnn4"])[0]


@settings(max_examples=100, deadline=None)
@given(
    history=st.lists(
        st.sets(st.integers(0, 3), min_size=1).map(lambda s: tuple(sorted(s))),
        min_size=1,
        max_size=6,
    ),
    n_train=st.integers(1, 300),
    n_val=st.integers(1, 300),
    data=st.data(),
)
def test_ledger_never_exceeds_the_plain_loop(
    history: list[tuple[int, ...]], n_train: int, n_val: int, data: st.DataObject
) -> None:
    flops = _cnn_flops()
    drawn = data.draw(st.lists(st.integers(1, 300), min_size=len(history), max_size=len(history)))
    passes = [((levels, n),) for levels, n in zip(history, drawn, strict=True)]
    cost = stage_flops(flops, passes, n_train=n_train, n_val=n_val)
    plain_step = flops.forward(0, min(history[-1])) + flops.train_step(history[-1])
    assert cost.fill + cost.train <= drawn[-1] * plain_step * (1 + 1e-12)
    assert 0 < cost.evaluate <= n_val * flops.forward(0, 4)
    assert cost.total == cost.fill + cost.train + cost.evaluate


class Query(nn.Module):
    """Calls a module with a parameter, and has a weight that is computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
        self.norm, self.query = nn.LayerNorm(4), nn.Parameter(torch.ones(4))
        self.b = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.norm(self.query))


def test_models_that_call_modules_with_parameters_can_be_counted() -> None:
    case = Case(
        model=Query,
        levels={"a": ["a"], "b": ["b"]},
        inputs=lambda n: torch.randn(n, 6),
        targets=lambda n: torch.arange(n) % 3,
        mechanism="fx",
    )
    flops, _, _ = _flops(case)
    both, head = 2 * (6 * 4 + 4 * 3), 2 * 4 * 3
    assert flops.train_step((1,)) == 2 * head
    assert flops.train_step((0, 1)) == 2 * both + head  # no gradient of the inputs
    assert all(parameter.grad is None for parameter in flops._model.parameters())
