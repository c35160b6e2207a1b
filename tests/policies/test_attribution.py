import numpy as np
import pytest
import torch

from rlhf_ray.policies.attribution import Decision, drivers, recorded
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.policies.policy import Policy
from rlhf_ray.policies.q_table import QTable, as_weights

LEVELS = ("conv", "dense")
N_FEATURES = 3
N_ACTIONS = 4


def policy_on_feature(feature: int) -> Policy:
    """Takes action 1 where the feature is positive, else action 0, at every level."""
    shape = NetworkSettings(n_levels=2, n_features=N_FEATURES, n_actions=N_ACTIONS, hidden=(1,),
                            dueling=False)  # fmt: skip
    networks = LevelQNetworks(shape)
    state = {name: torch.zeros_like(value) for name, value in networks.state_dict().items()}
    for name, value in state.items():
        if name.startswith("encoders") and name.endswith("weight"):
            value[0, feature, 0] = 1.0
        elif name.startswith("heads") and name.endswith("weight"):
            value[0, 0] = torch.tensor([0.0, 1.0, 0.0, 0.0])
        elif name.startswith("heads"):
            value[0, 0] = torch.tensor([0.01, 0.0, -1.0, -1.0])
    operations = ({"name": "train"}, {"name": "stop"})
    return Policy(levels=LEVELS, features=("loss", "entropy", "steps"), operations=operations,
                  network=shape, weights=state)  # fmt: skip


def decision(*features: float, level: int = 0, mask=(1, 1, 1, 1)) -> Decision:
    values = np.array(features, dtype=np.float32)
    return Decision(level=level, features=values, mask=np.array(mask, dtype=np.int8))


def test_the_feature_that_decides_is_found_with_its_exact_share():
    met = [decision(0, 1, 5), decision(1, 1, 6), decision(2, -1, 7), decision(3, -1, 8)]
    conv, dense = drivers(policy_on_feature(1), met)
    # of 12 ordered pairs of different decisions, 8 swap a positive entropy with a negative one
    share = pytest.approx(8 / 12)
    features = [{"name": "entropy", "changed": share}]
    assert conv == {"level": "conv", "decisions": 4, "features": features}
    assert dense == {"level": "dense", "decisions": 0, "features": []}


def test_closed_actions_do_not_count():
    met = [decision(0, v, 0, mask=(1, 0, 1, 1)) for v in (1, -1)]
    assert drivers(policy_on_feature(1), met)[0]["features"] == []


def test_of_a_table_it_cannot_be_told():
    tables = [QTable(N_FEATURES, N_ACTIONS) for _ in LEVELS]
    met = [decision(0, 1, 0), decision(1, 0, 0)]
    for action, seen in enumerate(met):
        tables[0].learn(tables[0].row(seen.features), action, 1.0, 0.5)
    policy = Policy(levels=LEVELS, features=("nothing", "stage 1 is:a", "stage 1 is:b"),
                    operations=({"name": "a"}, {"name": "b"}), network=None,
                    weights=as_weights(tables))  # fmt: skip
    assert len({policy.act(0, seen.features, seen.mask) for seen in met}) == 2
    conv, dense = drivers(policy, met)
    assert conv == {"level": "conv", "decisions": 2, "features": None}
    assert dense == {"level": "dense", "decisions": 0, "features": None}


def test_recording_changes_nothing_and_order_does_not_matter():
    policy, met = policy_on_feature(0), []
    act = recorded(policy.act, met)
    rng = np.random.default_rng(0)
    mask = np.ones(N_ACTIONS, dtype=np.int8)
    for _ in range(150):
        features = rng.normal(size=N_FEATURES).astype(np.float32)
        assert act(1, features, mask) == policy.act(1, features, mask)
    assert len(met) == 150
    assert drivers(policy, met) == drivers(policy, met[::-1])
    (only,) = drivers(policy, met)[1]["features"]
    assert only["name"] == "loss"
    assert 0.4 < only["changed"] < 0.6
