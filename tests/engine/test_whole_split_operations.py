"""Align and Fit as stages of the engine: their account, their caches, their effect."""

from dataclasses import dataclass, replace

import pytest
import torch
import zoo
from test_stages import suite_of
from torch.utils.flop_counter import FlopCounterMode

from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.engine.support import supported, what_there_is
from rlhf_ray.errors import InputError
from rlhf_ray.operations import (
    Align,
    Fit,
    Operation,
    Refit,
    StageSession,
    Train,
    default_operations,
)
from rlhf_ray.outcomes import StagePath, StageRequest, StageStep
from rlhf_ray.tree.stage_tree import LocalStages

SETTINGS = EngineSettings(device="cpu", val_size=10, probe_size=6)
ALIGN, FIT = Align(name="align", examples=8, margin=-1), Fit(name="fit", evaluations=20)
REFIT = Refit(name="refit", examples=8, margin=-1, evaluations=20)
TRAIN = Train(name="train", learning_rate=1e-2, steps=4, batch_size=8)
CASES = ["cnn2", "cnn4", "norm_cnn", "resnet18", "transformer"]


def step(operation: Operation, level: int, n_levels: int) -> StageStep:
    return StageStep(operation=operation, levels=operation.levels(level, n_levels))


def path_for(n_levels: int) -> StagePath:
    last = n_levels - 1
    turns = (
        (ALIGN, 0), (FIT, last), (TRAIN, last), (ALIGN, last - 1), (REFIT, 0), (TRAIN, last),
    )  # fmt: skip
    return tuple(step(operation, level, n_levels) for operation, level in turns)


@pytest.mark.parametrize("name", CASES)
def test_cached_and_uncached_agree(name: str) -> None:
    suite = suite_of(zoo.CASES[name])
    path = path_for(len(suite.levels))
    outcomes = [
        LocalStages(Engine(suite, settings)).outcome(StageRequest(task="task", path=path)).outcome
        for settings in (SETTINGS, EngineSettings(device="cpu", val_size=10, cache_bytes=0))
    ]
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-2, abs=1e-4)
    assert outcomes[0].flops == outcomes[1].flops


@pytest.mark.parametrize("name", CASES)
def test_account_is_what_torch_counts(name: str) -> None:
    suite = suite_of(zoo.CASES[name])
    path = path_for(len(suite.levels))
    engine = Engine(suite, SETTINGS)
    stages, prices = LocalStages(engine), engine.prices([ALIGN, FIT, REFIT, TRAIN])
    stages.outcome(StageRequest(task="task"))
    for n in range(1, len(path) + 1):
        request = StageRequest(task="task", path=path[:n])
        with FlopCounterMode(display=False) as counter:
            outcome = stages.outcome(request).outcome
        flops = sum(outcome.flops.values())
        assert flops == pytest.approx(counter.get_total_flops(), rel=1e-9)
        assert prices("task", path[:n]) == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize("level", [0, 1])
def test_aligning_to_the_source_what_is_the_source_changes_little(level: int) -> None:
    suite = suite_of(zoo.CASES["cnn4"])
    task = suite.train_tasks[0]
    same = Engine(suite, SETTINGS)
    outputs = same.source_moments()
    assert outputs is not None and set(outputs.outputs) == {"0", "3", "7", "9"}
    path = (step(Align(name="align", examples=20, margin=-1), level, 4),)
    stages = LocalStages(same)
    before = stages.outcome(StageRequest(task=task.name)).outcome
    after = stages.outcome(StageRequest(task=task.name, path=path)).outcome
    assert after.versions[level] != before.versions[level]
    assert after.loss == pytest.approx(before.loss, rel=0.2)


def test_fit_lowers_the_train_loss_and_changes_the_output_layer_alone() -> None:
    suite = suite_of(zoo.CASES["cnn2"])  # its last level holds two layers
    stages = LocalStages(Engine(suite, SETTINGS))
    request = StageRequest(task="task", path=(step(FIT, 1, 2),))
    before = stages.outcome(StageRequest(task="task")).outcome
    after = stages.outcome(request).outcome
    assert after.train_loss < before.train_loss
    state = stages.state_dict(request)
    changed = {n for n, v in suite.model.state_dict().items() if not torch.equal(v, state[n])}
    assert changed == {"9.weight", "9.bias"}


def test_operations_are_left_out_where_the_suite_has_not_what_they_need() -> None:
    suite = suite_of(zoo.CASES["unet"])  # ends with a convolution
    assert what_there_is(suite) == {"source", "readable targets"}
    suite = suite_of(zoo.CASES["cnn4"])
    object.__setattr__(suite, "source", None)
    kept, left_out = supported(suite, default_operations())
    assert [type(o) for o in kept if o.name == "refit"] == [Fit]
    assert [line.split(" needs")[0] for line in left_out] == ["only the fit of refit: refit"]
    kept, left_out = supported(suite, [Align(name="align")])
    assert not kept and left_out[0].startswith("without align: align needs source data")
    with pytest.raises(InputError, match="possible on the suite, got 'align' for 'zoo'"):
        supported(suite, [Align(name="align")], asked=("align",))


def test_an_alignment_that_is_taken_back_leaves_the_state_and_evaluates_nothing() -> None:
    suite = suite_of(zoo.CASES["cnn4"])
    engine = Engine(suite, SETTINGS)
    stages, prices = LocalStages(engine), engine.prices([ALIGN, FIT, REFIT, TRAIN])
    timid = step(Align(name="timid", examples=8, margin=0.99), 0, 4)
    path = (step(TRAIN, 3, 4), timid, step(TRAIN, 3, 4))
    before = stages.outcome(StageRequest(task="task", path=path[:1])).outcome
    with FlopCounterMode(display=False) as counter:
        after = stages.outcome(StageRequest(task="task", path=path[:2])).outcome
    assert after.versions == before.versions
    assert (after.metric, after.loss) == (before.metric, before.loss)
    assert after.flops["evaluate"] == 0 and not after.diverged
    assert sum(after.flops.values()) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert sum(after.flops.values()) < prices("task", path[:2])
    # what comes next goes on from there, its optimizer's state included
    last = stages.outcome(StageRequest(task="task", path=path)).outcome
    assert last.versions[:3] == before.versions[:3] and last.versions[3] == last.key
    again = LocalStages(Engine(suite, SETTINGS)).outcome(StageRequest(task="task", path=path))
    assert again.outcome.loss == last.loss


def test_a_refit_evaluates_from_the_lowest_level_that_it_changed() -> None:
    suite = suite_of(zoo.CASES["cnn4"])
    engine = Engine(suite, SETTINGS)
    stages = LocalStages(engine)
    timid = step(Refit(name="timid", examples=8, margin=0.99), 0, 4)
    engine.prices([timid.operation])  # counts, which the counter below would count, too
    before = stages.outcome(StageRequest(task="task")).outcome
    with FlopCounterMode(display=False) as counter:
        after = stages.outcome(StageRequest(task="task", path=(timid,))).outcome
    assert sum(after.flops.values()) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert after.versions[:3] == before.versions[:3] and after.versions[3] == after.key
    alone = stages.outcome(StageRequest(task="task", path=(step(FIT, 0, 4),))).outcome
    assert after.flops["evaluate"] == alone.flops["evaluate"]
    bold = step(Refit(name="bold", examples=8, margin=-1), 0, 4)
    path = (bold, step(TRAIN, 3, 4))
    assert set(stages.outcome(StageRequest(task="task", path=path)).outcome.versions) == {
        stages.identity.key(StageRequest(task="task", path=path[:1])),
        stages.identity.key(StageRequest(task="task", path=path)),
    }


@dataclass(frozen=True, kw_only=True)
class InParts(Operation):
    """Works on all levels, in parts that undo what was kept by the parts before."""

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        return tuple(range(n_levels))

    def examples_drawn(self, n_train: int) -> int:
        return n_train


class AlignEach(InParts):
    """Every level but the last by itself."""

    def run(self, session: StageSession) -> None:
        for level in session.levels[:-1]:
            session.align(Align(name="one", examples=20, margin=-1), (level,))


class FitThenTrain(InParts):
    """LP-FT as one stage."""

    def run(self, session: StageSession) -> None:
        session.fit(FIT)
        session.train(TRAIN)


class AlignTimidlyThenTrain(InParts):
    """What is taken back is trained all the same."""

    def run(self, session: StageSession) -> None:
        session.align(Align(name="timid", examples=20, margin=0.99), session.levels[:-1])
        session.train(TRAIN)


class HalveThenFit(InParts):
    """Changes parameters by hand, again and again."""

    def run(self, session: StageSession) -> None:
        parameters = session.parameters()
        for _ in range(2):
            session.fit(FIT)
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.mul_(0.9)
        session.fit(FIT)


@pytest.mark.parametrize("kind", [AlignEach, FitThenTrain, AlignTimidlyThenTrain, HalveThenFit])
def test_operations_in_parts_leave_no_stale_activations(kind: type[InParts]) -> None:
    suite = suite_of(zoo.CASES["cnn4"])
    stages = LocalStages(Engine(suite, SETTINGS))
    uncached = LocalStages(Engine(suite, replace(SETTINGS, cache_bytes=0)))
    composed = step(kind(name="composed"), 0, 4)
    one_epoch = Train(name="train", learning_rate=1e-2, steps=None, batch_size=8)
    above = tuple(StageStep(operation=one_epoch, levels=(level,)) for level in (3, 2))
    for path in ((composed, *above), above):  # the second: what others have to do with it
        request = StageRequest(task="task", path=path)
        outcome, exact = (s.outcome(request).outcome for s in (stages, uncached))
        assert outcome.loss == pytest.approx(exact.loss, rel=1e-4)
        state, exact_state = (s.state_dict(request) for s in (stages, uncached))
        for name, value in exact_state.items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
