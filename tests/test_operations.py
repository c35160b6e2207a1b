import json
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import InputError
from rlhf_ray.operations import (
    LEARNING_RATES,
    Align,
    Fit,
    Operation,
    Refit,
    Skip,
    StageSession,
    Stop,
    Train,
    default_operations,
    operation_as_json,
    operations_from_json,
)


@dataclass(frozen=True, kw_only=True)
class Shrink(Operation):
    factor: float = 0.5

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        return (level,)

    def run(self, session: StageSession) -> None:
        for parameter in session.parameters().values():
            parameter.data.mul_(self.factor)


@given(n_levels=st.integers(1, 6), data=st.data())
def test_scopes_say_which_levels_change(n_levels: int, data: st.DataObject) -> None:
    level = data.draw(st.integers(0, n_levels - 1))
    scopes = {
        scope: Train(name="t", learning_rate=1e-3, scope=scope).levels(level, n_levels)  # type: ignore[arg-type]
        for scope in ("level", "up", "all")
    }
    assert scopes["level"] == (level,)
    assert scopes["up"] == tuple(range(level, n_levels))
    assert scopes["all"] == tuple(range(n_levels))
    assert Skip().levels(level, n_levels) == Stop().levels(level, n_levels) == ()


def test_default_operations_are_eight_in_a_fixed_order() -> None:
    operations = default_operations(steps=None, batch_size=32, optimizer="sgd")
    assert [o.name for o in operations] == [
        "train_low", "train_mid", "train_high", "train_up", "train_all", "refit", "skip", "stop",
    ]  # fmt: skip
    trained = [o for o in operations if isinstance(o, Train)]
    assert tuple(o.learning_rate for o in trained[:3]) == LEARNING_RATES["sgd"]
    assert {o.learning_rate for o in trained[3:]} == {LEARNING_RATES["sgd"][1]}
    assert {(o.steps, o.batch_size) for o in trained} == {(None, 32)}
    with pytest.raises(InputError, match="learning_rates must be three"):
        default_operations(learning_rates=(1e-3,))


def test_bad_settings_of_align_and_fit_are_refused() -> None:
    with pytest.raises(InputError, match="examples must be at least 2, got examples=1"):
        Align(name="a", examples=1)
    with pytest.raises(InputError, match=r"margin must be in \[-1, 1\), got margin=1.0"):
        Align(name="a", margin=1.0)
    with pytest.raises(InputError, match=r"proximal must be >= 0, got proximal=-0.1"):
        Fit(name="f", proximal=-0.1)
    with pytest.raises(InputError, match="evaluations must be at least 1, got 0"):
        Refit(name="r", evaluations=0)
    with pytest.raises(InputError, match="evaluations must be at least 1, got 0"):
        Fit(name="f", evaluations=0)


def test_align_is_open_below_the_head_and_every_level_may_have_it_fitted() -> None:
    align, fit = Align(name="a"), Fit(name="f")
    assert [align.applies(level, 3) for level in range(3)] == [True, True, False]
    assert all(fit.applies(level, 3) and fit.levels(level, 3) == (2,) for level in range(3))
    assert align.applies(0, 1)
    refit = Refit(name="r", examples=10)
    assert refit.applies(2, 3) and not refit.applies(0, 1)
    assert refit.levels(1, 3) == (0, 1, 2)
    assert refit.passes((0, 1, 2), 100) == (((0, 1), 10), ((2,), 100))
    assert refit.parts == (Align(name="r", examples=10), Fit(name="r"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be > 0"),
        ({"steps": 0}, "steps and batch_size must be at least 1"),
        ({"batch_size": 0}, "steps and batch_size must be at least 1"),
        ({"optimizer": "lion"}, "optimizer must be 'adam' or 'sgd', got 'lion'"),
        ({"scope": "down"}, "scope must be one that exists, got scope='down'"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Train(**{"name": "t", "learning_rate": 1e-3, **change})  # type: ignore[arg-type]


def test_settings_identify_the_effect_and_not_the_name() -> None:
    base = Train(name="a", learning_rate=1e-3)
    assert base.settings() == replace(base, name="b").settings()
    assert base.settings() == replace(base, scope="all").settings()  # the path holds the levels
    for change in (
        {"learning_rate": 2e-3}, {"steps": None}, {"batch_size": 8}, {"optimizer": "sgd"},
        {"keep_optimizer_state": False}, {"level_scales": (1.0, 0.5)}, {"l2_sp": 0.1},
    ):  # fmt: skip
        assert replace(base, **change).settings() != base.settings()
    json.dumps(base.settings())


def test_own_operations_are_identified_by_code_and_fields() -> None:
    assert Shrink(name="a").settings() == Shrink(name="b").settings()
    assert Shrink(name="a").settings() != Shrink(name="a", factor=0.1).settings()
    assert Shrink(name="a").settings()["code"] != Skip().settings()["code"]


def test_examples_drawn() -> None:
    assert Train(name="t", learning_rate=1.0, steps=3, batch_size=5).examples_drawn(100) == 15
    assert Train(name="t", learning_rate=1.0, steps=None).examples_drawn(100) == 100
    assert Shrink(name="s").examples_drawn(100) == 0


def test_json_gives_back_the_operations_of_this_package_only() -> None:
    operations = (
        *default_operations(),
        Train(name="scaled", learning_rate=1e-3, scope="all", level_scales=(0.5, 1.0)),
    )
    data = json.loads(json.dumps([operation_as_json(o) for o in operations]))
    assert operations_from_json(data) == operations
    with pytest.raises(InputError, match=r"'cut' must be one of this package's, got kind='Shrink'"):
        operations_from_json([operation_as_json(Shrink(name="cut"))])
