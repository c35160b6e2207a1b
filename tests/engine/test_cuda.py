"""The CUDA path of the engine: the same stages, bf16, and nothing that leaves the device.

On a GPU where there is one, else on `simulated_cuda`: every tensor must be where it belongs.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import zoo
from simulated_cuda import cuda_device
from test_stages import path_of, suite_of
from torch import nn

from rlhf_ray.engine import fitting
from rlhf_ray.engine.batches import Examples, batch_order
from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.engine.training import make_optimizer, train_steps
from rlhf_ray.operations import Align, Fit, Operation, OptimizerName, Refit, Train
from rlhf_ray.outcomes import Outcome, StageRequest, StageStep
from rlhf_ray.tasks import Suite, Task, map_inputs
from rlhf_ray.tree.stage_tree import LocalStages

pytestmark = pytest.mark.gpu
CPU = EngineSettings(device="cpu", val_size=10, probe_size=6)
CUDA = dataclasses.replace(CPU, device="cuda")
WITHOUT_DROPOUT = ("cnn2", "cnn4", "lstm", "transformer_plain", "unet", "resnet18")
REQUEST = StageRequest(task="task", path=path_of((0,), (1,), (0, 1)))


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with cuda_device():
        yield


def without_dropout(name: str) -> zoo.Case:
    case = zoo.CASES["torch_transformer" if name == "transformer_plain" else name]
    if name == "transformer_plain":
        case = dataclasses.replace(case, model=lambda: zoo.TorchTransformer(dropout=0.0))
    return case


def stages_of(name: str, settings: EngineSettings) -> LocalStages:
    return LocalStages(Engine(suite_of(without_dropout(name)), settings))


def carried_out(stages: LocalStages) -> tuple[Outcome, dict[str, torch.Tensor]]:
    return stages.outcome(REQUEST).outcome, stages.state_dict(REQUEST)


def in_float64(suite: Suite) -> Suite:
    """A suite whose figures rounding does not move: batch norm of eight images amplifies it."""

    def wide(value: torch.Tensor) -> torch.Tensor:
        return value.double() if value.is_floating_point() else value

    def widened(task: Task) -> Task:
        splits = {name: task.split(name) for name in ("train", "val", "test")}
        wider = {name: (map_inputs(wide, x), wide(y)) for name, (x, y) in splits.items()}
        return dataclasses.replace(task, **wider)

    return dataclasses.replace(
        suite,
        model=suite.model.double(),
        train_tasks=[widened(task) for task in suite.train_tasks],
        source=None if suite.source is None else map_inputs(wide, suite.source),
    )


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)  # its masks are drawn on the device
def test_stages_on_cuda_are_those_on_the_cpu(name: str) -> None:
    found = []
    for settings in (CUDA, CPU):
        suite = in_float64(suite_of(without_dropout(name)))
        found.append(carried_out(LocalStages(Engine(suite, settings))))
    (cuda, weights), (cpu, expected) = found
    assert cuda.loss == pytest.approx(cpu.loss, rel=1e-6)
    assert (cuda.flops, cuda.key) == (cpu.flops, cpu.key)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_bf16_trains_fp32_weights_close_to_those_of_fp32(name: str) -> None:
    half = stages_of(name, dataclasses.replace(CUDA, precision="bf16"))
    (found, weights), (full, _) = carried_out(half), carried_out(stages_of(name, CUDA))
    assert found.loss == pytest.approx(full.loss, rel=0.1)
    assert found.key != full.key
    assert all(v.dtype == torch.float32 for v in weights.values() if v.is_floating_point())


def test_bf16_ends_before_the_loss() -> None:
    half = stages_of("cnn4", dataclasses.replace(CUDA, precision="bf16"))
    loaded = half.engine._loaded  # type: ignore[attr-defined]
    with torch.no_grad():
        data = loaded.data(suite_of(zoo.CASES["cnn4"]).train_tasks[0], "val")
        with loaded.autocast():
            kept = loaded.plan.forward(data.values, 0, 2)
        assert {value.dtype for value in kept.values()} == {torch.bfloat16}
        assert loaded.output(kept, 2).dtype == torch.float32


WHOLE = (
    Align(name="align", examples=8, margin=-1),
    Fit(name="fit", evaluations=20),
    Refit(name="refit", examples=8, margin=-1, evaluations=20),
)


@pytest.mark.parametrize("fit_on_cpu_up_to", [fitting.CPU_PRODUCTS, 0])
@pytest.mark.parametrize("operation", WHOLE, ids=lambda operation: operation.name)
@pytest.mark.parametrize("name", ["cnn4", "transformer_plain"])
def test_operations_without_a_rate_do_on_cuda_what_they_do_on_the_cpu(
    name: str, operation: Operation, fit_on_cpu_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "CPU_PRODUCTS", fit_on_cpu_up_to)
    found = []
    for settings in (CUDA, CPU, dataclasses.replace(CUDA, precision="bf16")):
        stages = stages_of(name, settings)
        n_levels = stages.engine.n_levels  # type: ignore[attr-defined]
        step = StageStep(operation=operation, levels=operation.levels(0, n_levels))
        found.append(stages.outcome(StageRequest(task="task", path=(step,))).outcome)
    cuda, cpu, half = found
    assert not cuda.diverged and cuda.loss == pytest.approx(cpu.loss, rel=2e-2)
    assert (cuda.flops, cuda.key) == (cpu.flops, cpu.key)
    assert not half.diverged and half.loss == pytest.approx(cuda.loss, rel=0.2)


def test_moments_of_a_policys_file_weights_of_a_loss_and_metrics_in_numpy_will_do() -> None:
    suite = suite_of(zoo.CASES["cnn4"])
    moments = Engine(suite, CPU).source_moments()
    (task,) = suite.train_tasks
    n_classes = int(task.train[1].max()) + 1
    weighted = torch.nn.CrossEntropyLoss(weight=torch.arange(1.0, 1.0 + n_classes))

    def correct(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        return float((outputs.numpy().argmax(1) == targets.numpy()).mean())

    task = dataclasses.replace(task, loss=weighted, metric=correct)
    suite = dataclasses.replace(suite, train_tasks=[task], source=None)
    for operation in (REQUEST.path[0].operation, *WHOLE):
        step = StageStep(operation=operation, levels=operation.levels(0, len(suite.levels)))
        request = StageRequest(task="task", path=(step,))
        found = [
            LocalStages(Engine(suite, settings, source_moments=moments)).outcome(request).outcome
            for settings in (CUDA, CPU)
        ]
        assert found[0].loss == pytest.approx(found[1].loss, rel=2e-2)
        assert found[0].flops == found[1].flops


def test_data_and_weights_lie_on_the_device_and_states_on_the_cpu() -> None:
    stages = stages_of("cnn4", CUDA)
    _, weights = carried_out(stages)
    loaded = stages.engine._loaded  # type: ignore[attr-defined]
    assert {value.device.type for value in loaded.state.values()} == {CUDA.device}
    for data in loaded._splits.kept:
        assert {v.device.type for v in (*data.values.values(), data.targets)} == {CUDA.device}
    assert {value.device.type for value in weights.values()} == {"cpu"}


def test_what_is_kept_is_in_the_order_of_a_file() -> None:
    stages = stages_of("cnn4", CUDA)
    _, weights = carried_out(stages)
    assert all(value.is_contiguous() for value in weights.values())


def placed(suite: Suite, model: str, data: str) -> Suite:
    """A suite whose tensors lie where a user may have put them."""

    def moved(task: Task) -> Task:
        splits = {
            name: (map_inputs(lambda value: value.to(data), x), y.to(data))
            for name in ("train", "val", "test")
            for x, y in [task.split(name)]
        }
        n_classes = int(task.train[1].max()) + 1
        loss = torch.nn.CrossEntropyLoss(weight=torch.arange(1.0, 1.0 + n_classes, device=data))
        return dataclasses.replace(task, **splits, loss=loss)

    return dataclasses.replace(
        suite,
        model=suite.model.to(model),
        train_tasks=[moved(task) for task in suite.train_tasks],
        source=None if suite.source is None else map_inputs(lambda x: x.to(data), suite.source),
    )


@pytest.mark.parametrize("name", ["cnn4", "lstm", "torch_transformer"])
def test_a_users_model_and_data_may_lie_anywhere(name: str) -> None:
    found = []
    for model, data, engine in itertools.product(("cpu", "cuda"), ("cpu", "cuda"), (CPU, CUDA)):
        suite = placed(suite_of(zoo.CASES[name]), model, data)
        outcome, weights = carried_out(LocalStages(Engine(suite, engine)))
        assert next(suite.model.parameters()).device.type == model
        assert {value.device.type for value in weights.values()} == {"cpu"}
        found.append(outcome)
    assert len({outcome.key for outcome in found}) == 1
    assert [o.loss for o in found] == pytest.approx([found[0].loss] * 8, rel=1e-2)


def test_a_suite_on_the_device_travels_to_machines_without_one() -> None:
    suite = placed(suite_of(zoo.CASES["cnn4"]), "cuda", "cuda")
    there = suite.on_cpu()
    (task,), (sent,) = suite.train_tasks, there.train_tasks
    assert sent.digest == task.digest
    assert Engine(there, CPU).identity == Engine(suite, CUDA).identity
    assert there.source is not None and isinstance(sent.loss, torch.nn.CrossEntropyLoss)
    tensors = [*there.model.state_dict().values(), there.source, sent.loss.weight]
    tensors += [value for split in ("train", "val", "test") for value in sent.split(split)]
    assert {value.device.type for value in tensors} == {"cpu"}
    assert next(suite.model.parameters()).is_cuda and task.train[1].is_cuda  # as they were


def test_released_memory_is_the_devices_again() -> None:
    stages = stages_of("cnn4", CUDA)
    expected, _ = carried_out(stages)
    before = torch.cuda.memory_allocated()
    stages.release()
    assert torch.cuda.memory_allocated() < before
    again = StageRequest(task="task", replica=1, path=REQUEST.path)
    assert stages.outcome(again).outcome.loss == pytest.approx(expected.loss, rel=0.5)


def test_tensors_of_a_partial_are_on_the_device_with_the_outputs() -> None:
    suite = suite_of(zoo.CASES["cnn4"])
    (task,) = suite.train_tasks
    weight = torch.ones(int(task.train[1].max()) + 1)
    loss = functools.partial(torch.nn.functional.cross_entropy, weight=weight)
    suite = dataclasses.replace(suite, train_tasks=[dataclasses.replace(task, loss=loss)])
    assert not LocalStages(Engine(suite, CUDA)).outcome(REQUEST).outcome.diverged


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_steps_never_wait_for_the_device(optimizer: OptimizerName) -> None:
    model = torch.nn.Linear(6, 4, device=CUDA.device)
    x, y = torch.randn(32, 6, device=CUDA.device), torch.arange(32, device=CUDA.device) % 4
    settings = Train(name="train", learning_rate=1e-2, optimizer=optimizer)
    order = batch_order(32, 6, 8, torch.Generator().manual_seed(0), device=x.device)
    made = make_optimizer(optimizer, dict(model.named_parameters()), 1e-2)
    examples = Examples(
        values={"": x},
        boundary=0,
        targets=y,
        select=lambda values, index: {"": values[""].index_select(0, index)},
    )

    def steps(n: int) -> torch.Tensor:
        batches = (next(order) for _ in range(n))
        return train_steps(
            settings,
            optimizer=made,
            batches=batches,
            examples=examples,
            output=lambda values: model(values[""]),
            loss=F.cross_entropy,
        )

    steps(2)  # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = steps(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


class Strict(nn.Linear):
    """A layer whose code refuses what is not finite while it is evaluated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and not x.isfinite().all():
            raise ValueError("not finite")
        return super().forward(x)


@pytest.mark.parametrize("settings", [CUDA, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("levels", [(0, 1), (0,)])  # FLOPs of the second are not counted before
def test_a_stage_that_diverges_is_an_outcome_whatever_the_models_code_makes_of_it(
    settings: EngineSettings, levels: tuple[int, ...]
) -> None:
    case = zoo.Case(
        lambda: nn.Sequential(nn.Linear(6, 8), Strict(8, 3)), {"first": ["0"], "head": ["1"]},
        lambda n: 1000 * torch.randn(n, 6), lambda n: torch.arange(n) % 3, "fx",
    )  # fmt: skip
    bad = Train(name="bad", learning_rate=3e38, steps=6, batch_size=8, optimizer="sgd")
    good = Train(name="good", learning_rate=1e-2, steps=2, batch_size=8)
    if levels == (0,):  # the head is evaluated while it is trained
        bad = dataclasses.replace(bad, steps=1)
    stages = LocalStages(Engine(suite_of(case), settings))
    path = path_of(levels, operation=bad)
    diverged, after = (
        stages.outcome(StageRequest(task="task", path=p)).outcome
        for p in (path, path + path_of((0,), operation=good))
    )
    assert diverged.diverged and not after.diverged
    assert diverged.key not in after.versions
    kept = stages.engine._loaded._activations._kept  # type: ignore[attr-defined]
    assert not any(diverged.key in key[-1] for key in kept)


@pytest.mark.parametrize("settings", [CUDA, CPU], ids=["cuda", "cpu"])
def test_strides_do_not_hang_on_how_a_users_images_lie(settings: EngineSettings) -> None:
    images = torch.randn(8, 1, 6, 6)
    turned = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    suite = suite_of(zoo.CASES["cnn2"])
    loaded = Engine(suite, settings)._loaded
    placed = [loaded.place(value) for value in (images, turned)]
    plain, last = (36, 36, 6, 1), (36, 1, 6, 1)
    for value in placed:
        assert isinstance(value, torch.Tensor)
        assert value.stride() == (plain if settings is CUDA else last)


def test_optimizer_state_leaves_the_device_before_the_evaluation_without_graphs() -> None:
    seen: list[int] = []

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(500, 500), nn.Linear(500, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(x))

    case = zoo.Case(
        Wide, {"first": ["first"], "head": ["head"]},
        lambda n: torch.randn(n, 500), lambda n: torch.arange(n) % 3, "fx",
    )  # fmt: skip
    settings = dataclasses.replace(CUDA, cuda_graphs=False)
    engine = Engine(suite_of(case), settings)
    start = engine.start(StageRequest(task="task"))
    operation = Train(name="train", learning_rate=1e-3, steps=2, batch_size=8)
    requests = [StageRequest(task="task", replica=replica, path=path_of((0,), operation=operation))
                for replica in (0, 1)]  # fmt: skip
    engine.run(requests[0], start, None)  # type: ignore[arg-type]  # libraries take memory, too
    outputs = engine._loaded.outputs

    def noted(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append(torch.cuda.memory_allocated())
        return outputs(*args, **kwargs)  # type: ignore[arg-type]

    engine._loaded.outputs = noted  # type: ignore[method-assign]
    before = torch.cuda.memory_allocated()
    _, states = engine.run(requests[1], start, None)  # type: ignore[arg-type]
    assert any(entry.startswith("exp_avg/") for entry in states[0].optimizer)
    assert seen[0] - before < 4 * 500 * 500  # one moment
