import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from sweep_files import small_suite

from rlhf_ray import apply
from rlhf_ray.config import SearchConfig
from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.operations import operation_as_json
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.policies.observations import Observer, as_groups
from rlhf_ray.policies.policy import JSON_NAME, WEIGHTS_NAME, Policy
from rlhf_ray.process import ProcessSpec


@pytest.fixture
def policy(tmp_path) -> Path:
    """An untrained policy for the small suite, saved."""
    config, levels = SearchConfig(steps=2, batch_size=8), ("low", "head")
    spec = ProcessSpec(levels=levels, operations=config.operations(), reference_flops=1.0)
    observer = Observer(groups=as_groups("all"), tasks=())
    features = observer.names(spec)
    network = NetworkSettings(
        n_levels=2, n_features=len(features), n_actions=spec.n_actions, hidden=(8,)
    )
    made = Policy(
        levels=levels,
        features=features,
        operations=tuple(operation_as_json(operation) for operation in spec.operations),
        network=network,
        weights=LevelQNetworks(network, seed=1).state_dict(),
        metadata={
            "process": {
                "horizon": 3,
                "performance": "gain",
                "cost": "flops",
                "budget": None,
                "groups": list(observer.groups),
                "tasks": [],
                "precision": "fp32",
                "val_size": EngineSettings().val_size,
            }
        },
    )
    return made.save(tmp_path / "policy").parent


def run_main(policy, *arguments, task="test-0"):
    return apply.main(
        ["--suite", "sweep_files:small_suite", "--policy", str(policy), "--task", task, *arguments]
    )


def test_apply_shows_what_was_done_and_saves_the_weights(policy, tmp_path, capsys):
    output = tmp_path / "tuned.safetensors"
    output.write_text("what was there before")
    assert run_main(policy, "--output", str(output)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "What was done, accuracy on val" in captured.out
    assert "val accuracy 0." in captured.out
    assert "full stages" in captured.out
    assert f"The tuned weights are in {output}" in captured.out
    lines = captured.out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    tuned, model = load_file(output), small_suite().model
    model.load_state_dict(tuned)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy", "tuned.safetensors"]


def test_apply_needs_no_ray(policy, tmp_path):
    code = (
        "import sys; from rlhf_ray import apply; status = apply.main(sys.argv[1:]); "
        "assert 'torch' in sys.modules; assert 'ray' not in sys.modules; sys.exit(status)"
    )
    arguments = ["--suite", "sweep_files:small_suite", "--policy", str(policy), "--task", "val-0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--quiet"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("val accuracy ")
    assert done.stdout.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_json_holds_the_figures_and_the_same_replica_gives_the_same(policy, capsys):
    answers = []
    for replica in ("1", "1", "2"):
        assert run_main(policy, "--json", "--replica", replica) == 0
        answers.append(json.loads(capsys.readouterr().out))
    for answer in answers:
        for step in answer["trace"]:
            del step["time_s"]
    first, again, _ = answers
    assert first == again
    assert first["task"] == "test-0"
    assert first["cost"] >= sum(step["cost"] for step in first["trace"])
    assert 0 <= first["start_metric"] <= first["val_metric"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "test-1"}, "got task='test-1'. Did you mean"),
        ({"output": "none/tuned.safetensors"}, "output must lie in a folder that exists"),
        ({"output": "."}, "output must be a file, got the folder"),
        ({"output": os.devnull}, "output must be a file, got the device or pipe"),
        ({"replica": "-1"}, "replica must be at least 0, got replica=-1."),
        ({"device": "gpu"}, "--device must be one that exists"),
        ({"suite": "sweep_files:smal_suite"}, "Did you mean 'small_suite'?"),
        ({"policy": "none"}, "a policy must be a directory with"),
    ],
)
def test_bad_input_is_one_line(policy, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"suite": "sweep_files:small_suite", "policy": str(policy), "task": "test-0"}
    words = [
        word for name, value in {**given, **arguments}.items() for word in (f"--{name}", value)
    ]
    assert apply.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


def test_keys_of_the_policys_uri_are_not_shown(policy, monkeypatch, capsys):
    loaded, uri = Policy.load(policy), "s3://AKID:SEC/RET@bucket/best_policy?region=eu"
    monkeypatch.setattr(Policy, "load", lambda path: loaded)
    assert run_main(uri, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["policy"] == "s3://bucket/best_policy?region=eu"
    assert "policy  s3://bucket/best_policy?region=eu: made for levels" in captured.err
    assert "AKID" not in captured.out + captured.err


def test_output_on_an_object_store_is_refused_without_its_keys(policy, capsys):
    assert run_main(policy, "--output", "s3://AKID:SECRET@bucket/tuned.safetensors") == 2
    error = capsys.readouterr().err
    assert "a file of this machine, got the URI output='s3://bucket/tuned.safetensors'." in error
    assert "AKID" not in error


def test_what_must_be_given_is_asked_for(capsys):
    assert apply.main(["--task", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --policy must be given (folder with")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / WEIGHTS_NAME).write_bytes(b"cut"), "its checksum differs"),
        (lambda p: (p / JSON_NAME).write_text("{"), "a policy's files must be whole"),
        (lambda p: (p / WEIGHTS_NAME).unlink(), "a policy must be a directory with"),
    ],
)
def test_a_damaged_policy_is_refused(policy, damage, message, capsys):
    damage(policy)
    assert run_main(policy) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_policy_for_other_levels_is_refused(policy, capsys, monkeypatch):
    import dataclasses

    suite = dataclasses.replace(small_suite(), levels={"low": ["0"], "top": ["2"]})
    monkeypatch.setattr("rlhf_ray.suites.load_suite", lambda name, **_: suite)
    assert run_main(policy) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "made for the same levels" in error


def test_a_link_keeps_leading_where_it_leads(policy, tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "tuned.safetensors"
    link.symlink_to(tmp_path / "there" / "weights.safetensors")
    assert run_main(policy, "--output", str(link)) == 0
    assert link.is_symlink()
    assert load_file(tmp_path / "there" / "weights.safetensors")


def test_tied_weights_are_saved_by_each_of_their_names(tmp_path):
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    apply._save(SimpleNamespace(model=tied), tmp_path / "tied.safetensors")  # type: ignore[arg-type]
    assert set(load_file(tmp_path / "tied.safetensors")) == set(tied.state_dict())
    tied.load_state_dict(load_file(tmp_path / "tied.safetensors"))


def test_figures_are_told_where_the_weights_cannot_be_written(
    policy, tmp_path, capsys, monkeypatch
):
    def full(state: object, path: str) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    output = tmp_path / "tuned.safetensors"
    assert run_main(policy, "--json", "--output", str(output)) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["output"] is None
    assert "output must be writable" in captured.err and "No space left" in captured.err
    assert not output.exists()


def test_a_test_metric_that_is_no_number_is_null(policy, capsys, monkeypatch):
    import dataclasses

    import rlhf_ray as rr

    def where_a_zero_is(outputs: torch.Tensor, y: torch.Tensor) -> float:
        return 0.5 if 0 in y else math.nan

    suite = small_suite()
    x, y = suite.task("test-0").test
    test = x[y != 0], y[y != 0]
    metric = rr.Metric(name="odd", function=where_a_zero_is)
    task = dataclasses.replace(suite.task("test-0"), metric=metric, test=test)
    monkeypatch.setattr(rr.Suite, "task", lambda self, name: task if name == task.name else None)
    monkeypatch.setattr("rlhf_ray.tasks.check_task", lambda model, task: None)
    assert run_main(policy, "--json") == 0
    assert json.loads(capsys.readouterr().out)["test_metric"] is None


def test_the_tuned_model_has_the_reported_metric(policy, tmp_path, capsys):
    output = tmp_path / "tuned.safetensors"
    assert run_main(policy, "--json", "--output", str(output)) == 0
    answer, suite = json.loads(capsys.readouterr().out), small_suite()
    suite.model.load_state_dict(load_file(output))
    x, y = suite.task("test-0").test
    with torch.no_grad():
        measured = (suite.model.eval()(x).argmax(1) == y).float().mean().item()
    assert measured == pytest.approx(answer["test_metric"])
