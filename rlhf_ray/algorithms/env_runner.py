"""The env runner: complete, numbered episodes, several in flight, results free of timing.

RLlib's own runner steps its environments one after the other, and with complete episodes drops
those that are under way when enough are done, which favours short ones. Here a thread waits for
each environment's stage, every episode that is started is finished, and episodes come back in the
order of their numbers.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.vector.sync_vector_multi_agent_env import SyncVectorMultiAgentEnv

from rlhf_ray.algorithms.exploration import epsilon_at, exploring_action, gumbel_noise
from rlhf_ray.algorithms.modules import module_id
from rlhf_ray.algorithms.settings import AlgorithmSettings

NEXT_EPISODE = "next_episode"
"""Key of the next episode's number in a runner's state."""


@dataclass(frozen=True)
class EnvFactory:
    """Makes environments. RLlib copies its configuration often; this is never copied with it.

    Attributes:
        creator: makes an environment from its configuration.
        env_config: that configuration.
    """

    creator: Callable[[dict[str, Any]], MultiAgentEnv]
    env_config: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> "EnvFactory":
        return self

    def make(self, *, worker_index: int, vector_index: int, n_runners: int) -> MultiAgentEnv:
        """One environment; its configuration is an RLlib `EnvContext`."""
        context = EnvContext(
            self.env_config, worker_index, vector_index=vector_index, num_workers=n_runners
        )
        return self.creator(context)


class _Slot:
    """One environment and the episode it plays."""

    def __init__(self, env: MultiAgentEnv) -> None:
        self.env = env
        self.number = -1
        self.action: dict[Any, int] = {}
        self.last: int | None = None  # the action before this turn
        self.episode: MultiAgentEpisode | None = None


class NumberedEpisodesRunner(MultiAgentEnvRunner):
    """Plays numbered episodes; of R remote runners, runner r takes episodes r, r + R, ..."""

    # RLlib declares its general classes, and most of them optional
    config: Any  # filled by `rlhf_ray.algorithms.algorithm.configure`
    module: Any  # its modules have a method `act`
    env: Any
    num_envs: int

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        torch.set_num_threads(1)
        self._share = max(1, self.config.num_env_runners)
        # remote runners count from 1, the local one is 0
        self._first = max(0, (self.worker_index or 0) - 1)
        self.next_episode = self._first
        self._pool = ThreadPoolExecutor(
            max_workers=max(1, self.num_envs), thread_name_prefix="rlhf_ray_env"
        )

    def make_env(self) -> None:
        """Makes the environments, without Gymnasium's registry: that would copy the factory."""
        factory: EnvFactory = self.config.env_config["factory"]
        self.env: Any = SyncVectorMultiAgentEnv(
            env_fns=[
                lambda index=index: factory.make(
                    worker_index=self.worker_index or 0,
                    vector_index=index,
                    n_runners=self.config.num_env_runners,
                )
                for index in range(self.config.num_envs_per_env_runner)
            ]
        )
        self.num_envs = self.env.num_envs

    def sample_between(self, start: int, stop: int) -> list[MultiAgentEpisode]:
        """Plays this runner's episodes among the numbers `start` to `stop` - 1."""
        offset = (self._first - start) % self._share
        self.next_episode = start + offset
        count = len(range(self.next_episode, stop, self._share))
        return self.sample(num_episodes=count)

    def _sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[MultiAgentEpisode]:
        if num_episodes is None:
            raise ValueError("this runner plays complete episodes: give num_episodes.")
        last = self.next_episode + num_episodes * self._share
        numbers = list(range(self.next_episode, last, self._share))
        self.next_episode = last
        done = self._play(numbers, explore=explore, random_actions=random_actions)
        done.sort(key=lambda episode: episode.custom_data["episode"])
        return done

    def _play(
        self, numbers: list[int], *, explore: bool, random_actions: bool
    ) -> list[MultiAgentEpisode]:
        settings: AlgorithmSettings = self.config.settings
        waiting = iter(numbers)
        done: list[MultiAgentEpisode] = []
        in_flight: dict[Future[Any], _Slot] = {}

        def start(slot: _Slot) -> None:
            slot.number = next(waiting, -1)
            slot.episode = slot.last = None
            if slot.number >= 0:
                options = {"episode": slot.number}
                in_flight[self._pool.submit(slot.env.reset, options=options)] = slot

        def act(slot: _Slot) -> None:
            assert slot.episode is not None
            level: Any
            (level,) = slot.episode.get_agents_to_act()
            epsilon = 1.0 if random_actions else slot.episode.custom_data["epsilon"]
            slot.last = self._action(slot, level, settings.seed, epsilon)
            slot.action = {level: slot.last}
            in_flight[self._pool.submit(slot.env.step, slot.action)] = slot

        for env in self.env.envs:
            start(_Slot(env.unwrapped))
        while in_flight:
            ready, _ = wait(in_flight, return_when=FIRST_COMPLETED)
            for future in ready:
                slot = in_flight.pop(future)
                episode = self._receive(slot, future.result(), explore=explore)
                if episode.is_done:
                    done.append(self._finish(slot, episode))
                    start(slot)
                else:
                    act(slot)
        return done

    def _receive(self, slot: _Slot, result: Any, *, explore: bool) -> MultiAgentEpisode:
        """Enters what `reset` or `step` gave into the slot's episode."""
        if slot.episode is None:
            slot.episode = self._begin(slot, *result, explore=explore)
        else:
            observations, rewards, terminateds, truncateds, infos = result
            slot.episode.add_env_step(
                observations,
                slot.action,
                rewards,
                infos,
                terminateds=terminateds,
                truncateds=truncateds,
            )
        return slot.episode

    def _finish(self, slot: _Slot, episode: MultiAgentEpisode) -> MultiAgentEpisode:
        # a level that never acted has an episode of length 0
        self._prune_zero_len_sa_episodes(episode)
        for name in ("metrics", "notes"):
            told = getattr(slot.env, f"episode_{name}", None)
            episode.custom_data[name] = dict(told()) if told else {}
        return episode

    def _begin(
        self, slot: _Slot, observations: Any, infos: Any, *, explore: bool
    ) -> MultiAgentEpisode:
        settings: AlgorithmSettings = self.config.settings
        env: Any = slot.env
        episode = MultiAgentEpisode(
            id_=str(slot.number),
            observation_space=env.observation_spaces,
            action_space=env.action_spaces,
            agent_to_module_mapping_fn=self.config.policy_mapping_fn,
        )
        episode.add_env_reset(observations=observations, infos=infos)
        epsilon = epsilon_at(
            slot.number,
            final=settings.epsilon,
            n_episodes=settings.n_episodes,
            decay_fraction=settings.decay_fraction,
            warm_up=settings.warm_up,
        )
        episode.custom_data["episode"] = slot.number
        episode.custom_data["explore"] = explore
        episode.custom_data["epsilon"] = epsilon if explore else 0.0
        return episode

    def _action(self, slot: _Slot, level: str, seed: int, epsilon: float) -> int:
        assert slot.episode is not None
        observation: Any = slot.episode.agent_episodes[level].get_observations(-1)
        step = len(slot.episode)
        mask_A = observation["action_mask"]
        settings, levels = self.config.settings, self.config.levels
        again = None
        if slot.last is not None:
            operation = slot.last // len(levels)
            again = operation * len(levels) + levels.index(level)
        action = exploring_action(
            seed,
            slot.number,
            step,
            mask_A,
            epsilon,
            by=settings.explore_by,
            again=again,
            persistence=settings.persistence,
            usual=self._scheduled(level, observation["features"]),
            adherence=settings.adherence,
        )
        if action is not None:
            return action
        sampled = self.config.samples_actions and slot.episode.custom_data["explore"]
        noise = gumbel_noise(seed, slot.number, step, len(mask_A)) if sampled else 0.0
        return self.module[module_id(level)].act(observation, noise)

    def _scheduled(self, level: str, features: np.ndarray) -> int | None:
        settings: AlgorithmSettings = self.config.settings
        if settings.schedule is None:
            return None
        done = round(float(features[settings.progress]) * len(settings.schedule))
        return settings.schedule[done][self.config.levels.index(level)]

    def get_metrics(self) -> Any:
        """Nothing: the algorithm makes the metrics from the episodes themselves."""
        return {}

    def get_state(self, components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The runner's state with the number of its next episode."""
        return {**super().get_state(components, **kwargs), NEXT_EPISODE: self.next_episode}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes a state, or a part of one (weights alone, say)."""
        super().set_state(state)
        self.next_episode = state.get(NEXT_EPISODE, self.next_episode)

    def stop(self) -> None:
        """Ends the threads and closes the environments."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        super().stop()
