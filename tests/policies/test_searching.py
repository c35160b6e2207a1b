from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic import SyntheticStages, price, spec_of

from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.exhaustive import all_paths, distinct_steps
from rlhf_ray.evaluation.judging import Utility, compare, judge
from rlhf_ray.operations import Skip, Stop, Train, operation_as_json
from rlhf_ray.outcomes import StagePath, StageRequest
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.policies.observations import Observer
from rlhf_ray.policies.policy import Policy
from rlhf_ray.policies.searching import Values, best_first, guided
from rlhf_ray.process import ProcessSpec, State, action_mask, advance, stage_request, start_state

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


# -- how far a search goes


def trained(n_levels: int, n_operations: int, horizon: int) -> ProcessSpec:
    operations = [Train(name=f"train {i}", learning_rate=1e-4 * 2**i) for i in range(n_operations)]
    skip, stop = Skip(name="skip"), Stop(name="stop")
    return spec_of(n_levels, horizon=horizon, operations=[*operations, skip, stop], probed=True)


def drawn(*parts: object) -> float:
    return float(np.random.default_rng(derive_seed(*parts)).normal())


def words(path: StagePath) -> list[tuple[str, tuple[int, ...]]]:
    return [(step.operation.name, step.levels) for step in path]


def drawn_metric(seed: int) -> Callable[[StagePath, str], float]:
    return lambda path, task: 0.5 + 0.05 * drawn(seed, words(path))


def drawn_values(spec: ProcessSpec, seed: int, spread: float) -> Values:
    """About what the stage costs, or the skip; by model, acting level and action."""

    def values(state: State, mask: NDArray[np.int8]) -> NDArray[np.float32]:
        found = np.full(spec.n_actions, -np.inf, np.float32)
        for action in np.flatnonzero(mask).tolist():
            operation, next_level = spec.decode(action)
            known = -0.002 * abs(state.level - next_level) - 0.012 * isinstance(operation, Train)
            noise = drawn(seed, words(state.path), state.level, action) if spread else 0.0
            found[action] = known + spread * noise
        return found

    return values


def by_every_way(
    spec: ProcessSpec, values: Values, stages: SyntheticStages, n_stages: int
) -> list[StagePath]:
    """The models in the order in which a search meets them that tells all ways apart; gamma 1."""
    met: dict[StagePath, None] = {}
    left: list[tuple[float, State, float, int]] = []

    def follow(state: State, collected: float, action: int) -> tuple[State, float]:
        request = stage_request(spec, state, action)
        outcome = None if request is None else stages.outcome(request).outcome
        if request is not None:
            met.setdefault(request.path)
        after, step = advance(spec, state, action, outcome)
        return after, collected + step.reward

    def add(state: State, collected: float, values_A: NDArray[np.float32]) -> None:
        for action in np.flatnonzero(np.isfinite(values_A)).tolist():
            if not isinstance(spec.decode(action)[0], Stop):
                left.append((collected + float(values_A[action]), state, collected, action))

    start = stages.outcome(StageRequest(task="a")).outcome
    state, collected = start_state(spec, start, "a", 0, 0), 0.0
    while not state.terminated:
        values_A = values(state, action_mask(spec, state))
        decided = int(values_A.argmax())
        values_but_A = values_A.copy()
        values_but_A[decided] = -np.inf
        add(state, collected, values_but_A)
        state, collected = follow(state, collected, decided)
    own = len(met)
    while left and len(met) < own + n_stages:
        first = max(range(len(left)), key=lambda i: left[i][0])  # of equals, what came first
        state, collected = follow(*left.pop(first)[1:])
        if not state.terminated:
            add(state, collected, values(state, action_mask(spec, state)))
    return list(met)


@pytest.mark.parametrize("spread", [0.0, 0.002, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_a_search_meets_the_models_that_one_meets_which_tells_all_ways_apart(
    seed: int, spread: float
) -> None:
    for spec, n_stages in ((trained(2, 2, 3), 9), (trained(3, 2, 2), 15)):
        values, metric = drawn_values(spec, seed, spread), drawn_metric(seed)
        stages = SyntheticStages(metric=metric)
        found = best_first(spec, values, stages, "a", 0, gamma=1.0, n_stages=n_stages)
        met = list(dict.fromkeys(request.path for request in stages.stages_asked()))
        assert met == by_every_way(spec, values, SyntheticStages(metric=metric), n_stages)
        assert found.state.best == max(metric(path, "a") for path in ((), *met))


def test_a_search_without_an_end_meets_the_whole_tree() -> None:
    spec, metric = trained(3, 2, 2), drawn_metric(4)
    stages = SyntheticStages(metric=metric)
    every = list(all_paths(distinct_steps(spec.operations, 3), 2))
    values = drawn_values(spec, 4, 0.05)
    found = best_first(spec, values, stages, "a", 0, gamma=0.9, n_stages=1000)
    assert {request.path for request in stages.stages_asked()} == {path for path in every if path}
    assert found.state.best == max(metric(path, "a") for path in every)


@pytest.mark.parametrize("n_stages", [25, 100])
def test_ways_of_handing_over_do_not_multiply_what_a_search_looks_at(n_stages: int) -> None:
    spec, looked_at = trained(4, 6, 5), 0
    ideal = drawn_values(spec, 0, 0.0)  # where no stage ever pays

    def values(state: State, mask: NDArray[np.int8]) -> NDArray[np.float32]:
        nonlocal looked_at
        looked_at += 1
        return ideal(state, mask)

    stages = SyntheticStages(metric=lambda path, task: 0.5)
    best_first(spec, values, stages, "a", 0, gamma=1.0, n_stages=n_stages)
    assert len({request.path for request in stages.stages_asked()}) == n_stages
    assert looked_at < 30 * n_stages
