"""The engine: carries out one stage at a time, deterministically, on one device.

A stage trains some levels from a given model state and evaluates the result on val. Which stages
are carried out, where their weights are kept and who waits for them is `stage_tree`'s business.
"""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_ray.digests import derive_seed, source_digest, tensor_digest
from rlhf_ray.engine.alignment import output_moments, weighted_modules
from rlhf_ray.engine.costs import FlopModel, StageFlops, stage_flops, start_flops
from rlhf_ray.engine.descriptors import (
    SourceMoments,
    activation_shift,
    gradient_norms,
    level_moments,
)
from rlhf_ray.engine.loaded_model import EngineSettings, Load, LoadedModel
from rlhf_ray.engine.prices import StagePrices, flop_table
from rlhf_ray.engine.segments import SegmentPlan
from rlhf_ray.engine.splits import SplitData
from rlhf_ray.engine.stage_session import Session
from rlhf_ray.errors import InputError
from rlhf_ray.isolation import apart, beside, restored_buffers, seed_all
from rlhf_ray.levels import model_digest, split_levels
from rlhf_ray.operations import Operation
from rlhf_ray.outcomes import (
    PRETRAINED,
    Identity,
    LevelState,
    Outcome,
    StageRequest,
)
from rlhf_ray.tasks import Inputs, Metric, Suite, Task, input_tensors, n_examples

FEW_NUMBERS = 1 << 16
"""Outputs up to here are looked at on the CPU, whatever the device: launches would take longer."""

P = ParamSpec("P")
Returned = TypeVar("Returned")


def suite_identity(suite: Suite, settings: EngineSettings) -> Identity:
    """What all keys of a suite have in common."""
    split = split_levels(suite.model, suite.levels)
    return Identity(
        model=model_digest(suite.model, split),
        levels=split.names,
        tasks={task.name: task.digest for task in suite.tasks()},
        precision=settings.precision,
        val_size=settings.val_size,
        source="" if suite.source is None else tensor_digest(input_tensors(suite.source)),
    )


def _set_apart(
    method: Callable[Concatenate["Engine", P], Returned],
) -> Callable[Concatenate["Engine", P], Returned]:
    """Keeps the caller's modes out of a method, and their random state as it was."""

    @functools.wraps(method)
    def inside(self: "Engine", *args: P.args, **kwargs: P.kwargs) -> Returned:
        with apart(self._loaded.device), beside(self._stream):
            return method(self, *args, **kwargs)

    return inside


class Engine:
    """Carries out the stages of one suite. Not thread-safe: one engine per worker.

    Args:
        suite: its model is copied, not touched.
        settings: see `EngineSettings`.
        source_moments: activation moments on the source data, where the suite holds none of it.
        carries_out: False: it prices stages and looks at source data, no more, and does so on the
            CPU where this machine lacks the device that the settings ask for.

    Raises:
        InputError: this machine lacks that device.
    """

    def __init__(
        self,
        suite: Suite,
        settings: EngineSettings | None = None,
        *,
        source_moments: SourceMoments | None = None,
        carries_out: bool = True,
    ) -> None:
        self.settings = settings or EngineSettings()
        self.identity = suite_identity(suite, self.settings)
        self.n_levels = len(self.identity.levels)
        self._suite = suite
        here = self.settings if carries_out else self.settings.on_this_machine()
        here.check_device()
        # autograd remembers on which stream it met a parameter first: all must be on one, and
        # graphs are not captured on the default one
        on_cuda = here.torch_device.type == "cuda"
        self._stream = torch.cuda.Stream() if on_cuda else None
        with apart(here.torch_device), beside(self._stream):
            self._loaded = LoadedModel(suite, here)
        self._flop_models: dict[str, FlopModel] = {}
        self._flop_models_alike: dict[tuple[object, ...], FlopModel] = {}
        self._source = source_moments

    @property
    def plan(self) -> SegmentPlan:
        """How the model is cut at its level boundaries, and what could not be cached."""
        return self._loaded.plan

    # -- what is asked of an engine ------------------------------------------------------------

    @_set_apart
    def start(self, request: StageRequest) -> Outcome:
        """The pretrained model on a task: figures on val, and the probes of the observation.

        Raises:
            InputError: a figure is NaN or infinite: nothing could be gained on it.
        """
        source = self.source_moments()  # made once: of no stage's time
        flops = _flops(self._ledger(request))
        began = time.perf_counter()
        task = self._suite.task(request.task)
        pretrained = (PRETRAINED,) * self.n_levels
        self._loaded.load(pretrained, load=None)
        val = self._loaded.data(task, "val")
        with self._evaluating(self.identity.key(request)):
            with level_moments(self._loaded.model, self._loaded.split) as moments:
                outputs = self._loaded.outputs(task, val, pretrained, fresh=True)
            metric, loss, entropy = self._figures(task, outputs, val)
        if not all(map(math.isfinite, (metric, loss, entropy))):
            raise InputError(
                f"task {task.name!r}: the pretrained model's figures on val must be finite, got "
                f"metric={metric}, loss={loss}, entropy={entropy}."
            )
        with self._evaluating(self.identity.key(request)):
            gradient, probe_loss = self._gradient_probe(task)
        return Outcome(
            key=self.identity.key(request),
            metric=metric,
            loss=loss,
            entropy=entropy,
            train_loss=probe_loss,
            flops=flops,
            time_s=time.perf_counter() - began,
            versions=pretrained,
            descriptors={
                "gradient_norm": gradient,
                **activation_shift(moments(), source.levels if source else None),
            },
            meta=self._meta,
        )

    @_set_apart
    def run(
        self, request: StageRequest, parent: Outcome, load: Load
    ) -> tuple[Outcome, dict[int, LevelState]]:
        """Carries out the last stage of a path.

        Args:
            request: kind "stage", with a path.
            parent: outcome of the state the stage starts from.
            load: gives the level states that `parent.versions` names.

        Returns:
            The outcome, and the states of the levels that the stage changed (CPU tensors; none if
            it diverged).
        """
        source = self.source_moments()  # asks the pretrained model, so before the state is loaded
        began = time.perf_counter()
        task = self._suite.task(request.task)
        key = self.identity.key(request)
        step = request.path[-1]
        self._loaded.load(parent.versions, load)
        session = Session(
            self._loaded,
            task,
            step.levels,
            parent,
            load,
            key,
            derive_seed("stage", self.identity.drawn_by(request)),
            source.outputs if source else {},
        )
        self._loaded.mark(step.levels, None)  # dirty until the stage has ended well
        session.carry_out(step.operation)
        versions = session.versions()
        for level in step.levels:  # those that it left as they were
            if level not in session.changed:
                self._loaded.mark((level,), versions[level])
        figures = self._after(session, task, key, parent)
        diverged = figures is None
        if diverged:  # what is asked of the model next finds weights that are finite
            self._loaded.load(parent.versions, load)
        else:
            self._loaded.mark(session.changed, key)
        train_loss = parent.train_loss if diverged else session.train_loss()
        states = {} if diverged else session.states()
        time_s = time.perf_counter() - began
        metric, loss, entropy = figures or (parent.metric, parent.loss, parent.entropy)
        outcome = Outcome(
            key=key,
            metric=metric,
            loss=loss,
            entropy=entropy,
            train_loss=train_loss,
            diverged=diverged,
            flops=_flops(self._ledger(request, session.changed), session.charged),
            time_s=time_s,
            versions=parent.versions if diverged else versions,
            meta=self._meta,
        )
        return outcome, states

    def _after(
        self, session: Session, task: Task, key: str, parent: Outcome
    ) -> tuple[float, float, float] | None:
        """Figures on val after a stage; None: it diverged.

        All that a GPU shall do is asked for before the first of its answers is waited for, so that
        there a state that is not finite is evaluated, too. A kernel that fails over it costs the
        worker its process, as one in a training step does.
        """
        largest = session.largest()
        finite = functools.cache(lambda: math.isfinite(largest))  # asking waits for the GPU
        if largest.is_cpu and not finite():
            return None
        if not session.changed:
            return (parent.metric, parent.loss, parent.entropy) if finite() else None
        val = self._loaded.data(task, "val")
        figures = None
        with self._evaluating(key):
            try:
                outputs = self._loaded.outputs(task, val, session.versions())
            except Exception:  # whatever a model's code makes of weights that are not finite
                if finite():
                    raise
            else:
                if finite():
                    figures = self._figures(task, outputs, val)
        if figures is None or not all(map(math.isfinite, figures)):
            self._loaded.forget(key, above=0)
            return None
        return figures

    @_set_apart
    def test(self, request: StageRequest, state: Outcome, load: Load) -> Outcome:
        """The test figures of a state: a report, not charged."""
        began = time.perf_counter()
        task = self._suite.task(request.task)
        self._loaded.load(state.versions, load)
        test = self._loaded.data(task, "test")
        with self._evaluating(self.identity.key(request)):
            outputs = self._loaded.outputs(task, test, state.versions, keep=False)
            metric, loss, entropy = self._figures(task, outputs, test)
        return Outcome(
            key=self.identity.key(request),
            kind="test",
            metric=metric,
            loss=loss,
            entropy=entropy,
            time_s=time.perf_counter() - began,
            meta=self._meta,
        )

    @_set_apart
    def state_dict(self, state: Outcome, load: Load) -> dict[str, Tensor]:
        """A state's weights as the suite's model names them, on the CPU."""
        self._loaded.load(state.versions, load)
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self._loaded.state.items()
        }

    @_set_apart
    def reference_flops(self) -> float:
        """FLOPs of a full stage, the unit of cost.

        Raises:
            InputError: there are none.
        """
        flops = self._flop_model(self._suite.train_tasks[0])
        found = flops.full_stage(self.settings.reference_steps, self.settings.reference_batch_size)
        if not found:
            raise InputError("a full stage must cost something, got a model without a matrix "
                             "product or a convolution: no FLOPs to count.")  # fmt: skip
        return found

    @_set_apart
    def prices(self, operations: Sequence[Operation]) -> StagePrices:
        """What stages will cost: those of some operations, and any of neighbouring levels."""
        n = self.n_levels
        level_sets = {tuple(range(*ends)) for ends in itertools.combinations(range(n + 1), 2)}
        level_sets |= {
            o.levels(level, n) for o in operations for level in range(n) if o.applies(level, n)
        } - {()}
        aligned = {
            levels
            for o in operations
            if "source" in o.needs  # counting decomposes covariances: only where it is asked for
            for level in range(n)
            if o.applies(level, n)
            for levels, _ in o.passes(o.levels(level, n), 1)
        }
        models = {task.name: self._flop_model(task) for task in self._suite.tasks()}
        tables = {model: flop_table(model, level_sets, aligned) for model in set(models.values())}
        return StagePrices(
            tables={task: tables[model] for task, model in models.items()},
            sizes={task.name: self._sizes(task) for task in self._suite.tasks()},
        )

    # -- accounts and probes -------------------------------------------------------------------

    def _flop_model(self, task: Task) -> FlopModel:
        if task.digest not in self._flop_models:
            x, y = task.train
            tensors = [*input_tensors(x).items(), ("", y)]
            shapes = tuple((name, value.dtype, value.shape[1:]) for name, value in tensors)
            alike = (source_digest(task.loss), *shapes)
            if alike not in self._flop_models_alike:
                self._flop_models_alike[alike] = FlopModel(
                    self.plan, self._loaded.model, self._loaded.split, task
                )
            self._flop_models[task.digest] = self._flop_models_alike[alike]
        return self._flop_models[task.digest]

    def _sizes(self, task: Task) -> tuple[int, int]:
        """Train examples, and val examples that decisions use."""
        return n_examples(task.train[0]), min(n_examples(task.val[0]), self.settings.val_size)

    def _ledger(self, request: StageRequest, changed: tuple[int, ...] | None = None) -> StageFlops:
        """The account of a request; of its levels only those that changed are evaluated anew."""
        task = self._suite.task(request.task)
        n_train, n_val = self._sizes(task)
        flops = self._flop_model(task)
        if not request.path:
            return start_flops(flops, n_val, n_probe=min(self.settings.probe_size, n_train))
        last = request.path[-1]
        found = stage_flops(
            flops,
            [step.operation.passes(step.levels, n_train) for step in request.path],
            n_train=n_train,
            n_val=n_val,
            own=last.operation.flops(flops, last.levels, n_train),
        )
        if changed in (None, last.levels):
            return found
        end = flops.plan.n_levels
        start = flops.plan.nearest(min(changed)) if changed else end
        return replace(found, evaluate=n_val * flops.forward(start, end))

    def _gradient_probe(self, task: Task) -> tuple[tuple[float, ...], float]:
        train = self._loaded.data(task, "train")
        generator = torch.Generator().manual_seed(derive_seed("probe", task.digest))
        loss = self._loaded.loss(task)
        chosen = torch.randperm(train.n, generator=generator)[: self.settings.probe_size]
        index = chosen.to(self._loaded.device)
        return gradient_norms(
            self._loaded.model,
            self._loaded.split,
            lambda: loss(
                self._loaded.output(self.plan.take(train.values, index, 0), 0),
                train.targets[index],
            ),
        )

    def _figures(self, task: Task, outputs: Tensor, data: SplitData) -> tuple[float, float, float]:
        """Metric, loss and relative predictive entropy of a whole split."""
        assert isinstance(task.metric, Metric)
        loss = float(self._loaded.loss(task)(outputs, data.targets.clone()))  # may write into them
        on_cpu = outputs.cpu()
        few = outputs.numel() <= FEW_NUMBERS
        entropy = _entropy(on_cpu if few else outputs, data.targets)
        # metrics may be written with NumPy
        metric = float(task.metric.function(on_cpu, data.targets_on_cpu.clone()))
        return metric, loss, entropy

    @contextlib.contextmanager
    def _evaluating(self, key: str) -> Iterator[None]:
        """Random draws that follow from a key; afterwards the model is as it was before."""
        self._loaded.forget_losses()
        seed_all(derive_seed("evaluation", key), self._loaded.device)
        with restored_buffers(self._loaded.model):
            yield

    def source_moments(self) -> SourceMoments | None:
        """Activation moments of the pretrained model on the source data (on the CPU), if any."""
        if self._suite.source is not None and self._source is None:
            self._source = self._moments_on(self._suite.source)
        return self._source

    @_set_apart
    def _moments_on(self, inputs: Inputs) -> SourceMoments:
        loaded = self._loaded
        loaded.load((PRETRAINED,) * self.n_levels, load=None)
        values = self.plan.start(loaded.place(inputs))
        modules = weighted_modules(loaded.model, loaded.split, range(self.n_levels))
        with (
            self._evaluating("source"),
            level_moments(loaded.model, loaded.split) as levels,
            output_moments(modules) as outputs,
            torch.no_grad(),
        ):
            self.plan.output(values, 0)
        return SourceMoments(levels=levels(), outputs=outputs())

    def release(self) -> None:
        """Gives back what memory it can: for a device that others need, or that is full."""
        self._loaded.release()

    @functools.cached_property
    def _meta(self) -> dict[str, str]:
        device = str(self._loaded.device)
        if self._loaded.device.type == "cuda":
            device = torch.cuda.get_device_name(self._loaded.device)
        return {"device": device, "torch": str(torch.__version__)}


def _entropy(outputs: Tensor, targets: Tensor) -> float:
    """Mean predictive entropy over its maximum, in [0, 1]; 0 where there are no classes."""
    if outputs.dim() < 2 or outputs.shape[1] < 2 or targets.is_floating_point():
        return 0.0
    log_p = F.log_softmax(outputs, dim=1)
    # classes that are masked out (-inf) count for nothing
    parts = log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return float(-parts.sum(1).mean()) / math.log(outputs.shape[1])


def _flops(stage: StageFlops, charged: float = 0.0) -> dict[str, float]:
    return {
        "train": stage.train + charged,
        "fill": stage.fill,
        "evaluate": stage.evaluate,
        "probe": stage.probe,
    }
