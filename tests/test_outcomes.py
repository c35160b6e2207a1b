import json
import math
from dataclasses import replace

import torch
from fake_engine import IDENTITY, request

from rlhf_ray.operations import Train
from rlhf_ray.outcomes import LevelState, Outcome, StageRequest, StageStep


def test_key_follows_everything_that_leads_to_the_state() -> None:
    base = request(0, 1)
    others = [
        request(1, 0), request(0), request(0, 1, 1), request(0, 1, task=1),
        request(0, 1, rate=2e-3), request(0, 1, replica=1), base.as_kind("test"),
    ]  # fmt: skip
    keys = {IDENTITY.key(one) for one in (base, *others)}
    identities = [
        replace(IDENTITY, model="other"), replace(IDENTITY, precision="bf16"),
        replace(IDENTITY, val_size=9), replace(IDENTITY, levels=("conv", "dense2", "head")),
        replace(IDENTITY, tasks={"task0": "other data"}),
    ]  # fmt: skip
    keys |= {identity.key(base) for identity in identities}
    assert len(keys) == 1 + len(others) + len(identities)


def test_key_is_of_content_not_of_names() -> None:
    named = StageStep(operation=Train(name="one", learning_rate=1e-3), levels=(0,))
    renamed = StageStep(operation=Train(name="two", learning_rate=1e-3), levels=(0,))
    keys = {IDENTITY.key(StageRequest(task="task0", path=(step,))) for step in (named, renamed)} | {
        replace(IDENTITY, tasks={"new": "digest0"}).key(StageRequest(task="new", path=(named,)))
    }
    assert len(keys) == 1


def test_start_is_the_same_for_all_replicas() -> None:
    assert IDENTITY.key(request(replica=0)) == IDENTITY.key(request(replica=5))


def test_request_knows_its_parent_and_its_kinds() -> None:
    assert request(0, 1).parent() == request(0)
    assert request(0).as_kind("test").parent().kind == "stage"
    assert request(0).as_kind("test").as_kind("stage") == request(0)


def test_outcome_comes_back_from_json_whole() -> None:
    outcome = Outcome(
        key="k",
        metric=0.1 + 0.2,
        loss=math.inf,
        diverged=True,
        flops={"train": 3.0},
        versions=("a", "pretrained"),
        descriptors={"gradient_norm": (0.5, 1e-9)},
        meta={"device": "cpu"},
    )
    assert Outcome.from_json(json.loads(json.dumps(outcome.as_json()))) == outcome


def test_state_size_counts_weights_and_optimizer() -> None:
    state = LevelState(
        weights={"w": torch.zeros(3, 4)}, optimizer={"exp_avg/w": torch.zeros(12).double()}
    )
    assert state.n_bytes() == 12 * 4 + 12 * 8
