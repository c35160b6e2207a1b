"""The decision process as RLlib's `MultiAgentEnv`: one agent per level, one acting at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.utils.typing import MultiAgentDict

from rlhf_ray.algorithms.counterfactuals import counterfactuals
from rlhf_ray.algorithms.handover import IMPLIED, Transitions
from rlhf_ray.algorithms.modules import spaces
from rlhf_ray.digests import derive_seed
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import (
    ProcessSpec,
    State,
    action_mask,
    advance,
    stage_request,
    start_request,
    start_state,
)
from rlhf_ray.tree.tally import TalliedStages, Tally


@dataclass(frozen=True, kw_only=True)
class EpisodePlan:
    """Which task, replica seed and first level an episode has: a function of its number alone.

    Every trial of a sweep plays the same plan (common random numbers), so that trials differ by
    what is swept only and share their stages.

    Attributes:
        tasks: names of the tasks to learn on; each pass over them is shuffled anew.
        replicas: replica seeds 0 ... replicas - 1.
        n_levels: L.
        random_start: draw the first level; otherwise it is the first.
        seed: of the sweep.
    """

    tasks: tuple[str, ...]
    replicas: int
    n_levels: int
    random_start: bool
    seed: int

    def draw(self, episode: int) -> tuple[str, int, int]:
        """Task, replica seed and first level of an episode."""
        rounds, place = divmod(episode, len(self.tasks))
        order = np.random.default_rng(derive_seed(self.seed, "tasks", rounds))
        task = self.tasks[order.permutation(len(self.tasks))[place]]
        replica = derive_seed(self.seed, "replica", episode) % self.replicas
        level = derive_seed(self.seed, "level", episode) % self.n_levels if self.random_start else 0
        return task, replica, level


class FineTuningEnv(MultiAgentEnv):
    """Episodes of fine-tuning; `step` waits for the stage it asked for.

    Args:
        config: "spec" (ProcessSpec), "observer" (Observer), "plan" (EpisodePlan), "stages"
            (TalliedStages; the environment counts in `episode_notes`, not in its tally);
            "counterfactuals" (bool, False by default): note what every step implies.

    `reset(options={"episode": n})` plays episode n; without it, the one after the last.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._spec: ProcessSpec = config["spec"]
        self._observer: Observer = config["observer"]
        self._plan: EpisodePlan = config["plan"]
        self._all_stages: TalliedStages = config["stages"]
        self._stages = self._all_stages
        self._tally = Tally()
        self._actions: list[int] = []
        self._implies: bool = config.get("counterfactuals", False)
        self._implied: list[Transitions] = []
        self._episode = -1
        self._state: State | None = None
        names = [*self._spec.levels]
        self.possible_agents = [*names]
        self.agents = [*names]
        n_features = len(self._observer.names(self._spec))
        observation, action = spaces(n_features, self._spec.n_actions)
        self.observation_spaces = dict.fromkeys(names, observation)
        self.action_spaces = dict.fromkeys(names, action)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[MultiAgentDict, MultiAgentDict]:
        """Starts an episode from the pretrained model."""
        self._episode = (options or {}).get("episode", self._episode + 1)
        task, replica, level = self._plan.draw(self._episode)
        self._tally, self._actions, self._implied = Tally(), [], []
        self._stages = self._all_stages.within(f"episode-{self._episode}", self._tally)
        outcome = self._stages.outcome(start_request(task, replica)).outcome
        self._state = start_state(self._spec, outcome, task, replica, level)
        return self._observe(self._state), {}

    def step(
        self, action_dict: MultiAgentDict
    ) -> tuple[MultiAgentDict, MultiAgentDict, MultiAgentDict, MultiAgentDict, MultiAgentDict]:
        """Carries out the acting level's action."""
        assert self._state is not None, "reset comes before step"
        acting = self._spec.levels[self._state.level]
        action = int(action_dict[acting])
        self._actions.append(action)
        request = stage_request(self._spec, self._state, action)
        outcome = None if request is None else self._stages.outcome(request).outcome
        if self._implies:
            self._implied.append(
                counterfactuals(self._spec, self._observer, self._state, action, outcome)
            )
        self._state, step = advance(self._spec, self._state, action, outcome)
        rewards: MultiAgentDict = {acting: step.reward}
        ended: MultiAgentDict = {"__all__": self._state.terminated}
        return self._observe(self._state), rewards, ended, {"__all__": False}, {}

    def episode_notes(self) -> dict[str, Any]:
        """Of the episode so far: "tally" (Tally) of its stages, "actions", as taken, and `IMPLIED`.

        They go where the episode goes, whichever process plays it: one that is lost with its
        process and played again is counted once.
        """
        return {
            "tally": self._tally,
            "actions": list(self._actions),
            IMPLIED: list(self._implied),
        }

    def _observe(self, state: State) -> MultiAgentDict:
        return {
            self._spec.levels[state.level]: {
                "features": self._observer.observe(self._spec, state),
                "action_mask": action_mask(self._spec, state),
            }
        }
