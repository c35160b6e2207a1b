import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from fake_engine import IDENTITY, FakeEngine, ran, request
from torch import nn

from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import StageError
from rlhf_ray.outcomes import Outcome, StageRequest
from rlhf_ray.storage import open_storage
from rlhf_ray.tasks import Suite, Task
from rlhf_ray.tree.stage_tree import LocalStages
from rlhf_ray.tree.store import TreeStore
from rlhf_ray.tree.tally import TalliedStages, Tally


def tree(folder: Path, **options: int | None) -> TreeStore:
    return TreeStore(open_storage(folder / "runs"), **options)  # pyright: ignore[reportArgumentType]


def local(folder: Path, store: TreeStore | None = None, **options: object) -> LocalStages:
    return LocalStages(FakeEngine(folder), store, **options)  # pyright: ignore[reportArgumentType]


def forget(stages: LocalStages) -> None:
    stages.states._states.clear()
    stages.states._bytes = 0


def key(asked: StageRequest) -> str:
    return IDENTITY.key(asked)


@pytest.mark.parametrize("durable", [False, True])
def test_outcome_carried_out_once_with_its_ancestors(tmp_path: Path, durable: bool) -> None:
    stages = local(tmp_path, tree(tmp_path) if durable else None)
    first = stages.outcome(request(0, 1, 2))
    assert first.executed
    assert first.carried_out == tuple(key(request(*(0, 1, 2)[:n])) for n in (1, 2, 3))
    assert first.spent_s == 4.0  # the start too
    again = stages.outcome(request(0, 1, 2))
    assert again.outcome == first.outcome
    assert (again.executed, again.carried_out, again.spent_s) == (False, (), 0.0)
    assert ran(tmp_path) == list(first.carried_out)
    other = stages.outcome(request(0, 1, 1))
    assert other.carried_out == (key(request(0, 1, 1)),)


def test_test_requests_are_durable_too(tmp_path: Path) -> None:
    asked = request(0, 1).as_kind("test")
    answer = local(tmp_path, tree(tmp_path)).outcome(asked)
    assert answer.outcome.kind == "test" and answer.executed
    again = local(tmp_path, tree(tmp_path)).outcome(asked)
    assert again.outcome == answer.outcome and not again.executed
    assert len(ran(tmp_path, "test")) == 1
    start = local(tmp_path, tree(tmp_path)).outcome(request().as_kind("test"))
    assert start.outcome.metric == 12.0


def test_second_process_carries_out_nothing(tmp_path: Path) -> None:
    asked = [request(0), request(0, 1), request(0, 1, 0), request(2)]
    first = local(tmp_path, tree(tmp_path)).outcomes(asked)
    second = local(tmp_path, tree(tmp_path), replay_only=True).outcomes(asked)
    assert [a.outcome for a in second] == [a.outcome for a in first]
    assert not any(a.executed for a in second) and len(ran(tmp_path)) == 4


def test_stage_stores_only_the_levels_it_changed(tmp_path: Path) -> None:
    store = tree(tmp_path)
    answer = local(tmp_path, store).outcome(request(0, 1))
    states = store.states(key(request(0, 1)))
    assert states is not None and set(states) == {1}
    assert answer.outcome.versions == (key(request(0)), key(request(0, 1)), "pretrained")


def test_recomputed_weights_lead_to_the_same_outcome(tmp_path: Path) -> None:
    path = request(0, 1, 2, 0, 1, 2)
    undisturbed = local(tmp_path).outcome(path).outcome
    (tmp_path / "second").mkdir()
    store = tree(tmp_path, max_weight_bytes=0)
    stages = local(tmp_path / "second", store, memory_bytes=0)
    for n in range(1, 6):
        stages.outcome(request(*(0, 1, 2, 0, 1)[:n]))
    answer = stages.outcome(path)
    assert answer.outcome == undisturbed
    assert answer.executed and answer.carried_out == (key(path),)
    assert answer.recomputed
    assert open_storage(tmp_path / "runs").list("tree") and store.states(key(path)) is None


def test_recompute_goes_back_to_the_nearest_kept_ancestor_only(tmp_path: Path) -> None:
    stages = local(tmp_path, tree(tmp_path))
    stages.outcome(request(0, 1, 2))
    storage = open_storage(tmp_path / "runs")
    for asked in (request(0, 1), request(0, 1, 2)):
        storage.delete(f"tree/{key(asked)[:2]}/{key(asked)}.safetensors")
    forget(stages)
    answer = stages.outcome(request(0, 1, 2, 0))
    assert len(answer.recomputed) == 2 and answer.carried_out == (key(request(0, 1, 2, 0)),)
    assert ran(tmp_path).count(key(request(0))) == 1
    assert ran(tmp_path).count(key(request(0, 1))) == 2


def test_weights_lost_from_the_model_asked_for_are_recomputed(tmp_path: Path) -> None:
    stages = local(tmp_path, tree(tmp_path))
    expected = stages.state_dict(request(0, 1))
    for file in (tmp_path / "runs" / "tree").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-3])
    replay = local(tmp_path, tree(tmp_path), replay_only=True)
    found = replay.state_dict(request(0, 1))
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_cut_outcome_is_carried_out_again_to_the_same(tmp_path: Path) -> None:
    first = local(tmp_path, tree(tmp_path)).outcome(request(0, 1)).outcome
    name = key(request(0, 1))
    file = tmp_path / "runs" / "tree" / name[:2] / f"{name}.json"
    file.write_bytes(file.read_bytes()[:40])
    again = local(tmp_path, tree(tmp_path)).outcome(request(0, 1))
    assert again.executed and again.outcome == first
    assert local(tmp_path, tree(tmp_path)).outcome(request(0, 1)).executed is False


def test_diverged_stage_is_an_outcome_and_a_state_to_go_on_from(tmp_path: Path) -> None:
    stages = local(tmp_path, tree(tmp_path))
    diverged = stages.outcome(request(0, -1)).outcome
    assert diverged.diverged and diverged.versions == stages.outcome(request(0)).outcome.versions
    forget(stages)
    assert stages.outcome(request(0, -1, 2)).outcome.versions[1] == "pretrained"
    assert stages.state_dict(request(0, -1))["dense"].tolist() == [1.0] * 4


def test_engine_failure_names_the_stage_and_leaves_the_tree_usable(tmp_path: Path) -> None:
    stages = local(tmp_path, tree(tmp_path))
    (tmp_path / "fail").write_text("task1")
    with pytest.raises(
        StageError, match=r"got stage \[train@0 > train@2\] of task 'task1'.*ValueError: no such"
    ) as caught:
        stages.outcome(request(2, task=0))
        (tmp_path / "fail").unlink()
        stages.outcome(request(0, task=1))
        (tmp_path / "fail").write_text("task1")
        stages.outcome(request(0, 2, task=1))
    assert "\n" not in str(caught.value)
    (tmp_path / "fail").unlink()
    assert stages.outcome(request(0, 2, task=1)).executed


@pytest.mark.parametrize("retry", [False, True])
def test_failed_stage_is_tried_once_for_all_that_goes_on_from_it(
    tmp_path: Path, retry: bool
) -> None:
    stages = local(tmp_path, tree(tmp_path), retry=retry)
    (tmp_path / "fail").write_text("task0")
    tally = Tally()
    tolerant = TalliedStages(stages, tally)
    answers = [tolerant.outcome(request(*levels)) for levels in ((0, 1, 2), (0,), (0, 1), (0, 2))]
    assert all(answer.outcome.diverged for answer in answers) and tally.failed == 4
    assert "[train@0] of task 'task0'" in tally.failure
    assert (len(ran(tmp_path)) == 1) == (not retry)
    (tmp_path / "fail").unlink()
    assert tolerant.outcome(request(1)).outcome.diverged is False
    assert tolerant.outcome(request(0)).outcome.diverged is not retry


def test_replay_only_refuses_what_is_not_there(tmp_path: Path) -> None:
    local(tmp_path, tree(tmp_path)).outcome(request(0))
    stages = local(tmp_path, tree(tmp_path), replay_only=True)
    stages.outcome(request(0))
    with pytest.raises(StageError, match=r"must be in the tree.*\[train@1\] of task 'task0'"):
        stages.outcome(request(1))


def test_replicas_and_tasks_do_not_share_but_their_start(tmp_path: Path) -> None:
    stages = local(tmp_path)
    a, b = (stages.outcome(request(0, replica=r)).outcome for r in (0, 1))
    assert a.metric != b.metric
    assert len(ran(tmp_path, "start")) == 1


def test_real_engine_without_lasting_weights_gives_the_same(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 6, generator=generator), torch.arange(96) % 3
    task = Task(name="task0", train=(x, y), val=(x, y), test=(x, y))
    others = [Task(name=f"other{i}", train=(x, y), val=(x, y), test=(x, y)) for i in range(2)]
    suite = Suite(
        name="tiny",
        model=nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        ),
        levels={"conv": ["0"], "dense": ["2"], "head": ["4"]},
        train_tasks=[task],
        val_tasks=others[:1],
        test_tasks=others[1:],
    )
    paths = [request(*(0, 2, 2, 1, 0)[:n]) for n in range(6)]
    kept = LocalStages(Engine(suite))
    lost = LocalStages(Engine(suite), tree(tmp_path, max_weight_bytes=0), memory_bytes=0)
    stored = LocalStages(Engine(suite), TreeStore(open_storage(tmp_path / "b")), memory_bytes=0)
    n_recomputed = 0
    for path in paths:
        answers = [stages.outcome(path) for stages in (kept, lost, stored)]
        figures = [(a.outcome.metric, a.outcome.loss, a.outcome.versions) for a in answers]
        assert figures[0] == figures[1] == figures[2]
        # an engine that has only just started must not need what the others have at hand
        lost = LocalStages(Engine(suite), tree(tmp_path, max_weight_bytes=0), memory_bytes=0)
        stored.engine = Engine(suite)
        n_recomputed += len(answers[1].recomputed)
        assert not answers[2].recomputed
    assert n_recomputed > 0
    models = [stages.state_dict(paths[-1]) for stages in (kept, lost, stored)]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]) and torch.equal(value, models[2][name])


# -- unshared ----------------------------------------------------------------------------------


def episode(stages: LocalStages, *levels: int, namespace: str = "", task: int = 0) -> list[Outcome]:
    asked = [request(*levels[:n], task=task) for n in range(len(levels) + 1)]
    return [stages.outcome(one, namespace).outcome for one in asked]


def test_unshared_carries_out_every_stage_of_every_episode(tmp_path: Path) -> None:
    stages = local(tmp_path, tree(tmp_path), share=False)
    first = episode(stages, 0, 1, 2)
    assert ran(tmp_path) == [outcome.key for outcome in first[1:]]  # ancestors not again
    assert episode(stages, 0, 1, 2) == first
    assert len(ran(tmp_path)) == 6
    assert first == episode(local(tmp_path / "."), 0, 1, 2)
    assert not (tmp_path / "runs").exists()


def test_unshared_episodes_in_turn_do_not_disturb_each_other(tmp_path: Path) -> None:
    stages = local(tmp_path, share=False)
    for n in range(4):
        for namespace in "ab":
            for task in (0, 1):
                stages.outcome(request(*(0, 1, 2)[:n], task=task), namespace)
    assert len(ran(tmp_path)) == 3 * 2 * 2
    stages.outcome(request(0, 1, 2).as_kind("test"), "a")
    assert len(ran(tmp_path)) == 3 * 2 * 2


def test_unshared_recomputes_what_memory_lost(tmp_path: Path) -> None:
    stages = local(tmp_path, share=False, memory_bytes=0)
    assert episode(stages, 0, 1, 2) == episode(local(tmp_path), 0, 1, 2)


# -- account -----------------------------------------------------------------------------------


def test_tally_counts_logical_distinct_and_saved(tmp_path: Path) -> None:
    stages = local(tmp_path)
    one, two = Tally(), Tally()
    for tally in (one, two):
        for asked in (request(), request(0), request(0, 1), request(0, 1).as_kind("test")):
            tally.add(asked, stages.outcome(asked))
    assert (one.logical, one.distinct, one.executed) == (2, 2, 2)
    assert (one.logical_s, one.spent_s, one.saved_s) == (4.0, 4.0, 0.0)
    assert (two.logical, two.distinct, two.executed, two.saved_s) == (2, 2, 0, 4.0)
    total = Tally.total([one, Tally.from_json(two.as_json())])
    assert total.summary() == {
        "logical": 4,
        "distinct": 2,
        "executed": 2,
        "recomputed": 0,
        "failed": 0,
        "seconds_spent": 4.0,
        "seconds_saved": 4.0,
    }


# -- kill -9 -----------------------------------------------------------------------------------

# one process imports torch, and forks a fresh one per run
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["rlhf_ray.tree.store", "rlhf_ray.tree.stage_tree"])


def run_all(folder: Path, limit: int | None) -> None:
    torch.set_num_threads(1)
    store = tree(folder, max_weight_bytes=limit)
    stages = LocalStages(FakeEngine(folder, size=200_000), store, memory_bytes=4_000_000)
    (folder / "up").touch()
    stages.outcomes(ASKED)


PATHS = [(a, b, c)[:n] for a in range(3) for b in range(3) for c in range(3) for n in range(4)]
ASKED = list({path: request(*path) for path in PATHS}.values())


def committed(folder: Path) -> dict[str, Outcome]:
    store = tree(folder)
    found = {key(asked): store.get(key(asked)) for asked in ASKED}
    return {name: outcome for name, outcome in found.items() if outcome is not None}


def run_and_kill(folder: Path, limit: int | None, after_s: float | None) -> int | None:
    (folder / "up").unlink(missing_ok=True)
    process = FRESH.Process(target=run_all, args=(folder, limit))
    process.start()
    if after_s is not None:
        while not (folder / "up").exists():
            time.sleep(0.001)
        time.sleep(after_s)
        process.kill()
    process.join()
    return process.exitcode


def kill_at_random_instants(folder: Path, kills: int, limit: int | None) -> None:
    draw = random.Random(kills)
    (folder / "whole").mkdir()
    whole = LocalStages(FakeEngine(folder / "whole", size=200_000))
    undisturbed = {key(asked): whole.outcome(asked).outcome for asked in ASKED}
    n_hit = 0
    for attempt in range(kills + 1):
        (folder / "log").unlink(missing_ok=True)
        before = committed(folder)
        last = attempt == kills
        status = run_and_kill(folder, limit, None if last else draw.uniform(0, 0.3 / kills**0.5))
        assert status in ((0,) if last else (0, -9))
        n_hit += status == -9
        assert before.items() <= committed(folder).items()
        if limit is None:  # with one, committed stages are run again for their weights
            assert not before.keys() & set(ran(folder))
    assert committed(folder) == undisturbed
    assert n_hit


@pytest.mark.parametrize("limit", [None, 8_000_000])
def test_kill_at_random_instants_loses_nothing_committed(tmp_path: Path, limit: int | None) -> None:
    kill_at_random_instants(tmp_path, 5, limit)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 8_000_000])
def test_kill_at_random_instants_twenty_times(tmp_path: Path, limit: int | None) -> None:
    kill_at_random_instants(tmp_path, 20, limit)
