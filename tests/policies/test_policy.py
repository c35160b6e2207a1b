import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_ray.digests import digest
from rlhf_ray.errors import InputError
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.policies.policy import JSON_NAME, WEIGHTS_NAME, Policy

OPERATIONS = ({"name": "train", "settings": {"learning_rate": 1e-3}}, {"name": "stop"})
FEATURES = ("level_is_conv", "level_is_dense", "loss")


def make_policy(**changes):
    network = NetworkSettings(n_levels=2, n_features=3, n_actions=4, hidden=(8,), **changes)
    return Policy(
        levels=("conv", "dense"),
        features=FEATURES,
        operations=OPERATIONS,
        network=network,
        weights=LevelQNetworks(network, seed=3).state_dict(),
        metadata={"versions": {"torch": torch.__version__}, "gamma": 0.9},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder": "separate"},
        {"dueling": False},
        {"n_members": 3, "pessimism": 1.0},
        {"controller": "single"},
    ],
)
def test_load_gives_back_what_save_wrote(tmp_path, changes):
    policy = make_policy(**changes)
    path = policy.save(tmp_path / "a" / "b")
    for given in (path, path.parent, str(path.parent)):
        loaded = Policy.load(given)
        assert replace(loaded, weights=policy.weights) == policy
        for level in (0, 1):
            features, mask = np.float32([1, 0.5, -1]), np.int8([1, 0, 1, 1])
            expected = policy.values(level, features, mask)
            np.testing.assert_array_equal(loaded.values(level, features, mask), expected)
            assert loaded.act(level, features, mask) == expected.argmax()


def test_act_never_takes_a_masked_action():
    policy = make_policy()
    for action in range(4):
        assert policy.act(0, np.ones(3, np.float32), np.eye(4, dtype=np.int8)[action]) == action


def test_policies_are_saved_on_any_storage(tmp_path):
    policy = make_policy()
    path = policy.save(f"{tmp_path.as_uri()}/best")
    assert path == f"{tmp_path.as_uri()}/best/{JSON_NAME}"
    for given in (path, tmp_path / "best"):
        assert replace(Policy.load(given), weights=policy.weights) == policy


def test_save_replaces_a_policy(tmp_path):
    make_policy().save(tmp_path)
    make_policy(encoder="separate").save(tmp_path)
    assert Policy.load(tmp_path).network.encoder == "separate"
    assert sorted(file.name for file in tmp_path.iterdir()) == [JSON_NAME, WEIGHTS_NAME]


def test_load_of_a_missing_policy_says_what_a_policy_is(tmp_path):
    with pytest.raises(InputError, match=r"must be a directory with policy\.json"):
        Policy.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"must be a directory with policy\.json"):
        Policy.load(tmp_path)


def test_load_of_a_missing_policy_says_so_once(tmp_path):
    with pytest.raises(InputError) as caught:
        Policy.load(tmp_path)
    assert str(caught.value) == (
        "a policy must be a directory with policy.json and policy.safetensors, or the policy.json "
        f"in it, got {str(tmp_path / JSON_NAME)!r} (No such file or directory)."
    )


def test_load_of_a_sweep_points_to_its_best_policy(tmp_path):
    make_policy().save(tmp_path / "best_policy")
    for path in (tmp_path, tmp_path / JSON_NAME):
        with pytest.raises(InputError, match=r"Did you mean '.*best_policy'\?$"):
            Policy.load(path)


def test_load_without_the_weights_names_their_file(tmp_path):
    make_policy().save(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(InputError, match=r"policy\.safetensors' \(No such file"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("name", [JSON_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_load_refuses_a_cut_file(tmp_path, name, keep):
    make_policy().save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=f"must be whole, got '.*{name}'"):
        Policy.load(tmp_path)


def test_load_refuses_altered_weights(tmp_path):
    make_policy().save(tmp_path)
    data = bytearray((tmp_path / WEIGHTS_NAME).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS_NAME).write_bytes(data)
    with pytest.raises(InputError, match="checksum differs"):
        Policy.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("levels", ["dense", "conv"]),
        ("kind", "table"),
        ("metadata", {}),
        ("weights", {"policy.safetensors": "0" * 64}),
    ],
)
def test_load_refuses_an_altered_description(tmp_path, field, value):
    path = make_policy().save(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, field: value}))
    with pytest.raises(InputError, match="checksum differs"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_load_refuses_another_schema_version(tmp_path, version):
    path = make_policy().save(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": version}))
    with pytest.raises(InputError, match="schema_version must be 1, got"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '"policy"', "null"])
def test_load_refuses_json_that_is_no_policy(tmp_path, text):
    (tmp_path / JSON_NAME).write_text(text)
    with pytest.raises(InputError, match="has no schema_version"):
        Policy.load(tmp_path)


def test_check_accepts_what_the_policy_was_made_for():
    make_policy().check(["conv", "dense"], OPERATIONS, list(FEATURES))


@pytest.mark.parametrize(
    ("levels", "operations", "features", "match"),
    [
        (["conv", "dense", "head"], OPERATIONS, FEATURES, "same levels, got levels="),
        (["dense", "conv"], OPERATIONS, FEATURES, "same levels"),
        (["conv", "dense"], OPERATIONS[:1], FEATURES, "same operations, got operations="),
        (["conv", "dense"], ({"name": "train"}, {"name": "stop"}), FEATURES, "settings=None inste"),
        (["conv", "dense"], OPERATIONS, FEATURES[:2], "same features"),
    ],
)
def test_check_refuses_anything_else(levels, operations, features, match):
    with pytest.raises(InputError, match=match):
        make_policy().check(levels, operations, features)


def test_policy_refuses_a_network_of_another_shape():
    policy = make_policy()
    with pytest.raises(InputError, match="a head per level"):
        replace(policy, features=("one",))
    with pytest.raises(InputError, match="weights must fit the network"):
        replace(policy, network=replace(policy.network, hidden=(9,)))


def test_policy_is_imported_without_ray():
    code = (
        "import sys, rlhf_ray.policies.policy, rlhf_ray.algorithms; sys.exit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_takes_a_uri(tmp_path):
    policy = make_policy()
    path = policy.save(tmp_path / "best")
    for given in (path.as_uri(), path.parent.as_uri()):
        assert replace(Policy.load(given), weights=policy.weights) == policy
    with pytest.raises(InputError, match=r"got 'file://.*none/policy\.json' \(No such file"):
        Policy.load((tmp_path / "none").as_uri())


@pytest.mark.parametrize(
    "changes",
    [{"weights": {}}, {"weights": {"../policy.safetensors": "0"}}, {"levels": 3}, {"network": {}}],
)
def test_load_refuses_what_describes_no_policy(tmp_path, changes):
    path = make_policy().save(tmp_path)
    content = json.loads(path.read_text()) | changes
    content.pop("sha256")
    path.write_text(json.dumps({**content, "sha256": digest(content)}))
    with pytest.raises(InputError, match="a policy's files must be whole"):
        Policy.load(tmp_path)
