import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_files import small_suite
from torch import nn

from rlhf_ray.config import SearchConfig
from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import FailedStageError, InputError
from rlhf_ray.operations import Operation, Skip, StageSession, Stop, operation_as_json
from rlhf_ray.policies.finetuning import FineTuned, finetune
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.policies.observations import Observer, as_groups
from rlhf_ray.policies.policy import Policy
from rlhf_ray.process import ProcessSpec
from rlhf_ray.tasks import Task, call_model

LEVELS = {"low": ["0"], "head": ["2"]}


def task(name: str = "never seen", shift: float = 0.5) -> Task:
    rng = torch.Generator().manual_seed(7)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 4, generator=rng)
        return x + shift, x[:, 1:].argmax(1)

    return Task(name=name, train=split(64), val=split(48), test=split(80))


class Zap(Operation):
    """An operation of a user's own: sets the acting level to zero."""

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        return (level,)

    def run(self, session: StageSession) -> None:
        for parameter in session.parameters().values():
            parameter.data.zero_()


def policy(
    seed: int = 0, operations: tuple[Operation, ...] | None = None, **process: Any
) -> Policy:
    """An untrained policy: it does something, and always the same."""
    chosen = operations or SearchConfig(steps=5, batch_size=16).operations()
    spec = ProcessSpec(levels=tuple(LEVELS), operations=chosen, reference_flops=1.0)
    observer = Observer(groups=as_groups("all"))
    features = observer.names(spec)
    network = NetworkSettings(
        n_levels=2, n_features=len(features), n_actions=spec.n_actions, hidden=(8,)
    )
    record = {
        "horizon": 4, "performance": "gain", "cost": "flops", "budget": None, "tasks": [],
        "groups": list(observer.groups), "precision": "fp32", "val_size": EngineSettings().val_size,
    }  # fmt: skip
    return Policy(
        levels=tuple(LEVELS),
        features=features,
        operations=tuple(operation_as_json(operation) for operation in chosen),
        network=network,
        weights=LevelQNetworks(network, seed=seed).state_dict(),
        metadata={
            "process": {**record, **process},
            "values": {"gamma": 0.9, "tuning_cost_weight": 0.05, "switch_cost_weight": 0.01},
            "config": {"algorithm": "dqn"},
        },
    )


def active_policy() -> Policy:
    """The first that carries out several stages, trains, and of which the best is kept."""
    for seed in range(50):
        tuned = run(policy(seed))
        trains = any(step["operation"].startswith("train") for step in tuned.trace)
        if tuned.run.stages >= 2 and tuned.run.best_length >= 1 and trains:
            return policy(seed)
    raise AssertionError("no seed acts")


def run(chosen: Policy | str | Path, model: nn.Module | None = None, **options: Any) -> FineTuned:
    return finetune(model or small_suite().model, LEVELS, task(), chosen, **options)


@pytest.fixture(scope="module")
def active() -> Policy:
    torch.set_num_threads(1)
    return active_policy()


def accuracy(model: nn.Module, data: Any) -> float:
    with torch.no_grad():
        return float((call_model(model, data[0]).argmax(1) == data[1]).float().mean())


def test_tuned_model_reproduces_its_metrics(active: Policy) -> None:
    model = small_suite().model
    tuned = run(active, model)
    assert accuracy(tuned.model, task().test) == pytest.approx(tuned.test_metric)
    assert accuracy(tuned.model, task().val) == pytest.approx(tuned.val_metric)
    assert accuracy(model, task().val) == pytest.approx(tuned.start_metric)
    assert accuracy(model, task().test) == pytest.approx(tuned.start_test_metric)
    assert tuned.val_metric == max([tuned.start_metric, *(s["metric"] for s in tuned.trace)])
    assert not any(module.training for module in tuned.model.modules())


def test_given_model_is_left_as_it_was(active: Policy) -> None:
    model = small_suite().model.train()
    model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = run(active, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert any(not torch.equal(before[n], v) for n, v in tuned.model.state_dict().items())


def test_same_replica_gives_the_same_another_one_not(active: Policy) -> None:
    first, second, other = run(active), run(active), run(active, replica=1)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])

    def figures(tuned: FineTuned) -> list[Any]:
        return [{**step, "time_s": 0} for step in tuned.trace]

    assert figures(first) == figures(second) and first.cost == second.cost
    assert any(
        not torch.equal(value, other.model.state_dict()[name])
        for name, value in first.model.state_dict().items()
    )


def test_account_is_the_sum_of_the_trace(active: Policy) -> None:
    seen: list[tuple[int, str]] = []
    tuned = run(active, on_step=lambda state, step: seen.append((len(state.path), step.operation)))
    assert [name for _, name in seen] == [step["operation"] for step in tuned.trace]
    assert tuned.switches == sum(step["switches"] for step in tuned.trace)
    start = tuned.cost - sum(step["cost"] for step in tuned.trace)
    assert start > 0  # evaluation and probes of the pretrained model
    assert tuned.run.cost == tuned.cost and tuned.run.test_metric == tuned.test_metric


def test_val_size_and_horizon_are_those_of_the_policy(active: Policy) -> None:
    short = replace(active, metadata={"process": {**active.metadata["process"], "horizon": 1}})
    assert run(short).run.stages <= 1
    few = replace(active, metadata={"process": {**active.metadata["process"], "val_size": 8}})
    assert (run(few).start_metric * 8).is_integer()  # a share of eight examples


def test_policy_for_other_levels_is_refused(active: Policy) -> None:
    with pytest.raises(InputError, match="level"):
        finetune(small_suite().model, {"one": ["0"], "two": ["2"]}, task(), active)
    with pytest.raises(InputError, match="level"):
        finetune(small_suite().model, {"head": ["2"], "low": ["0"]}, task(), active)


def test_operations_of_ones_own_must_be_given() -> None:
    own = (Zap(name="zap"), Skip(), Stop())
    chosen = policy(operations=own)
    with pytest.raises(InputError, match="'zap' must be one of this package's, got kind='Zap'"):
        run(chosen)
    tuned = run(chosen, operations=own)
    assert {step["operation"] for step in tuned.trace} <= {"zap", "skip", "stop"}
    with pytest.raises(InputError, match="operations"):
        run(chosen, operations=(Zap(name="other"), Skip(), Stop()))


class Broken(Zap):
    """An operation that fails whenever it is carried out."""

    def run(self, session: StageSession) -> None:
        raise RuntimeError("no such luck")


@pytest.mark.parametrize("search_stages", [0, 4])
def test_a_stage_that_fails_counts_as_diverged_and_is_named(search_stages: int) -> None:
    own = (Zap(name="zap"), Broken(name="broken"), Skip(), Stop())
    seeds = [policy(seed, operations=own) for seed in range(20)]
    tried = (run(chosen, operations=own, search_stages=search_stages) for chosen in seeds)
    tuned = next(t for t in tried if any(step["operation"] == "broken" for step in t.trace))
    failed = [step for step in tuned.trace if step["operation"] == "broken"]
    assert all(step["diverged"] and step["cost"] == 0 for step in failed)
    assert tuned.failures and len(set(tuned.failures)) == len(tuned.failures)
    for line in tuned.failures:
        assert re.search(r"got stage .*broken@\d\] of task 'never seen'.*no such luck", line)
    assert tuned.val_metric >= tuned.start_metric


def test_a_start_that_fails_is_an_error(active: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Engine, "start", fails)
    with pytest.raises(FailedStageError, match=r"got stage \[start\] of task.*no such luck"):
        run(active)


def test_data_the_model_cannot_take_is_refused(active: Policy) -> None:
    wrong = Task(name="w", **dict.fromkeys(("train", "val", "test"), (torch.zeros(4, 3),
                 torch.zeros(4, dtype=torch.int64))))  # fmt: skip
    with pytest.raises(InputError, match="'w': model and loss must take its data"):
        finetune(small_suite().model, LEVELS, wrong, active)


def test_replica_and_device_are_checked(active: Policy) -> None:
    with pytest.raises(InputError, match="replica must be a whole number >= 0, got replica=-1"):
        run(active, replica=-1)
    with pytest.raises(InputError, match="device must be one that exists, got device='gpu'"):
        run(active, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="cuda"):
            run(active, device="cuda")


def test_policy_may_be_a_path(tmp_path: Path, active: Policy) -> None:
    active.save(tmp_path)
    expected = [step["operation"] for step in run(active).trace]
    for path in (tmp_path, str(tmp_path)):
        assert [step["operation"] for step in run(path).trace] == expected
    with pytest.raises(InputError, match="a policy must be a directory with"):
        run(tmp_path / "none")


def test_a_policy_without_its_process_is_refused(active: Policy) -> None:
    with pytest.raises(InputError, match="policy must know the process that it decides in"):
        run(replace(active, metadata={}))


def test_arguments_of_another_kind_are_refused(active: Policy) -> None:
    model = small_suite().model
    with pytest.raises(InputError, match=r"task must be a rlhf_ray\.Task, got a Policy"):
        finetune(model, LEVELS, active, task())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"policy must be a rlhf_ray\.Policy, got a NoneType"):
        finetune(model, LEVELS, task(), None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"operations must hold rlhf_ray.Operation, got 'skip'"):
        run(active, operations=["skip"])
    with pytest.raises(InputError, match=r"operations must be a list of .*, got 'skip'"):
        run(active, operations="skip")


def test_fine_tuning_needs_no_ray(tmp_path: Any, active: Policy) -> None:
    active.save(tmp_path)
    code = (
        "import sys, rlhf_ray as rr, test_finetuning as t\n"
        "policy = rr.Policy.load(sys.argv[1])\n"
        "tuned = rr.finetune(t.small_suite().model, t.LEVELS, t.task(), policy)\n"
        "assert 'ray' not in sys.modules\n"
        "print(tuned.test_metric)"
    )
    here = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
    environment = {**os.environ, "PYTHONPATH": here}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
        env=environment,
    )  # fmt: skip
    assert float(done.stdout) == pytest.approx(run(active).test_metric)


# -- search under a policy's guidance --------------------------------------------------------------


def test_longer_search_returns_no_worse_and_pays_for_all_it_tried(active: Policy) -> None:
    tuned = [run(active, search_stages=n) for n in (0, 3, 12)]
    assert tuned[0].val_metric <= tuned[1].val_metric <= tuned[2].val_metric
    assert tuned[0].cost < tuned[1].cost < tuned[2].cost
    assert [t.stages - tuned[0].stages for t in tuned] == [0, 3, 12]
    best = tuned[-1]
    assert accuracy(best.model, task().test) == pytest.approx(best.test_metric)
    assert accuracy(best.model, task().val) == pytest.approx(best.val_metric)
    assert best.val_metric == max([best.start_metric, *(s["metric"] for s in best.trace)])


def test_full_search_meets_every_stage_of_the_tree(active: Policy) -> None:
    chosen = [o for o in SearchConfig(steps=5, batch_size=16).operations()]
    few = tuple(o for o in chosen if o.name in ("train_mid", "train_all", "stop"))
    shallow = policy(operations=few, horizon=2)
    # the first level acts first: itself or both; then either alone, or both
    tuned = run(shallow, search_stages=1000)
    assert tuned.stages == 2 + 2 * 3


def test_search_needs_a_policy_with_values(active: Policy) -> None:
    sampled = replace(active, metadata={**active.metadata, "config": {"algorithm": "ppo"}})
    with pytest.raises(InputError, match="policy with values, got one learned by algorithm=ppo"):
        run(sampled, search_stages=2)
    with pytest.raises(InputError, match="search_stages must be a whole number >= 0"):
        run(active, search_stages=-1)


def test_the_record_is_judged_by_the_utility_of_the_policys_sweep(active: Policy) -> None:
    usual = run(active).run
    dear = {"utility_cost": 0.5, "utility_switch": 0.0}
    found = run(replace(active, metadata={**active.metadata, "config": dear})).run
    assert found.cost == usual.cost > 0
    assert found.val_utility == pytest.approx(found.val_metric - 0.5 * found.cost)
    assert usual.val_utility == pytest.approx(
        usual.val_metric - 0.02 * usual.cost - 0.002 * usual.switches
    )
