"""`rr.finetune`: a policy fine-tunes one task, at once or with a short search. No Ray here."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.judging import Run, Utility, known, report, run_of
from rlhf_ray.evaluation.rollouts import Episode, TolerantStages, roll_out
from rlhf_ray.operations import Operation, operation_as_json, operations_from_json
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.policies.observations import Observer
from rlhf_ray.policies.policy import Policy
from rlhf_ray.policies.searching import guided
from rlhf_ray.process import ProcessSettings, ProcessSpec, State, Step, check_operations
from rlhf_ray.tasks import Metric, Suite, Task
from rlhf_ray.tree.stage_tree import LocalStages

METHOD = "policy"


@dataclass(frozen=True, kw_only=True, eq=False)
class FineTuned:
    """What `finetune` returns.

    Attributes:
        model: a tuned copy of the model, in eval mode, on the CPU.
        start_metric: val metric of the model as it was.
        val_metric: val metric of the returned model: the best on the path, the start included. On
            the val examples that decisions use: those of a larger split are drawn once per task,
            as many as in the policy's search (`val_size`, 256 by default).
        test_metric: its test metric; never entered a decision.
        start_test_metric: test metric of the model as it was.
        cost: tuning cost in full stages: training, evaluations, probes, cache fills; of everything
            that was tried, where it searched.
        search_cost: what of it was tried off the way to the returned model; 0 without a search.
        stages: stages that were carried out.
        switches: levels of distance handed over.
        trace: one record per step: level, operation, next level, val metric, cost, ...
        run: the same as one record, as reports hold it.
        failures: a line per stage that failed: it counts as one that diverged, at no cost.
    """

    model: nn.Module = field(repr=False)
    start_metric: float
    val_metric: float
    test_metric: float
    start_test_metric: float
    cost: float
    search_cost: float
    stages: int
    switches: int
    trace: tuple[Mapping[str, Any], ...] = field(repr=False)
    run: Run = field(repr=False)
    failures: tuple[str, ...] = ()


def process_spec(
    levels: Sequence[str],
    operations: Sequence[Operation],
    engine: Engine,
    metric: Metric,
    observer: Observer,
    settings: ProcessSettings,
) -> ProcessSpec:
    """The decision process of a suite's engine."""
    priced = settings.budget is not None and settings.cost == "flops"
    return ProcessSpec(
        levels=tuple(levels),
        operations=tuple(operations),
        reference_flops=engine.reference_flops(),
        higher_is_better=metric.higher_is_better,
        probed=observer.probed,
        settings=settings,
        price=engine.prices(operations) if priced else None,
    )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """CuDNN chooses kernels that give the same again; the caller's setting is put back."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@_deterministic()
def finetune(
    model: nn.Module,
    levels: Mapping[str, Sequence[str]],
    task: Task,
    policy: Policy | str | Path,
    *,
    replica: int = 0,
    search_stages: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    operations: Sequence[Operation] | None = None,
    on_step: Callable[[State, Step], None] | None = None,
) -> FineTuned:
    """Fine-tunes one task as a learned policy decides, or searches under its guidance. No Ray.

    Args:
        model: the pretrained model; left as it is.
        levels: level name -> module names, as the policy was learned with.
        task: what to adapt to; decisions use its val split, at most `val_size` examples of it.
        policy: from a search, or where one was saved (see `Policy.load`).
        replica: seed of the batches drawn, >= 0. Same replica, same result.
        search_stages: stages to try beyond those that the policy decides on, >= 0: what its values
            promise most, anywhere on the way. The best val metric that is met is returned.
        device: "auto", "cpu" or "cuda".
        operations: those the policy was learned with; needed for operations of your own only.
        on_step: called after each step of the policy's own decisions, not of a search, with the
            state it led to and its record.

    Returns:
        The tuned model with its figures and what was done.

    Raises:
        InputError: there is no such policy, or it was made for other levels, operations or
            features, or the model cannot take the task's data; a search with a policy that has no
            values.
        FailedStageError: the evaluation of the start, or of a test split, fails.
    """
    for name, value in {"replica": replica, "search_stages": search_stages}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{name} must be a whole number >= 0, got {name}={value!r}.")
    if isinstance(policy, str | Path):
        policy = Policy.load(policy)
    for name, value, kind in (("task", task, Task), ("policy", policy, Policy)):
        if not isinstance(value, kind):
            raise InputError(
                f"{name} must be a rlhf_ray.{kind.__name__}, got a {type(value).__name__}."
            )
    if "process" not in policy.metadata:
        raise InputError(
            "policy must know the process that it decides in, got metadata without 'process'. Take "
            "one that a search saved."
        )
    suite = Suite(
        name="finetune", model=model, levels=levels, train_tasks=[task], val_tasks=[], test_tasks=[]
    )
    assert isinstance(task.metric, Metric)
    chosen = operations or operations_from_json(policy.operations)
    check_operations(chosen, len(levels))
    process = policy.metadata["process"]
    observer = Observer(
        groups=tuple(process["groups"]),
        tasks=tuple(process["tasks"]),
        labels={task.name: task.known_as},
    )
    engine = Engine(suite, _engine_settings(process, device), source_moments=policy.source_moments)
    settings = ProcessSettings(
        **{name: process[name] for name in ("horizon", "performance", "cost", "budget")}
    )
    spec = process_spec(tuple(levels), chosen, engine, task.metric, observer, settings)
    policy.check(spec.levels, [operation_as_json(o) for o in chosen], observer.names(spec))
    tree = LocalStages(engine, retry=False)
    stages = TolerantStages(tree)
    search_cost = 0.0
    if search_stages:
        episode = guided(policy, spec, observer, stages, search_stages)(task.name, replica)
        on_the_way = sum(step.tuning_cost for step in episode.steps)
        # rounded: sums of the same terms in another order are not quite equal
        search_cost = round(episode.state.cost - spec.cost(episode.state.start) - on_the_way, 9)
    else:
        spec = policy.as_charged(spec)
        state, steps = roll_out(
            spec, observer, policy.act, stages, task.name, replica, on_step=on_step
        )
        episode = Episode(state=state, steps=steps)
    state = episode.state
    start = replace(state, best_path=())
    run = run_of(spec, METHOD, episode, utility=_utility(policy), test_metric=report(stages, state))
    best = StageRequest(task=task.name, replica=replica, path=state.best_path)
    return FineTuned(
        model=_tuned(model, tree.state_dict(best)),
        start_metric=run.start_metric,
        val_metric=run.val_metric,
        test_metric=known(run.test_metric),
        start_test_metric=report(stages, start),
        cost=run.cost,
        search_cost=search_cost,
        stages=run.stages,
        switches=run.switches,
        trace=run.steps,
        run=run,
        failures=stages.failures,
    )


def _engine_settings(
    process: Mapping[str, Any], device: Literal["auto", "cpu", "cuda"]
) -> EngineSettings:
    """The engine a policy was learned with; without CUDA in full precision, whatever that was."""
    engine = EngineSettings(device=device, val_size=process["val_size"])
    if process["precision"] == "bf16" and engine.torch_device.type == "cuda":
        return replace(engine, precision="bf16")
    return engine


def _utility(policy: Policy) -> Utility:
    """That of the policy's sweep."""
    config = policy.metadata.get("config", {})
    own = {"tuning_cost": "utility_cost", "switch_cost": "utility_switch"}
    return Utility(**{name: config[field] for name, field in own.items() if field in config})


def _tuned(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    tuned = copy.deepcopy(model).cpu()
    tuned.load_state_dict(dict(weights))
    return tuned.eval()
