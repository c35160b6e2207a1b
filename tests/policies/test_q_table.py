import numpy as np
import pytest
import torch

from rlhf_ray.errors import InputError
from rlhf_ray.policies.q_table import QTable, as_weights, from_weights


def vector(*values):
    return np.array(values, dtype=np.float32)


def ask(table, *values):
    return table.values(torch.from_numpy(vector(*values)).unsqueeze(0))[0].tolist()


def test_learning_goes_alpha_of_the_way():
    table = QTable(2, 3)
    row = table.row(vector(1, 0))
    assert table.learn(row, 1, 4.0, 0.25) == 4.0
    assert table.learn(row, 1, 4.0, 0.25) == 3.0
    assert ask(table, 1, 0) == [0.0, 1.75, 0.0]
    assert table.best(row, (0, 1)) == 1.75
    assert table.best(row, (0, 2)) == 0.0


def test_a_state_is_its_feature_vector():
    table = QTable(2, 1)
    assert table.row(vector(0, 1)) == table.row(vector(-0.0, 1)) == 0
    assert table.row(vector(0, 0.5)) == 1
    assert len(table) == 2


def test_unseen_states_are_answered_with_the_mean_by_visits():
    table = QTable(1, 2)
    assert ask(table, 7) == [0.0, 0.0]
    for state, action, target in [(0, 0, 3.0), (0, 0, 3.0), (1, 0, 6.0), (1, 1, 5.0)]:
        table.learn(table.row(vector(state)), action, target, 1.0)
    met = table.row(vector(2))  # bootstrapped from, but never learned from
    assert ask(table, 7) == ask(table, 2) == [pytest.approx(4.0), 5.0]
    table.learn(met, 1, 9.0, 1.0)
    assert ask(table, 2) == [0.0, 9.0]
    assert ask(table, 7) == [pytest.approx(4.0), 7.0]


def test_tables_are_read_as_they_were_written():
    tables = [QTable(1, 2), QTable(1, 2)]
    tables[0].learn(tables[0].row(vector(0.1)), 1, 1 / 3, 0.7)
    weights = as_weights(tables)
    assert set(weights) == {
        f"levels.{i}.{p}" for i in (0, 1) for p in ("states", "values", "visits")
    }
    again = from_weights(weights, n_levels=2, n_features=1, n_actions=2)
    assert as_weights(again).keys() == weights.keys()
    for name, tensor in as_weights(again).items():
        assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name
    assert again[0].row(vector(0.1)) == 0 and len(again[1]) == 0


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({"n_levels": 2, "n_features": 1, "n_actions": 2}, "a table per level"),
        ({"n_levels": 1, "n_features": 2, "n_actions": 2}, "a column per feature and per action"),
        ({"n_levels": 1, "n_features": 1, "n_actions": 3}, "a column per feature and per action"),
    ],
)
def test_tables_of_another_shape_are_refused(shape, match):
    with pytest.raises(InputError, match=match):
        from_weights(as_weights([QTable(1, 2)]), **shape)
