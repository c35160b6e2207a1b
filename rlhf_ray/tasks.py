"""Tasks and suites: what is adapted, to which data, judged by which metric.

Checks everything a user can get wrong about data here, before any work starts. What a level is
stands in `levels`; how a suite is trained on stands in `stages`.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.digests import digest, source_digest, tensor_digest
from rlhf_ray.errors import InputError, in_one_line, unknown_name
from rlhf_ray.isolation import apart, restored_buffers
from rlhf_ray.levels import split_levels

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model is called with: `model(x)`, `model(*x)` or `model(**x)`; batch dimension first."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> scalar, a mean over the batch."""

SPLITS = ("train", "val", "test")

_CPU = torch.device("cpu")


def call_model(model: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """Calls a model with a tensor, a tuple (positional) or a dict (by keyword) of tensors."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(**inputs)


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Applies a function to every tensor of the inputs and keeps their form."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, tuple):
        return tuple(function(value) for value in inputs)
    return {name: function(value) for name, value in inputs.items()}


def input_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of the inputs by name ("x", or position, or keyword)."""
    if isinstance(inputs, Tensor):
        return {"x": inputs}
    if isinstance(inputs, tuple):
        return {str(i): value for i, value in enumerate(inputs)}
    return inputs


def n_examples(inputs: Inputs) -> int:
    """Size of the batch dimension."""
    return next(iter(input_tensors(inputs).values())).shape[0]


OTHER_FIGURES = ("cost", "switches", "stages", "utility")
"""What reports say of a fine-tuning besides its metric."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a task is judged by.

    Attributes:
        name: shown in tables.
        function: (outputs, targets) of a whole split -> number.
        higher_is_better: the metric's direction.

    Raises:
        InputError: a name that reports have for another figure.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor | float]
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.name in OTHER_FIGURES:
            raise InputError(
                "a metric's name must not be that of another figure of reports "
                f"({', '.join(OTHER_FIGURES)}), got name={self.name!r}. "
                "Give rlhf_ray.Metric(name=..., function=...)."
            )


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


accuracy = Metric(name="accuracy", function=_accuracy)
"""Share of arg-max predictions that are right; outputs (B, C, ...) against targets (B, ...)."""


def as_metric(metric: Metric | Callable[[Tensor, Tensor], Tensor | float]) -> Metric:
    """A plain function counts as a metric of which more is better."""
    if isinstance(metric, Metric):
        return metric
    return Metric(name=getattr(metric, "__name__", "metric"), function=metric)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Data, loss and metric: what one fine-tuning adapts to.

    Args:
        name: unique within its suite.
        train: (x, y) the weights are trained on. x: a tensor, or a tuple or dict of tensors, batch
            first, as the model takes it; y: a tensor, batch first.
        val: (x, y) that decisions are made on.
        test: (x, y) that reports are made on; never enters a decision.
        loss: (outputs, y) -> scalar mean; cross-entropy by default. A module is moved to the
            device; another callable must take outputs of any.
        metric: a `Metric`, or a function (outputs, y) -> number of which more is better; called
            with CPU tensors.
        label: which task a tabular observation takes it for; its name by default. Tasks of one
            label are one state, so that what was learned on one is used on the other.

    Raises:
        InputError: empty or mismatched data, NaN or infinite inputs or targets.
    """

    name: str
    train: tuple[Inputs, Tensor]
    val: tuple[Inputs, Tensor]
    test: tuple[Inputs, Tensor]
    loss: Loss = F.cross_entropy
    metric: Metric | Callable[[Tensor, Tensor], Tensor | float] = accuracy
    label: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a task's name must be a non-empty string, got name={self.name!r}.")
        if self.label is not None and not isinstance(self.label, str):
            raise InputError(f"a task's label must be a string, got label={self.label!r}.")
        object.__setattr__(self, "metric", as_metric(self.metric))
        for split in SPLITS:
            _check_split(self.name, split, getattr(self, split))

    @property
    def known_as(self) -> str:
        """The label, or the name of a task without one."""
        return self.label or self.name

    def split(self, name: str) -> tuple[Inputs, Tensor]:
        """The (x, y) of "train", "val" or "test"."""
        return getattr(self, name)

    @functools.cached_property
    def digest(self) -> str:
        """Identity by content: data, loss and metric; name and label do not count."""
        assert isinstance(self.metric, Metric)
        data = {
            f"{split}/{name}": value
            for split in SPLITS
            for name, value in _named_tensors(self.split(split)).items()
        }
        metric = [self.metric.name, self.metric.higher_is_better]
        code = [source_digest(self.loss), source_digest(self.metric.function)]
        return digest(tensor_digest(data), metric, code)


def loss_on(device: torch.device, task: Task) -> Loss:
    """A task's loss for outputs on a device: its tensors (class weights, say) are moved.

    Those of a module, and the arguments of a `functools.partial`.
    """
    return _moved(task.loss, device)


def _on_cpu(task: Task, there: Callable[[Tensor], Tensor]) -> Task:
    moved = copy.copy(task)  # its digest with it
    for split in SPLITS:
        x, y = task.split(split)
        object.__setattr__(moved, split, (map_inputs(there, x), there(y)))
    object.__setattr__(moved, "loss", loss_on(_CPU, task))
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, functools.partial):
        args = [_moved(arg, device) for arg in value.args]
        keywords = {name: _moved(arg, device) for name, arg in value.keywords.items()}
        return functools.partial(_moved(value.func, device), *args, **keywords)
    return value


def _named_tensors(data: tuple[Inputs, Tensor]) -> dict[str, Tensor]:
    x, y = data
    return {**{f"x/{name}": value for name, value in input_tensors(x).items()}, "y": y}


def _check_split(task: str, split: str, data: object) -> None:
    where = f"task {task!r}, {split}"
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)):
        y = f" whose y is {_kind(data[1])}" if isinstance(data, tuple) and len(data) == 2 else ""
        raise InputError(
            f"{where}: data must be a pair (x, y) with a tensor y, got {_kind(data)}{y}."
        )
    x, y = data
    if not isinstance(x, Tensor | tuple | dict) or not input_tensors(x):
        raise InputError(f"{where}: x must be a tensor, tuple or dict of tensors, got {_kind(x)}.")
    tensors = {"x": x, "y": y} if isinstance(x, Tensor) else _named_tensors((x, y))
    _check_tensors(where, tensors)
    for name, value in tensors.items():
        if value.shape[0] != y.shape[0]:
            raise InputError(f"{where}: x and y must have as many examples, got {name} with "
                             f"{value.shape[0]} and y with {y.shape[0]}.")  # fmt: skip


def _check_tensors(where: str, tensors: Mapping[str, object]) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise InputError(f"{where}: {name} must be a tensor with a batch dimension, "
                             f"got {_kind(value)}.")  # fmt: skip
        if value.shape[0] == 0:
            raise InputError(f"{where}: data must not be empty, got {name} of shape "
                             f"{tuple(value.shape)}.")  # fmt: skip
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{where}: values must be finite, got NaN or infinity in {name}.")


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """A pretrained model, its levels, and three sets of tasks.

    Args:
        name: names the sweep's folder and appears in reports.
        model: any `nn.Module` that maps a task's x to outputs, batch first; left as and where it
            is: stages run on a copy, wherever model and data lie.
        levels: ordered, input side first: level name -> names of the model's modules. Parameters
            that require no gradient stay as they are, unless the whole model is frozen.
        train_tasks: policies learn on them.
        val_tasks: the sweep is judged on them.
        test_tasks: touched by the final report only.
        source: a sample of the pretraining inputs, for the observation's activation shift; or None.
        defaults: settings (`SearchConfig` fields) that this suite wants unless the user says else;
            in a `SearchConfig` a value that equals the package's own default says nothing.

    Raises:
        InputError: no tasks, names that repeat, levels that do not fit the model, data that the
            model or the loss cannot take.
    """

    name: str
    model: nn.Module
    levels: Mapping[str, Sequence[str]]
    train_tasks: Sequence[Task]
    val_tasks: Sequence[Task]
    test_tasks: Sequence[Task]
    source: Inputs | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usable = isinstance(self.name, str) and self.name not in {"", ".", ".."}
        if not usable or set(self.name) & set("/\\\0"):
            raise InputError(
                f"a suite's name must be usable as a folder's, got name={self.name!r}."
            )
        if not isinstance(self.model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {_kind(self.model)}.")
        split_levels(self.model, self.levels)
        names: set[str] = set()
        for role in SPLITS:
            tasks = getattr(self, f"{role}_tasks")
            if not isinstance(tasks, Iterable):
                hint = " Put it in a list." if isinstance(tasks, Task) else ""
                raise InputError(f"{role}_tasks must be a list of rlhf_ray.Task, got "
                                 f"{_kind(tasks)}.{hint}")  # fmt: skip
            tasks = tuple(tasks)
            object.__setattr__(self, f"{role}_tasks", tasks)
            if role == "train" and not tasks:  # a search wants all three, and says so
                raise InputError(f"suite {self.name!r} must have train tasks, got none.")
            for task in tasks:
                if not isinstance(task, Task):
                    raise InputError(f"{role}_tasks must hold rlhf_ray.Task, got {_kind(task)}.")
                if task.name in names:
                    raise InputError(f"task names must be unique, got {task.name!r} twice.")
                names.add(task.name)
                check_task(self.model, task)
        if self.source is not None:
            _check_source(self.model, self.source, self.train_tasks[0])

    def without_defaults(self, names: Iterable[str]) -> "Suite":
        """The same suite, but for its own defaults of settings that the user gave."""
        suite = copy.copy(self)
        kept = {name: value for name, value in self.defaults.items() if name not in set(names)}
        object.__setattr__(suite, "defaults", kept)
        return suite

    def on_cpu(self) -> "Suite":
        """The same suite, to travel to machines without a GPU; digests are those of this one.

        Tensors that functions close over stay where they are.
        """
        suite, moved = copy.copy(self), dict[int, Tensor]()

        def there(value: Tensor) -> Tensor:
            if id(value) not in moved:  # tasks may share what they hold
                moved[id(value)] = value.cpu()
            return moved[id(value)]

        object.__setattr__(suite, "model", _moved(self.model, _CPU))
        for role in SPLITS:
            tasks = tuple(_on_cpu(task, there) for task in getattr(self, f"{role}_tasks"))
            object.__setattr__(suite, f"{role}_tasks", tasks)
        if self.source is not None:
            object.__setattr__(suite, "source", map_inputs(there, self.source))
        return suite

    def tasks(self) -> Iterator[Task]:
        """All tasks: train, val, test."""
        for role in SPLITS:
            yield from getattr(self, f"{role}_tasks")

    def task(self, name: str) -> Task:
        """The task of a name.

        Raises:
            InputError: no such task; names the nearest.
        """
        for task in self.tasks():
            if task.name == name:
                return task
        raise unknown_name("task", name, (task.name for task in self.tasks()))


def check_task(model: nn.Module, task: Task) -> None:
    """Runs a model on two examples of each split, and holds loss and metric against its outputs.

    Raises:
        InputError: the model cannot take x, loss or metric cannot take (outputs, y) or give no
            number, labels out of range.
    """
    with looking(model):
        for split in SPLITS:
            _check_run(model, task, split)


def _check_source(model: nn.Module, source: object, task: Task) -> None:
    """Holds source data against the inputs of a task, and runs a model on two examples."""
    x = task.train[0]
    names = list(input_tensors(x))
    if type(source) is not type(x) or list(input_tensors(source)) != names:  # type: ignore[arg-type]
        raise InputError(
            f"source must be inputs like a task's x ({_kind(x)}), got {_kind(source)}."
        )
    _check_tensors("source", input_tensors(source))  # type: ignore[arg-type]
    with looking(model), _refused("the model must take the source data"):
        call_model(model, first_two(source, model_device(model)))  # type: ignore[arg-type]


def model_device(model: nn.Module) -> torch.device:
    """Where a model's parameters lie; the CPU if it has none."""
    return next((value.device for value in model.parameters()), _CPU)


def first_two(inputs: Inputs, device: torch.device) -> Any:
    """Copies of two examples on a device, or of the one that there is: a model may write there."""
    return map_inputs(lambda value: value[:2].to(device, copy=True), inputs)


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; the model, and random state, are left as they were."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with apart(model_device(model)), restored_buffers(model), torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def _check_run(model: nn.Module, task: Task, split: str) -> None:
    where = f"task {task.name!r}, {split}"
    x, y = task.split(split)
    with _refused(f"task {task.name!r}: model and loss must take its data", split):
        outputs = call_model(model, first_two(x, model_device(model)))
        if not isinstance(outputs, Tensor):
            raise InputError(f"{where}: the model must return a tensor, got {_kind(outputs)}.")
        ignored = _ignored_label(task.loss)
        if ignored is not None and not y.is_floating_point():
            _check_labels(task, split, outputs, ignored)
        regression = task.loss in _OF_ONE_SHAPE or isinstance(task.loss, _KINDS_OF_ONE_SHAPE)
        if regression and outputs.shape != y[:2].shape:
            raise InputError(
                f"{where}: outputs and y must have one shape, got {_per_example(outputs)} and "
                f"{_per_example(y)} per example."
            )
        outputs = outputs.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = loss_on(outputs.device, task)(outputs, first_two(y, outputs.device))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise InputError(f"{where}: the loss must be a scalar tensor, got {_kind(loss)}{shape}.")
    if not loss.requires_grad:
        raise InputError(f"{where}: the loss must be differentiable, got one without a gradient.")
    outputs = outputs.detach()
    classes = outputs.dim() > 1 and outputs.argmax(1).shape == y[:2].shape
    if task.metric is accuracy and not classes:
        raise InputError(
            f"{where}: accuracy needs outputs (N, C, ...) and class labels (N, ...), got "
            f"{_per_example(outputs)} and {_per_example(y)} per example. Give metric=."
        )
    assert isinstance(task.metric, Metric)
    with _refused(f"{where}: metric {task.metric.name!r} must take (outputs, y), give a number"):
        every = torch.arange(len(y)) % len(outputs)  # it may need more examples than two
        metric = float(task.metric.function(outputs.cpu()[every], y.to("cpu", copy=True)))
    if split == "train":  # which is not judged
        return
    if not math.isfinite(metric):
        raise InputError(
            f"{where}: metric {task.metric.name!r} must give a finite number, got {metric}."
        )
    if not math.isfinite(loss):  # that of two examples that count for nothing may be
        y = y.to(outputs.device, copy=True)
        loss = loss_on(outputs.device, task)(outputs[every.to(outputs.device)], y)
    if not math.isfinite(loss):
        raise InputError(f"{where}: the loss must be finite, got {float(loss)}.")


_OF_ONE_SHAPE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
_KINDS_OF_ONE_SHAPE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
"""Losses that broadcast outputs (N, 1) and targets (N,) to (N, N), with no more than a warning."""


def _per_example(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape[1:])


@contextlib.contextmanager
def _refused(requirement: str, where: str = "") -> Iterator[None]:
    """Turns whatever a user's code raises into one clear line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        place = f" on {where}" if where else ""
        raise InputError(f"{requirement}{place}, got {in_one_line(error)}") from error


def _ignored_label(loss: Any) -> int | None:
    """The label that a loss on class labels leaves out; None for other losses."""
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return loss.ignore_index
    inner = loss if isinstance(loss, functools.partial) else functools.partial(loss)
    known = inner.func in (F.cross_entropy, F.nll_loss)
    return inner.keywords.get("ignore_index", -100) if known else None


def _check_labels(task: Task, split: str, outputs: Tensor, ignored: int) -> None:
    y = task.split(split)[1]
    y = y[y != ignored]
    if not len(y):
        raise InputError(f"task {task.name!r}, {split}: there must be labels, got {ignored} alone.")
    if y.dtype not in (torch.int64, torch.uint8):
        raise InputError(f"task {task.name!r}, {split}: class labels must be int64, got {y.dtype}.")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= outputs.shape[1]:
        raise InputError(
            f"task {task.name!r}, {split}: labels must lie in [0, {outputs.shape[1] - 1}], the "
            f"model's classes, got labels from {low} to {high}."
        )
