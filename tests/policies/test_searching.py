from dataclasses import replace

import pytest
from synthetic import SyntheticStages, price, spec_of

from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.judging import Utility, compare, judge
from rlhf_ray.operations import operation_as_json
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.policies.observations import Observer
from rlhf_ray.policies.policy import Policy
from rlhf_ray.policies.searching import guided

SPEC = spec_of(2, horizon=3, probed=True)
OBSERVER = Observer()


def policy_of(algorithm="dqn"):
    features = OBSERVER.names(SPEC)
    network = NetworkSettings(
        n_levels=2, n_features=len(features), n_actions=SPEC.n_actions, hidden=(8,)
    )
    return Policy(
        levels=SPEC.levels,
        features=features,
        operations=tuple(operation_as_json(operation) for operation in SPEC.operations),
        network=network,
        weights=LevelQNetworks(network, seed=1).state_dict(),
        metadata={
            "values": {"gamma": 0.9, "tuning_cost_weight": 0.05, "switch_cost_weight": 0.01},
            "config": {"algorithm": algorithm},
        },
    )


def test_guided_search_is_a_method_like_others():
    policy, stages = policy_of(), SyntheticStages()
    players = {f"guided {n}": guided(policy, SPEC, OBSERVER, stages, n) for n in (0, 2, 8)}
    shared = {"tasks": ["test0", "test1"], "replicas": (0, 1), "utility": Utility()}
    runs = compare(players, SPEC, stages, **shared)
    alone = judge(SPEC, OBSERVER, policy.act, stages, **shared)
    for own, none, some, many in zip(alone, *runs.values(), strict=True):
        assert replace(none, method="policy") == replace(own, cost=pytest.approx(own.cost))
        assert (some.stages - own.stages, many.stages - own.stages) == (2, 8)
        assert own.val_metric <= some.val_metric <= many.val_metric
        assert own.cost < some.cost < many.cost
        # a stage costs 0.6 on one level, 1.1 on both; and takes 2 seconds
        assert 8 * 0.6 <= many.cost - own.cost + 1e-9 <= 8 * 1.1 + 1e-9
        assert many.time_s - own.time_s == pytest.approx(16.0)


def test_the_budget_bounds_all_that_a_guided_search_tries():
    spec = replace(spec_of(2, horizon=3, probed=True, budget=4.0), price=price)
    policy, shared = policy_of(), {"tasks": ["test0"], "replicas": (0,), "utility": Utility()}
    (run,) = judge(spec, OBSERVER, policy.act, SyntheticStages(), **shared)
    players = {"guided": guided(policy, spec, OBSERVER, SyntheticStages(), 50)}
    (found,) = compare(players, spec, SyntheticStages(), **shared)["guided"]
    assert run.cost < found.cost <= 4.0


def test_a_policy_without_values_cannot_guide():
    with pytest.raises(InputError, match="policy with values, got one learned by algorithm=ppo"):
        guided(policy_of("ppo"), SPEC, OBSERVER, SyntheticStages(), 2)
