import itertools
import json

import numpy as np
import pytest
import torch
from synthetic import SyntheticStages, spec_of

from rlhf_ray.evaluation.rollouts import play
from rlhf_ray.operations import Align, Fit, Skip, Stop, default_operations
from rlhf_ray.policies.networks import UNTRIED, LevelQNetworks, NetworkSettings, decided
from rlhf_ray.policies.policy import Policy
from rlhf_ray.policies.schedules import Move, as_json, decisions, from_json, moves, path_of, placed

OPERATIONS = [*default_operations(), Align(name="align"), Fit(name="fit")]
SPEC = spec_of(3, horizon=4, operations=OPERATIONS)
BY_NAME = {operation.name: operation for operation in SPEC.operations}


def move(name: str, level: int) -> Move:
    return Move(operation=BY_NAME[name], level=level)


SCHEDULE = (move("align", 0), move("fit", 2), move("train_mid", 1), move("train_mid", 1))


def network(**changes: object) -> NetworkSettings:
    fields = {
        "n_levels": 3, "n_features": 2, "n_actions": SPEC.n_actions, "n_members": 3,
        "schedule": decisions(SPEC, SCHEDULE), "progress": 1, **changes,
    }  # fmt: skip
    return NetworkSettings(**fields)  # type: ignore[arg-type]


def test_moves_hold_every_effect_once_at_the_levels_that_may_ask_for_it() -> None:
    found = moves(SPEC.operations, 3)
    effects = {(str(m.operation.settings()), m.operation.levels(m.level, 3)) for m in found}
    assert len(effects) == len(found)
    assert {m.level for m in found if isinstance(m.operation, Align)} == {0, 1}
    assert {m.level for m in found if isinstance(m.operation, Fit)} == {0}
    assert not [m for m in found if isinstance(m.operation, Stop)]


@pytest.mark.parametrize("schedule", [SCHEDULE, SCHEDULE[:2], ()])
def test_a_process_that_follows_the_decisions_carries_the_schedule_out(schedule: tuple) -> None:
    table = decisions(SPEC, schedule)

    def decide(state, mask):  # type: ignore[no-untyped-def]
        return table[len(state.path)][state.level]

    episode = play(SPEC, decide, SyntheticStages(), "train0", 0)
    assert episode.state.path == path_of(schedule, 3)
    levels = [0, *[m.level for m in schedule]]
    distances = [abs(a - b) for a, b in itertools.pairwise(levels)]
    assert episode.state.switches == sum(distances)
    # whoever decides on a hand-over knows what the stage before it gave
    assert all(step.switch_cost == 0 for step in episode.steps if step.levels)


def test_decisions_know_stop_and_skip_of_kinds_of_their_own() -> None:
    class Rest(Stop):
        pass

    class Pass(Skip):
        pass

    own = {Stop: Rest(), Skip: Pass()}
    operations = [own.get(type(operation), operation) for operation in OPERATIONS]
    spec = spec_of(3, horizon=4, operations=operations)
    assert decisions(spec, SCHEDULE) == decisions(SPEC, SCHEDULE)


def test_stages_are_asked_for_where_it_takes_the_fewest_switches() -> None:
    found = placed(
        (move("align", 1), move("fit", 0), move("train_mid", 2), move("train_all", 0)), 3
    )
    assert [m.level for m in found] == [1, 1, 2, 2]
    assert path_of(found, 3)[1].levels == (2,)


def test_json_gives_a_schedule_back() -> None:
    assert from_json(SPEC, json.loads(json.dumps(as_json(SPEC, SCHEDULE)))) == SCHEDULE


def test_a_schedule_is_left_for_what_was_tried_and_is_surely_better_alone() -> None:
    settings = network(margin=0.1, assurance=1.0, least_tried=3)
    usual, better, unsure, untried = decisions(SPEC, SCHEDULE)[0][0], 5, 6, 7
    values = torch.zeros(3, 1, SPEC.n_actions)
    values[:, 0, better] = 0.2
    values[:, 0, unsure] = torch.tensor([0.0, 0.5, 1.0])  # mean 0.5, deviation 0.41
    values[:, 0, untried] = 9.0
    tried = torch.full((4, 3, SPEC.n_actions), 3.0)
    tried[0, 0, untried] = 2.0
    features, level = torch.zeros(1, 2), torch.tensor([0])
    found = decided(values, features, level, settings, tried)[0]
    assert float(found[usual]) == pytest.approx(0.1)
    assert float(found[better]) == pytest.approx(0.2)
    assert float(found[unsure]) == pytest.approx(0.5 - 0.408, abs=1e-3)
    assert float(found[untried]) == UNTRIED
    assert int(found.argmax()) == better


def test_counts_go_by_stages_done_and_level() -> None:
    networks = LevelQNetworks(network())
    assert networks.tried is not None and not networks.tried.any()
    features = torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, 0.5]])  # none, two, two of four stages
    networks.note_tried(features, torch.tensor([0, 1, 1]), torch.tensor([4, 2, 2]))
    assert networks.tried[0, 0, 4] == 1 and networks.tried[2, 1, 2] == 2
    assert networks.tried.sum() == 3
    assert networks.level(1).tried is networks.tried


def test_a_policy_that_knows_nothing_follows_its_schedule_and_is_saved_with_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    settings = network()
    policy = Policy(
        levels=SPEC.levels,
        features=("loss", "stages done / horizon"),
        operations=tuple({"name": operation.name} for operation in SPEC.operations),
        network=settings,
        weights=LevelQNetworks(settings, seed=1).state_dict(),
    )
    loaded = Policy.load(policy.save(tmp_path))
    assert loaded.network == settings
    probed = spec_of(3, probed=True)
    assert policy.as_charged(probed).probed
    faithful = Policy.load(policy.faithful().save(tmp_path / "faithful"))
    assert not faithful.as_charged(probed).probed
    assert faithful.as_charged(spec_of(3, probed=True, budget=4.0)).probed
    mask = np.ones(SPEC.n_actions, dtype=np.int8)
    for done in range(4):
        for level in range(3):
            features = np.float32([0.3, done / 4])
            assert loaded.act(level, features, mask) == settings.schedule[done][level]  # type: ignore[index]


def test_a_policy_that_must_not_leaves_its_schedule_only_where_that_is_not_open() -> None:
    settings = network(margin=0.1, assurance=0.0, least_tried=0, departs=False)
    usual, better, good = decisions(SPEC, SCHEDULE)[0][0], 5, 6
    values = torch.zeros(3, 1, SPEC.n_actions)
    values[:, 0, better], values[:, 0, good] = 9000.0, 8000.0  # a metric may count anything
    tried = torch.zeros(4, 3, SPEC.n_actions)
    found = decided(values, torch.zeros(1, 2), torch.tensor([0]), settings, tried)[0]
    assert int(found.argmax()) == usual
    found[usual] = -torch.inf
    assert int(found.argmax()) == better
    found[better] = -torch.inf
    assert int(found.argmax()) == good
