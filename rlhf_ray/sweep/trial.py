"""One trial of a sweep: trains the levels' policies with one configuration, and judges them."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray import tune

from rlhf_ray.algorithms import (
    build_algorithm,
    episodes_of,
    level_weights,
    network_settings,
    notes_of,
)
from rlhf_ray.config import SWEPT, SearchConfig
from rlhf_ray.engine.descriptors import SourceMoments
from rlhf_ray.env import EpisodePlan, FineTuningEnv
from rlhf_ray.evaluation.departures import Departures, departures
from rlhf_ray.evaluation.judging import Run, Utility, judge, summary_of
from rlhf_ray.evaluation.scheduling import MetSchedule, Walk
from rlhf_ray.operations import operation_as_json
from rlhf_ray.policies.attribution import Decision, drivers, recorded
from rlhf_ray.policies.observations import Observer
from rlhf_ray.policies.policy import Policy
from rlhf_ray.policies.schedules import Schedule
from rlhf_ray.process import ProcessSpec, RewardWeights
from rlhf_ray.provenance import library_versions
from rlhf_ray.storage import Storage
from rlhf_ray.sweep.experience import (
    PlayedEpisode,
    episodes_of_others,
    learn_from_others,
    learn_from_walks,
    played_episode,
    write_episodes,
)
from rlhf_ray.sweep.results import trial_folder
from rlhf_ray.sweep.trial_settings import algorithm_settings, own_utility, process_record
from rlhf_ray.tree.client import RayStages
from rlhf_ray.tree.tally import TalliedStages, Tally


@dataclass(frozen=True, kw_only=True)
class TrialContext:
    """What all trials of a sweep share.

    Attributes:
        sweep: the sweep's folder on the storage.
        storage: where trials write.
        suite: the suite's name.
        config: of the search.
        spec: the decision process; the trial sets the reward weights.
        observer: what policies see.
        plan: which episode plays which task.
        val_tasks: names of the tasks that trials are judged on.
        metric: name of their metric.
        stages: client of the workers.
        source_moments: of the suite's source data, saved with each policy.
        schedule: the best by `utility`; None: there is none.
        candidates: others, for trials whose cost weights ask for another one.
        walks: what schedules met while this one was looked for.
    """

    sweep: str
    storage: Storage
    suite: str
    config: SearchConfig
    spec: ProcessSpec
    observer: Observer
    plan: EpisodePlan
    val_tasks: tuple[str, ...]
    metric: str
    stages: RayStages
    source_moments: SourceMoments | None
    schedule: Schedule | None = None
    candidates: tuple[MetSchedule, ...] = ()
    walks: tuple[Walk, ...] = ()

    @property
    def utility(self) -> Utility:
        """What the whole sweep is judged by."""
        return Utility(tuning_cost=self.config.utility_cost, switch_cost=self.config.utility_switch)


class HandoverTrial(tune.Trainable):
    """Tune's view of a trial. Its configuration holds a value for each of `SWEPT`, and "trial".

    A trial that is cut off starts again; the stages it had asked for are in the tree.
    """

    def setup(self, config: dict[str, Any], context: TrialContext | None = None) -> None:
        """Builds the algorithm."""
        assert context is not None
        self._context = context
        self._build(config)

    def _build(self, config: dict[str, Any]) -> None:
        context = self._context
        self._name = str(config["trial"])
        self._values = {name: float(config[name]) for name in SWEPT}
        self._began = time.monotonic()
        self._tally = Tally()
        self._curve: list[dict[str, float]] = []
        self._played: list[PlayedEpisode] = []
        self._experience: dict[str, int] | None = None
        weights = RewardWeights(
            tuning_cost=self._values["tuning_cost_weight"],
            switch_cost=self._values["switch_cost_weight"],
        )
        settings = replace(context.spec.settings, weights=weights)
        self._spec = replace(context.spec, settings=settings)
        stages = TalliedStages(context.stages, self._tally, namespace=self._name)
        self._settings = algorithm_settings(context, self._values)
        self._algorithm = build_algorithm(
            context.config.algorithm,
            env_creator=FineTuningEnv,
            env_config={
                "spec": self._spec,
                "observer": context.observer,
                "plan": context.plan,
                "stages": stages,
                "counterfactuals": _counterfactual(context),
            },
            levels=self._spec.levels,
            n_features=len(context.observer.names(self._spec)),
            n_actions=self._spec.n_actions,
            settings=self._settings,
        )
        self._stages = stages
        if context.walks:
            learn_from_walks(
                self._algorithm,
                context.walks,
                spec=self._spec,
                observer=context.observer,
                counterfactual=_counterfactual(context),
            )

    def step(self) -> dict[str, Any]:
        """Plays and learns from some episodes; after the last, judges the policy and saves it."""
        if self._context.config.share_experience and self._experience is None:
            self._experience = self._learn_from_others()
        result = self._algorithm.train()
        self._enter(episodes_of(result), notes_of(result))
        recent = self._curve[-32:]
        figures: dict[str, Any] = {
            "episodes": len(self._curve),
            "train/return": sum(episode["return"] for episode in recent) / len(recent),
            "train/epsilon": recent[-1]["epsilon"],
            "stages/logical": self._tally.logical,
            "stages/distinct": self._tally.distinct,
            "stages/executed": self._tally.executed,
            "done": len(self._curve) >= self._settings.n_episodes,
        }
        if figures["done"]:
            shown = {"metric": self._context.metric}
            judged = self._finish().items()
            figures |= {f"judge/{shown.get(name, name)}": value for name, value in judged}
        return figures

    def _enter(self, episodes: list[dict[str, float]], notes: list[dict[str, Any]]) -> None:
        """Takes note of episodes, each of which brings the tally of its own stages."""
        self._curve += episodes
        for episode, noted in zip(episodes, notes, strict=True):
            self._tally.merge(noted["tally"])
            number = int(episode["episode"])
            self._played.append(played_episode(self._settings, number, noted["actions"]))

    def _learn_from_others(self) -> dict[str, int]:
        context, asked = self._context, Tally()
        learned = learn_from_others(
            self._algorithm,
            episodes_of_others(
                context.storage, context.sweep, self._name, self._settings, context.plan
            ),
            spec=self._spec,
            observer=context.observer,
            stages=self._stages.within("experience", asked),
            plan=context.plan,
            counterfactual=_counterfactual(context),
        )
        # others have asked for these stages; what was lost since and ran again is this trial's
        self._tally.merge(
            Tally(executed=asked.executed, recomputed=asked.recomputed, spent_s=asked.spent_s)
        )
        return learned

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Starts the next trial in this process: importing torch and Ray takes seconds."""
        self.cleanup()
        self._build(new_config)
        return True

    def cleanup(self) -> None:
        """Ends the algorithm's threads and actors."""
        self._algorithm.stop()

    def _finish(self) -> Mapping[str, float]:
        context = self._context
        policy, left = self._faithful_unless_paid(self._policy())
        decisions: list[Decision] = []
        runs = judge(
            policy.as_charged(self._spec),
            context.observer,
            recorded(policy.act, decisions),
            self._stages,
            tasks=context.val_tasks,
            replicas=range(context.config.judge_replicas),
            utility=context.utility,
        )
        judged = summary_of(runs)
        folder = trial_folder(context.sweep, self._name)
        policy.write(context.storage, f"{folder}/policy")
        if self._experience is not None:
            write_episodes(context.storage, context.sweep, self._name, self._played)
        record = self._record(judged, runs) | {
            "drivers": drivers(policy, decisions),
            "departures": None if left is None else {**asdict(left), "paid": left.paid},
        }
        context.storage.write_json(f"{folder}/trial.json", record)
        return judged

    def _faithful_unless_paid(self, policy: Policy) -> tuple[Policy, Departures | None]:
        """The policy as it may be used, and what leaving its schedule gave, if it has one."""
        if policy.network is None or policy.network.schedule is None:
            return policy, None
        context = self._context
        left = departures(
            policy,
            self._spec,
            context.observer,
            self._stages,
            tasks=context.plan.tasks,
            utility=own_utility(self._values),
        )
        return policy if left.paid else policy.faithful(), left

    def _record(self, judged: Mapping[str, float], runs: list[Run]) -> dict[str, Any]:
        return {
            "name": self._name,
            "values": self._values,
            "status": "done",
            "error": None,
            "judged": dict(judged),
            "runs": [run.as_json() for run in runs],
            "curve": self._curve,
            "stages": self._tally.as_json(),
            "wall_s": time.monotonic() - self._began,
            **({} if self._experience is None else {"experience": self._experience}),
        }

    def _policy(self) -> Policy:
        context, spec = self._context, self._spec
        features = context.observer.names(spec)
        operations = [operation_as_json(operation) for operation in spec.operations]
        return Policy(
            levels=spec.levels,
            features=features,
            operations=tuple(operations),
            network=network_settings(
                context.config.algorithm,
                n_levels=spec.n_levels,
                n_features=len(features),
                n_actions=spec.n_actions,
                settings=self._settings,
            ),
            weights=level_weights(self._algorithm),
            source_moments=context.source_moments,
            metadata={
                "suite": context.suite,
                "sweep": context.sweep,
                "trial": self._name,
                "values": self._values,
                "process": process_record(context),
                "config": context.config.as_json(),
                "versions": library_versions(),
            },
        )


def _counterfactual(context: TrialContext) -> bool:
    """Whether trials learn from what stages imply: only `dqn` replays single transitions."""
    config = context.config
    # a single level has nobody to hand over to, and its `stop` implies nothing at all
    return config.counterfactuals and config.algorithm == "dqn" and context.spec.n_levels > 1


def failed_record(name: str, values: Mapping[str, float], error: str) -> dict[str, Any]:
    """The record of a trial that could not be carried to its end."""
    return {"name": name, "values": dict(values), "status": "failed", "error": error}
