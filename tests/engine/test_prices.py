import pickle

import pytest
import zoo
from test_stages import suite_of

from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.operations import Train, default_operations
from rlhf_ray.outcomes import StageRequest, StageStep
from rlhf_ray.policies.finetuning import process_spec
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import ProcessSettings
from rlhf_ray.tasks import accuracy
from rlhf_ray.tree.stage_tree import LocalStages

SETTINGS = EngineSettings(device="cpu", val_size=10)


@pytest.mark.parametrize("steps", [1, None])
@pytest.mark.parametrize("name", ["cnn4", "lstm"])
def test_a_price_is_what_the_outcome_will_say(name: str, steps: int | None) -> None:
    suite = suite_of(zoo.CASES[name])
    train = Train(name="train", learning_rate=1e-3, steps=steps, batch_size=4)
    engine = Engine(suite, SETTINGS)
    prices = pickle.loads(pickle.dumps(engine.prices([train])))
    last, stages, path = len(suite.levels) - 1, LocalStages(engine), ()
    for levels in ((last,), (0,), tuple(range(last + 1)), (last,)):
        path = (*path, StageStep(operation=train, levels=levels))
        outcome = stages.outcome(StageRequest(task="task", path=path)).outcome
        assert prices("task", path) == pytest.approx(sum(outcome.flops.values()), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "priced"),
    [({}, False), ({"budget": 2.0}, True), ({"budget": 2.0, "cost": "seconds"}, False)],
)
def test_prices_are_counted_where_a_budget_in_flops_needs_them(
    settings: dict[str, object], priced: bool
) -> None:
    suite = suite_of(zoo.CASES["cnn4"])
    spec = process_spec(
        tuple(suite.levels),
        default_operations(steps=1, batch_size=4),
        Engine(suite, SETTINGS),
        accuracy,
        Observer(),
        ProcessSettings(**settings),  # type: ignore[arg-type]
    )
    assert (spec.price is not None) == priced
