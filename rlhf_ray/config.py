"""The configuration of a search: the one schema behind the library and the command line.

Fields are documented with unit and range; `__post_init__` checks them before any work starts.
"""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rlhf_ray.errors import InputError, unknown_name

if TYPE_CHECKING:  # the schema needs no torch: what imports it must not slow --help down
    from rlhf_ray.engine.loaded_model import EngineSettings
    from rlhf_ray.operations import Operation
    from rlhf_ray.policies.observations import Observer
    from rlhf_ray.process import ProcessSettings, RewardWeights
    from rlhf_ray.tasks import Suite

ALGORITHM_NAMES = ("dqn", "ppo", "q-learning")
"""Algorithms that `rlhf_ray.algorithms` builds."""

WITHOUT_EPSILON = ("ppo",)
"""Algorithms that sample their actions; RLlib's `entropy_coeff` says how random they stay."""

ON_POLICY = ("ppo",)
"""Algorithms that learn from what their own policy played alone."""

SWEPT: tuple[str, ...] = ("gamma", "epsilon", "tuning_cost_weight", "switch_cost_weight")
"""The settings that a sweep varies; each takes one or more values."""

RESERVED_NAMES = ("tree", "pretrained")
"""Folders under the storage path that are no sweep's."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What a search does. Every field has a default that suits a laptop.

    Attributes:
        gamma: discount per stage, in [0, 1]; one or more values to sweep.
        epsilon: final share of random actions, in [0, 1]; one or more values to sweep. "ppo" has
            none: it samples, and the RLlib setting entropy_coeff says how random it stays.
        tuning_cost_weight: reward taken per full stage of tuning cost, >= 0; one or more values.
        switch_cost_weight: reward taken per level of distance handed over, >= 0; one or more.
        num_samples: random search: this many trials, each swept setting drawn between its lowest
            and highest value; None: the grid of all values (the defaults: a half-fraction of it).
        algorithm: what learns: "dqn", "ppo", or "q-learning" in tables, for the observations
            "tabular" and "prefix".
        controller: "levels": a policy per level; "single": one for all levels' turns, for
            comparison; not for "q-learning".
        alpha: step size of "q-learning", in (0, 1].
        episodes: episodes per trial, >= 1.
        warm_up: part of the episodes, from the first, over which epsilon is 1, in
            [0, decay_fraction]. All trials have these in common: their stages are carried out once.
        decay_fraction: part of the episodes after which epsilon has fallen linearly from 1 to its
            final value, in [0, 1].
        explore_by: "episode": an episode is random altogether, with probability epsilon, or greedy
            altogether, so that trials share what they explore; "step": drawn for every step.
        persistence: probability that a random action repeats the operation before it, at the level
            that it was handed to, in [0, 1): what pays when it is repeated is found sooner.
        schedule: "dqn" begins with one schedule for all tasks, tuned on the train tasks, and its
            policies depart from it only where that is surely better, and only if it paid on the
            train tasks; needs the features of "progress".
        adherence: probability that a step of an exploring episode follows the schedule, in [0, 1).
        counterfactuals: "dqn" learns from what a stage implies, too: the same stage with other
            hand-overs or asked for by other levels, skips and stops. Exact, and without a stage.
        relearn: "dqn" learns its networks anew after the last episode, from all that was played:
            trials of different seeds differ less, and no stage is carried out for it.
        horizon: stages per episode at most, >= 1.
        budget: tuning cost that no episode exceeds, full stages, > 0; with cost seconds, no stage
            is begun once it is spent, and the last one may exceed it.
        seed: of the sweep: exploration, tasks drawn, networks; >= 0.
        replicas: replica seeds that policies are trained on, >= 1.
        judge_replicas: replica seeds that figures on val and test tasks are means over, >= 1.
        performance: "gain": of the best val metric so far; "value": the metric itself.
        cost: "flops": tuning cost in full stages; "seconds": as measured.
        start: the level that acts first: "first", or "random" (seeded).
        observation: "all" feature groups, some of them, or for tables "tabular": (level, task),
            "prefix": (level, stages so far), or both.
        only_operations: names of the operations that there are besides "stop"; none: all of them.
        steps: optimizer steps per stage, >= 1; None: one epoch.
        batch_size: examples per step, >= 1.
        optimizer: "adam" or "sgd".
        learning_rates: low, middle, high, ascending, > 0; None: the optimizer's own.
        keep_optimizer_state: a level's optimizer goes on where its last stage left it.
        utility_cost: a of the utility `metric - a * cost - b * switches`, per full stage, >= 0;
            minus the metric where lower is better.
        utility_switch: b of the utility, per level of distance, >= 0.
        baselines: schedules to compare with on the test tasks besides those always shown:
            names, or "all" (all but those that search on the test task: asha, tpe, optimum).
        search_stages: stages that "asha" and "tpe" may carry out on a task, >= 1.
        val_size: val examples that decisions use, >= 1.
        device: "auto", "cpu" or "cuda".
        precision: "fp32", or "bf16" on CUDA.
        cuda_graphs: on CUDA, capture training steps and replay them, which computes the same;
            False: for models and losses whose code does otherwise from step to step by what lies
            outside of them, a global counter say: all else is noticed.
        cache_gb: bound per worker on each of: cached activations, tasks' data on the device,
            weights in memory; GB, >= 0; 0: no caching. The data of the task at work always stay.
        weights_gb: bound on the weights kept under the storage path, GB, > 0.
        storage_path: where everything durable goes: a folder or a URI that pyarrow.fs opens.
        name: of the sweep's folder; None: made from suite and configuration.
        address: of a running Ray cluster; None: RAY_ADDRESS says which, else a local one starts.
        dashboard: switch Ray's dashboard on, on 127.0.0.1, where a local Ray is started.
        num_workers: actors that carry out stages, >= 1; "auto": one per core, or as many as
            share the GPUs.
        cpus_per_worker: cores each reserves, > 0.
        gpus_per_worker: GPUs each reserves, >= 0; a fraction shares one; "auto": a quarter where
            there are GPUs, unless the device is "cpu", else none.
        concurrent_trials: trials that run at once, >= 1; "auto": as many as cores, at most 4.
        stages_in_flight: episodes that one trial plays at once, >= 1.
        env_runners: remote RLlib env runners per trial, >= 0; 0: in the trial itself.
        share: carry every stage out once for the whole sweep; False: every time it is asked for.
        share_experience: a trial of "dqn" or "q-learning" learns also from the episodes of trials
            that are done, with rewards weighed its own way; needs share. Which are done when it
            begins is a matter of timing: same seed, same table then holds with concurrent_trials 1.
        prefill: carry out the whole tree to this depth first, 0 to 3.
        replay_only: carry out nothing new; a stage that is not in the tree is an error.
        mlflow: tracking URI of an MLflow server, or a folder: trials are logged there too.
        wandb: project of Weights & Biases: trials are logged there too.
        rllib: settings of RLlib's algorithm by name, such as grad_clip=5.0. Read are, with dqn,
            grad_clip and td_error_loss_fn; with ppo, clip_param, entropy_coeff, grad_clip, lambda_,
            minibatch_size, num_epochs and vf_loss_coeff.
    """

    gamma: tuple[float, ...] = (0.9, 0.99)
    epsilon: tuple[float, ...] = (0.05, 0.2)
    tuning_cost_weight: tuple[float, ...] = (0.02, 0.2)
    switch_cost_weight: tuple[float, ...] = (0.002, 0.02)
    num_samples: int | None = None
    algorithm: str = "dqn"
    controller: Literal["levels", "single"] = "levels"
    alpha: float = 0.1
    episodes: int = 64
    warm_up: float = 0.85
    decay_fraction: float = 0.85
    explore_by: Literal["episode", "step"] = "episode"
    persistence: float = 0.6
    schedule: bool = True
    adherence: float = 0.7
    counterfactuals: bool = True
    relearn: bool = True
    horizon: int = 5
    budget: float | None = None
    seed: int = 0
    replicas: int = 1
    judge_replicas: int = 3
    performance: Literal["gain", "value"] = "gain"
    cost: Literal["flops", "seconds"] = "flops"
    start: Literal["first", "random"] = "first"
    observation: tuple[str, ...] = ("all",)
    only_operations: tuple[str, ...] = ()
    steps: int | None = 20
    batch_size: int = 64
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rates: tuple[float, ...] | None = None
    keep_optimizer_state: bool = True
    utility_cost: float = 0.02
    utility_switch: float = 0.002
    baselines: tuple[str, ...] = ()
    search_stages: int = 20
    val_size: int = 256
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    cuda_graphs: bool = True
    cache_gb: float = 0.25
    weights_gb: float = 4.0
    storage_path: str = "./rlhf_runs"
    name: str | None = None
    address: str | None = None
    dashboard: bool = False
    num_workers: int | Literal["auto"] = "auto"
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | Literal["auto"] = "auto"
    concurrent_trials: int | Literal["auto"] = "auto"
    stages_in_flight: int = 4
    env_runners: int = 0
    share: bool = True
    share_experience: bool = False
    prefill: int = 0
    replay_only: bool = False
    mlflow: str | None = None
    wandb: str | None = None
    rllib: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if isinstance(path := getattr(self, f.name), os.PathLike):
                object.__setattr__(self, f.name, os.fspath(path))
        for name in (*SWEPT, "observation", "only_operations", "baselines"):
            value = getattr(self, name)
            given = value if isinstance(value, tuple | list) else (value,)
            object.__setattr__(self, name, tuple(given))
        _check(self)

    def all_operations(self) -> "tuple[Operation, ...]":
        """The operations that the settings make, whichever of them the search has."""
        from rlhf_ray.operations import default_operations

        return default_operations(
            steps=self.steps,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            keep_optimizer_state=self.keep_optimizer_state,
            learning_rates=self.learning_rates,
        )

    def operations(self) -> "tuple[Operation, ...]":
        """The operations of the search."""
        found = self.all_operations()
        names = [operation.name for operation in found]
        for name in self.only_operations:
            if name not in names:
                raise unknown_name("operation", name, names)
        wanted = {*self.only_operations, "stop"} if self.only_operations else set(names)
        return tuple(operation for operation in found if operation.name in wanted)

    @property
    def swept(self) -> dict[str, tuple[float, ...]]:
        """The values of each of `SWEPT`; epsilon is 0 for an algorithm that has none."""
        none = {"epsilon": (0.0,)} if self.algorithm in WITHOUT_EPSILON else {}
        return {name: getattr(self, name) for name in SWEPT} | none

    @property
    def cluster(self) -> str | None:
        """Address of the Ray cluster that is asked for; None: one in this process, or a local."""
        return self.address or os.environ.get("RAY_ADDRESS")

    def engine_settings(self) -> "EngineSettings":
        """How stages are carried out."""
        from rlhf_ray.engine.loaded_model import EngineSettings

        return EngineSettings(
            device=self.device,
            precision=self.precision,
            cuda_graphs=self.cuda_graphs,
            val_size=self.val_size,
            cache_bytes=int(self.cache_gb * 2**30),
        )

    def process_settings(self, weights: "RewardWeights | None" = None) -> "ProcessSettings":
        """What an episode is, with the reward weights of one trial."""
        from rlhf_ray.process import ProcessSettings, RewardWeights

        return ProcessSettings(
            horizon=self.horizon,
            performance=self.performance,
            cost=self.cost,
            budget=self.budget,
            weights=weights or RewardWeights(),
        )

    def observer(self, suite: "Suite | None" = None) -> "Observer":
        """What policies see; a tabular observation tells the suite's train tasks apart."""
        from rlhf_ray.policies.observations import Observer

        groups = as_groups_of(self.observation)
        if suite is None:
            return Observer(groups=groups)
        tasks = tuple(dict.fromkeys(task.known_as for task in suite.train_tasks))
        labels = {task.name: task.known_as for task in suite.tasks()}
        return Observer(groups=groups, tasks=tasks, labels=labels)

    def as_json(self) -> dict[str, Any]:
        """Plain data, for records."""
        from rlhf_ray.uris import without_secrets

        data = dataclasses.asdict(self) | {"storage_path": without_secrets(str(self.storage_path))}
        return json.loads(json.dumps(data, default=str))

    def digest(self) -> str:
        """Identity of what is computed; where it runs and what it is called do not count."""
        from rlhf_ray.digests import digest

        return digest(self.that_count())

    def that_count(self) -> dict[str, Any]:
        """The fields that what is computed depends on, JSON-able."""
        elsewhere = {
            "storage_path", "name", "address", "num_workers", "cpus_per_worker",
            "gpus_per_worker", "concurrent_trials", "cache_gb", "weights_gb", "baselines",
            "search_stages",
            "device", "cuda_graphs", "replay_only", "dashboard", "mlflow", "wandb",
        }  # fmt: skip
        return {k: v for k, v in self.as_json().items() if k not in elsewhere}


def as_groups_of(observation: tuple[str, ...]) -> tuple[str, ...]:
    """Group names of `SearchConfig.observation`."""
    from rlhf_ray.policies.observations import as_groups

    return as_groups(observation[0] if len(observation) == 1 else observation)


def with_defaults(config: SearchConfig, defaults: Mapping[str, Any]) -> SearchConfig:
    """A suite's own defaults for the fields that the configuration leaves at theirs."""
    fields = {f.name: f for f in dataclasses.fields(SearchConfig)}
    for name in defaults:
        if name not in fields:
            raise unknown_name("suite default", name, fields)
    untouched = {
        name: value for name, value in defaults.items() if getattr(config, name) == default_of(name)
    }
    if untouched.get("algorithm", config.algorithm) in WITHOUT_EPSILON:
        untouched.pop("epsilon", None)
    return dataclasses.replace(config, **untouched)


def check_observation(config: SearchConfig) -> None:
    """Raises InputError if the algorithm cannot learn from the observation.

    Not part of the schema's own checks: a suite may want another observation by default.
    """
    if config.controller == "single":
        _check_single(config)
    if config.algorithm == "q-learning" and not config.observer().discrete:
        raise InputError(
            "observation must be tabular, prefix or both for q-learning, which has a table row per "
            f"state, got observation={' '.join(config.observation)}. Add --observation tabular."
        )


def _check_single(config: SearchConfig) -> None:
    if config.algorithm == "q-learning":
        raise InputError(
            "controller must be levels for q-learning, got controller=single: the state says whose "
            "turn it is, so one table would hold the rows of all. Take dqn or ppo."
        )
    if "level" not in config.observer().groups:
        raise InputError(
            "observation must hold the group level for a single controller, which learns from it "
            f"whose turn it is, got observation={' '.join(config.observation)}. Add it."
        )


def default_of(name: str) -> Any:
    """The package's own default of a setting."""
    (f,) = (f for f in dataclasses.fields(SearchConfig) if f.name == name)
    return f.default_factory() if callable(f.default_factory) else f.default


_AT_LEAST = {
    "num_samples": 1, "episodes": 1, "horizon": 1, "seed": 0, "replicas": 1, "judge_replicas": 1,
    "steps": 1, "batch_size": 1, "val_size": 1, "num_workers": 1, "concurrent_trials": 1,
    "stages_in_flight": 1, "env_runners": 0, "search_stages": 1,
    "utility_cost": 0, "utility_switch": 0, "cache_gb": 0, "gpus_per_worker": 0,
}  # fmt: skip


_KINDS = {
    str: "a string",
    str | None: "a string, or None",
    bool: "True or False",
    tuple[str, ...]: "strings",
    tuple[float, ...] | None: "three numbers (low, middle, high), or None",
    Mapping[str, Any]: "a mapping of names to values",
}
"""What fields of these types must hold, in words; those of single numbers: see `_number`."""


def _check(config: SearchConfig) -> None:
    for name, kind in typing.get_type_hints(SearchConfig).items():
        value = getattr(config, name)
        if kind in _KINDS and not _is_of(value, kind):
            raise InputError(f"{name} must be {_KINDS[kind]}, got {name}={value!r}.")
    for name in SWEPT:
        _check_swept(name, getattr(config, name))
    for name, low in _AT_LEAST.items():
        value = _number(config, name)
        if value is not None and not low <= value < math.inf:
            raise InputError(f"{name} must be at least {low}, got {name}={value}.")
    for name in ("budget", "weights_gb", "cpus_per_worker"):
        value = _number(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be > 0, got {name}={value}.")
    if not 0 <= (_number(config, "prefill") or 0) <= 3:
        raise InputError(f"prefill must lie in [0, 3], got prefill={config.prefill}.")
    for name, kind in typing.get_type_hints(SearchConfig).items():
        if typing.get_origin(kind) is Literal and getattr(config, name) not in kind.__args__:
            raise unknown_name(name, str(getattr(config, name)), kind.__args__)
    _check_name(config.name)
    if config.algorithm not in ALGORITHM_NAMES:
        raise unknown_name("algorithm", config.algorithm, ALGORITHM_NAMES)
    if config.algorithm in WITHOUT_EPSILON and config.epsilon != default_of("epsilon"):
        raise InputError(
            f"epsilon must be left out for {config.algorithm}, got epsilon={config.epsilon}: it "
            "samples its actions. Say how random they stay with --rllib entropy_coeff=0.05."
        )
    if config.share_experience and (config.algorithm in ON_POLICY or not config.share):
        raise InputError(
            "share_experience must go with share and an algorithm that learns off-policy, got "
            f"algorithm={config.algorithm}, share={config.share}. Take dqn or q-learning, and "
            "leave share on."
        )
    if not config.share and (config.replay_only or config.prefill):
        raise InputError(
            "share must be on where the tree is prefilled or only replayed, got share=False, "
            f"prefill={config.prefill}, replay_only={config.replay_only}: nothing is looked up in "
            "the tree then. Leave one out."
        )
    warm_up, decay_fraction = _number(config, "warm_up"), _number(config, "decay_fraction")
    if not 0 <= (warm_up or 0) <= (decay_fraction or 0) <= 1:
        raise InputError(
            "0 <= warm_up <= decay_fraction <= 1 must hold, got "
            f"warm_up={warm_up}, decay_fraction={decay_fraction}. Give both."
        )
    for name in ("persistence", "adherence"):
        value = _number(config, name) or 0
        if not 0 <= value < 1:
            raise InputError(f"{name} must lie in [0, 1), got {name}={value}.")
    if not 0 < (_number(config, "alpha") or 0) <= 1:
        raise InputError(f"alpha must lie in (0, 1], got alpha={config.alpha}.")
    config.observer()
    config.operations()


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of the type of an annotation; a list counts as a tuple."""
    outer, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if outer in (types.UnionType, typing.Union):
        return any(_is_of(value, one) for one in inner)
    if outer is tuple:
        return isinstance(value, tuple | list) and all(_is_of(one, inner[0]) for one in value)
    if outer is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, outer)


def _number(config: SearchConfig, name: str) -> float | None:
    """A setting's number; None where it holds what it may hold instead (None, "auto")."""
    value, kind = getattr(config, name), typing.get_type_hints(SearchConfig)[name]
    kinds = typing.get_args(kind) or (kind,)
    if (value is None and type(None) in kinds) or (value == "auto" and Literal["auto"] in kinds):
        return None
    whole = float not in kinds
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        what = "a whole number" if whole else "a number"
        raise InputError(f"{name} must be {what}, got {name}={value!r}.")
    return value


def _check_name(name: str | None) -> None:
    if name is None:
        return
    folder = name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")
    if not (folder and 0 < len(name) <= 100) or name in RESERVED_NAMES:
        raise InputError(
            "name must be that of one folder: 1 to 100 printable characters, no slash, no dot "
            f"first, none of {', '.join(RESERVED_NAMES)}, got name={name!r}."
        )


def _check_swept(name: str, values: tuple[float, ...]) -> None:
    high = 1.0 if name in ("gamma", "epsilon") else math.inf
    bounds = "in [0, 1]" if high == 1.0 else "finite and >= 0"
    if not values:
        raise InputError(f"{name} must have at least one value, got none.")
    for value in values:
        if not (isinstance(value, int | float) and 0 <= value <= high and math.isfinite(value)):
            raise InputError(f"{name} must be {bounds}, got {name}={value}.")
    if len(set(values)) != len(values):
        raise InputError(f"{name} must name each value once, got {name}={values}.")
