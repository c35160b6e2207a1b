import copy

import pytest
import torch
from torch import Tensor, nn
from zoo import CASES, FOUR, PACKED, Case, Looping, Lstm, Mixing, TorchTransformer, cnn

from rlhf_ray.engine.boundaries import agree
from rlhf_ray.engine.segments import SegmentPlan, no_fast_path, plan_segments
from rlhf_ray.errors import InputError, StageError
from rlhf_ray.levels import LevelSplit, split_levels
from rlhf_ray.tasks import Inputs, call_model, map_inputs

N = 6


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _planned(case: Case) -> tuple[nn.Module, LevelSplit, SegmentPlan, Inputs]:
    model, inputs = case.model(), case.inputs(N)
    split = split_levels(model, case.levels)
    return model, split, plan_segments(model, split, inputs), inputs


def _select_levels(model: nn.Module, split: LevelSplit, levels: tuple[int, ...]) -> list[Tensor]:
    """Trained levels in train mode and with gradients, all else frozen and in eval mode."""
    model.eval().requires_grad_(False)
    weights = dict(model.named_parameters())
    for level in levels:
        for name in split.modules[level]:
            model.get_submodule(name).train()
    chosen = [weights[name] for level in levels for name in split.parameters[level]]
    return [weight.requires_grad_(True) for weight in chosen]


@pytest.mark.parametrize("name", CASES)
def test_every_boundary_is_usable_and_chained_runs_equal_the_plain_model(name: str) -> None:
    case = CASES[name]
    model, split, plan, inputs = _planned(case)
    assert plan.reason == ""
    assert plan.mechanism == case.mechanism
    assert plan.usable == (True,) * split.n_levels
    model.eval()
    with torch.no_grad():
        plain = call_model(model, inputs)
        values = plan.start(inputs)
        for boundary in range(split.n_levels):
            direct = plan.forward(plan.start(inputs), 0, boundary)
            assert direct.keys() == values.keys()
            assert all(agree(values[key], direct[key]) for key in values)
            for _ in range(2):  # running on leaves the values as they are
                torch.testing.assert_close(plan.output(values, boundary), plain)
            if boundary + 1 < split.n_levels:
                values = plan.forward(values, boundary, boundary + 1)


@pytest.mark.parametrize("name", CASES)
def test_training_from_cached_values_equals_the_plain_loop(name: str) -> None:
    case = CASES[name]
    model, split, plan, inputs = _planned(case)
    targets = case.targets(N)
    top = split.n_levels - 1
    for levels in [*((i,) for i in range(top + 1)), tuple(range(top // 2, top + 1)), (0, top)]:
        plain = copy.deepcopy(model)
        start = plan.nearest(levels[0])
        model.eval()
        with torch.no_grad():
            cached = plan.forward(plan.start(inputs), 0, start)
        weights, plain_weights = (_select_levels(m, split, levels) for m in (model, plain))
        optimizers = [torch.optim.SGD(w, lr=0.1) for w in (weights, plain_weights)]
        for step in range(2):
            index = torch.tensor([[5, 0, 3], [1, 2, 4]][step])
            torch.manual_seed(step)
            output = plan.output(plan.take(cached, index, start), start)
            torch.manual_seed(step)
            with no_fast_path():  # which breaks on a frozen layer below a trained one
                expected = call_model(plain, map_inputs(lambda v, i=index: v[i], inputs))
            torch.testing.assert_close(output, expected)
            for optimizer, out in zip(optimizers, (output, expected), strict=True):
                optimizer.zero_grad()
                case.loss(out, targets[index]).backward()
            for got, want in zip(weights, plain_weights, strict=True):
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5)
            for optimizer in optimizers:
                optimizer.step()
        state, plain_state = model.state_dict(), plain.state_dict()
        for key in state:
            torch.testing.assert_close(state[key], plain_state[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_take_and_join_work_along_each_values_batch_dimension(name: str) -> None:
    model, split, plan, inputs = _planned(CASES[name])
    model.eval()
    with torch.no_grad():
        plain = call_model(model, inputs)
        for boundary in range(split.n_levels):
            values = plan.forward(plan.start(inputs), 0, boundary)
            parts = [plan.take(values, torch.tensor(i), boundary) for i in ([4, 1], [0])]
            joined = plan.join(parts, boundary)
            torch.testing.assert_close(plan.output(joined, boundary), plain[[4, 1, 0]])


@pytest.mark.parametrize("name", ["norm_cnn", "torch_transformer", "net"])
def test_planning_leaves_the_model_as_it_was(name: str) -> None:
    case = CASES[name]
    model = case.model().train()
    next(model.parameters()).requires_grad_(False)
    next(iter(model.children())).eval()
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    training = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    inputs, random = case.inputs(N), torch.get_rng_state()
    plan_segments(model, split_levels(model, case.levels), inputs)
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == attributes
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_weights_loaded_and_buffers_replaced_later_take_effect() -> None:
    model, _, plan, inputs = _planned(CASES["transformer"])
    model.eval()
    model.load_state_dict(CASES["transformer"].model().state_dict())
    model.position = model.position + 1  # as model.to() does
    with torch.no_grad():
        values = plan.forward(plan.start(inputs), 0, 2)
        torch.testing.assert_close(plan.output(values, 2), call_model(model, inputs))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Mixing(), "mixes the examples of a batch"), (Looping(), "called 2 times")],
)
def test_model_that_cannot_be_cached_runs_plainly_and_says_so(
    model: nn.Module, reason: str
) -> None:
    inputs = torch.randn(N, 6)
    plan = plan_segments(model, split_levels(model, {"a": ["a"], "b": ["b"]}), inputs)
    assert (plan.mechanism, plan.usable, plan.nearest(1)) == ("none", (True, False), 0)
    assert reason in plan.reason
    torch.testing.assert_close(plan.output(plan.start(inputs), 0), model(inputs))
    with pytest.raises(InputError, match="boundary must be usable"):
        plan.take({}, torch.tensor([0]), 1)


def test_packed_sequences_are_cached_below_the_recurrent_layer_alone() -> None:
    torch.manual_seed(0)
    _, _, plan, _ = _planned(PACKED)
    assert (plan.mechanism, plan.usable) == ("replay", (True, True, False))
    assert "recurrent.0 has no batch dimension of its own" in plan.reason


def test_levels_against_the_flow_are_not_cached_by_replay() -> None:
    model = TorchTransformer()
    levels = {"late": ["encoder.layers.1"], "early": ["encoder.layers.0"], "head": ["head"]}
    plan = plan_segments(model, split_levels(model, levels), CASES["torch_transformer"].inputs(N))
    assert plan.usable == (True, False, True)
    assert "called before levels below it" in plan.reason


def test_level_may_be_a_list_of_modules() -> None:
    for name, owner in (("torch_transformer", "encoder.layers"), ("transformer", "blocks")):
        model = CASES[name].model()
        levels = {"embedding": ["embedding"], "blocks": [owner], "head": ["head"]}
        plan = plan_segments(model, split_levels(model, levels), CASES[name].inputs(N))
        assert (plan.mechanism, plan.usable) == (CASES[name].mechanism, (True,) * 3)


def test_level_called_twice_is_cached_where_the_graph_is_known() -> None:
    class Twice(Looping):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    model = Twice()
    plan = plan_segments(model, split_levels(model, {"a": ["a"], "b": ["b"]}), torch.randn(N, 6))
    assert plan.usable == (True, True)


def test_mixing_between_levels_is_replayed_on_the_batch_at_hand() -> None:
    class Between(Looping):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x - x.mean(0))

    model, inputs, index = Between(), torch.randn(N, 6), torch.tensor([3, 1, 0])
    plan = plan_segments(model, split_levels(model, {"a": ["a"], "b": ["b"]}), inputs)
    assert (plan.mechanism, plan.usable) == ("replay", (True, True))
    values = plan.take(plan.forward(plan.start(inputs), 0, 1), index, 1)
    torch.testing.assert_close(plan.output(values, 1), model(inputs[index]))


class ByTheLargest(nn.Module):
    """What one example becomes depends on the largest of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x / x.abs().amax()))


class Trimmed(nn.Module):
    """Cuts a batch to the length of its longest sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x[:, : int((x != 0).sum(1).max())]).mean(1))


@pytest.mark.parametrize("decisive", range(4))
def test_one_example_that_decides_for_its_batch_is_found_wherever_it_is(decisive: int) -> None:
    x, tokens = torch.rand(4, 6), torch.randint(1, 9, (4, 12))
    x[decisive] *= 4
    for i, length in enumerate((3, 4, 5, 6)):
        tokens[i, 9 if i == decisive else length :] = 0
    for model, inputs in ((ByTheLargest(), x), (Trimmed(), tokens)):
        plan = plan_segments(model, split_levels(model, {"a": ["a"], "b": ["b"]}), inputs)
        assert plan.usable == (True, False), plan.reason


class Tied(Looping):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) @ (self.a.weight * 2))


class HiddenTied(Looping):
    """Tied where tracing does not see it: it would compute the product once and for all."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) @ (self.a._parameters["weight"] * 2))


@pytest.mark.parametrize(("kind", "mechanism"), [(Tied, "fx"), (HiddenTied, "replay")])
def test_weights_used_outside_their_module_are_never_baked_in(
    kind: type[Looping], mechanism: str
) -> None:
    model, inputs = kind(), torch.randn(N, 6)
    plan = plan_segments(model, split_levels(model, {"a": ["a"], "b": ["b"]}), inputs)
    assert (plan.mechanism, plan.usable) == (mechanism, (True, True))
    with torch.no_grad():
        model.a.weight.add_(1)
        values = plan.forward(plan.start(inputs), 0, 1)
        torch.testing.assert_close(plan.output(values, 1), model(inputs))


def test_values_that_depend_on_levels_above_are_not_cached() -> None:
    class Backwards(Looping):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x + (self.b._parameters["bias"] * 1).mean()))

    model = Backwards()
    plan = plan_segments(model, split_levels(model, {"a": ["a"], "b": ["b"]}), torch.randn(N, 6))
    assert plan.usable == (True, False)
    assert "use weights of levels above" in plan.reason


def test_replay_refuses_a_second_call_that_the_example_did_not_make() -> None:
    class Sometimes(Looping):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if (x > 1e3).any():
                x = self.a(x)
            return self.b(x)

    model, inputs = Sometimes(), torch.randn(N, 6)
    plan = plan_segments(model, split_levels(model, {"a": ["a"], "b": ["b"]}), inputs)
    assert plan.mechanism == "replay"
    values = plan.forward(plan.start(inputs), 0, 1)
    values["a"] = values["a"] + 1e4
    with pytest.raises(StageError, match="called once"):
        plan.output(values, 1)


def test_replay_keeps_only_what_the_rest_looks_at() -> None:
    _, _, plan, inputs = _planned(CASES["torch_transformer"])
    values = plan.forward(plan.start(inputs), 0, 4)
    assert set(values) == {"input0", "input1", "encoder.layers.2"}


def test_nested_states_have_their_own_batch_dimension() -> None:
    _, _, plan, inputs = _planned(CASES["lstm"])
    values = plan.forward(plan.start(inputs), 0, 2)
    assert sorted(tuple(v.shape) for v in values.values()) == [(1, N, 12), (1, N, 12), (N, 5, 12)]
    assert plan.n_bytes(values) == (2 * N * 12 + N * 5 * 12) * 4


@pytest.mark.parametrize("channels", [1, 3])
def test_take_keeps_channels_last(channels: int) -> None:
    model = cnn()
    model[0] = nn.Conv2d(channels, 8, 3, padding=1)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.empty_strided((N, channels, 16, 16), (256 * channels, 1, 16 * channels, channels))
    x = x.copy_(torch.randn(N, channels, 16, 16))
    plan = plan_segments(model, split_levels(model, FOUR), x)
    index = torch.tensor([2, 0])
    taken = plan.take(plan.start(x), index, 0)
    assert taken["x"].stride() == x.stride()
    with torch.no_grad():
        values = plan.forward(taken, 0, 1)
        (kept,) = plan.take(plan.join([values, values], 1), index, 1).values()
    assert kept.stride(1) == 1
    torch.testing.assert_close(plan.output(taken, 0), model(x[index]))


def test_baked_sizes_refuse_other_shapes() -> None:
    *_, plan, _ = _planned(CASES["torch_transformer"])
    with pytest.raises(InputError, match="shape that the plan was made for"):
        plan.start({"tokens": torch.zeros(2, 9).long(), "padding": torch.zeros(2, 9).bool()})


def test_convolutional_model_takes_other_sizes() -> None:
    model, _, plan, _ = _planned(CASES["unet"])
    model.eval()
    x = torch.randn(2, 3, 12, 12)
    values = plan.forward(plan.start(x), 0, 2)
    torch.testing.assert_close(plan.output(values, 2), model(x))


def test_single_level_and_single_example() -> None:
    model = Lstm()
    plan = plan_segments(model, split_levels(model, {"all": [""]}), torch.zeros(1, 5).long())
    assert (plan.n_levels, plan.usable, plan.reason) == (1, (True,), "")
