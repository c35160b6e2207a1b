"""What SECURITY.md says, where it can be read off the source or off files that are written."""

import ast
import json
from pathlib import Path

import pytest
import torch
from fake_engine import FakeEngine, request
from safetensors.torch import load as load_safetensors

import rlhf_ray
from rlhf_ray.errors import InputError
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.policies.policy import Policy
from rlhf_ray.storage import open_storage
from rlhf_ray.tree.stage_tree import LocalStages
from rlhf_ray.tree.store import TreeStore

PACKAGE = Path(rlhf_ray.__file__).parent
SOURCES = {
    file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for file in PACKAGE.rglob("*.py")
}

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

BETWEEN_PROCESSES = {
    "tree/actor.py", "tree/pool.py", "tree/stage_worker.py", "tree/workers.py", "sweep/tuning.py",
}  # fmt: skip
"""Modules that pickle what passes between the processes of one cluster; none of it is stored."""

NEVER = {"torch.save", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "eval", "exec"}


def calls() -> list[tuple[str, str, ast.Call]]:
    """Module, dotted name and node of every call in the package."""
    return [
        (name, ast.unparse(node.func), node)
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def test_torch_loads_weights_only() -> None:
    loose = [
        name
        for name, called, call in calls()
        if called == "torch.load" and keywords(call).get("weights_only") != "True"
    ]
    assert not loose
    by_other_names = [
        name
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch"
        for alias in node.names
        if alias.name in ("load", "save")
    ]
    assert not by_other_names


def test_pickle_is_used_between_processes_of_a_cluster_only() -> None:
    users = set()
    for name, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {part for alias in node.names for part in alias.name.split(".")}
            elif isinstance(node, ast.ImportFrom):
                names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            else:
                continue
            if names & PICKLES:
                users.add(name)
    assert users <= BETWEEN_PROCESSES


def test_nothing_runs_or_unpickles_what_it_reads() -> None:
    found = {(name, called) for name, called, _ in calls() if called in NEVER}
    assert not found
    assert not [
        name
        for name, _, call in calls()
        if keywords(call).get("allow_pickle") == "True" or keywords(call).get("shell") == "True"
    ]
    assert not [name for name, called, _ in calls() if called.endswith("Tuner.restore")]


def test_nothing_listens_beyond_loopback() -> None:
    for name, tree in SOURCES.items():
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        assert "0.0.0.0" not in texts, name
        assert "::" not in texts, name


def readable(file: Path) -> None:
    """Reads a file as JSON or safetensors, neither of which runs code."""
    data = file.read_bytes()
    if file.suffix == ".json":
        json.loads(data)
    else:
        assert file.suffix == ".safetensors", file
        load_safetensors(data)


def test_what_travels_is_json_and_safetensors(tmp_path: Path) -> None:
    network = NetworkSettings(n_levels=2, n_features=3, n_actions=4, hidden=(8,))
    Policy(
        levels=("conv", "dense"),
        features=("level_is_conv", "level_is_dense", "loss"),
        operations=({"name": "train", "settings": {}}, {"name": "stop"}),
        network=network,
        weights=LevelQNetworks(network, seed=3).state_dict(),
        metadata={"versions": {"torch": torch.__version__}, "gamma": 0.9},
    ).save(tmp_path / "policy")
    engine = FakeEngine(tmp_path)
    LocalStages(engine, TreeStore(open_storage(tmp_path / "runs"))).outcome(request(0, 1))
    for part in ("policy", "runs"):
        files = [file for file in (tmp_path / part).rglob("*") if file.is_file()]
        assert len(files) >= 2
        for file in files:
            readable(file)


def test_pickled_policy_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "policy.json")
    with pytest.raises(InputError, match=r"policy"):
        Policy.load(tmp_path)
