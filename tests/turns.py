"""An episode of two levels that take turns, for tests of what is computed by hand."""

import numpy as np

ORDER = ["a", "b", "a", "a"]
REWARDS = [1.0, 2.0, 3.0, 4.0]
ACTIONS = [0, 1, 0, 1]


def observation(value):
    """Features (value, 1); the second action is valid below value 2."""
    return {"features": np.float32([value, 1.0]), "action_mask": np.int8([1, value < 2])}


def four_turns():
    """Turns of a, b, a, a; rewards 1, 2, 3, 4; from the third turn on action 1 is masked."""
    from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

    episode = MultiAgentEpisode(agent_to_module_mapping_fn=lambda agent_id, *a, **k: agent_id)
    episode.add_env_reset(observations={"a": observation(0)})
    for t, name in enumerate(ORDER):
        ended = t == len(ORDER) - 1
        following = {} if ended else {ORDER[t + 1]: observation(t + 1)}
        episode.add_env_step(
            following, {name: ACTIONS[t]}, {name: REWARDS[t]}, terminateds={"__all__": ended}
        )
    return episode
