"""Tables of Q-values for levels that take turns: one table per level, a row per state.

No Ray, no network. A state is a feature vector, exactly: tables need an observation of finitely
many values (see `rlhf_ray.policies.observations.DISCRETE_GROUPS`).

Dimensions: B batch, N state, F feature, A action, L level.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.errors import InputError

PARTS = ("states", "values", "visits")
"""The tensors that a table is written as."""


class QTable:
    """One level's Q-values; a state's row is made when the state is first met.

    A state that was never learned from (no row, or a row without visits) is answered with the mean
    over those that were, each action's values weighted by how often it was tried: what the action
    is worth to this level on the whole. Without that a table would know nothing of an unseen task.

    Args:
        n_features: F.
        n_actions: A.
    """

    def __init__(self, n_features: int, n_actions: int) -> None:
        self.n_features, self.n_actions = n_features, n_actions
        self._row_of: dict[bytes, int] = {}
        # lists: single entries are read and written, which numpy does slowly
        self._values: list[list[float]] = []
        self._visits: list[list[int]] = []
        self._mean: list[float] | None = None

    def __len__(self) -> int:
        return len(self._values)

    def row(self, features_F: np.ndarray) -> int:
        """A state's row; a new one holds zeros."""
        row = self._row_of.setdefault(_key(features_F), len(self._values))
        if row == len(self._values):
            self._values.append([0.0] * self.n_actions)
            self._visits.append([0] * self.n_actions)
        return row

    def best(self, row: int, actions: Sequence[int]) -> float:
        """The highest value in a row among some actions."""
        values = self._values[row]
        return max(values[action] for action in actions)

    def learn(self, row: int, action: int, target: float, alpha: float) -> float:
        """`Q <- Q + alpha * (target - Q)`; returns the difference from the target before it."""
        values = self._values[row]
        error = target - values[action]
        values[action] += alpha * error
        self._visits[row][action] += 1
        self._mean = None
        return error

    def values(self, features_BF: Tensor) -> Tensor:
        """(B, A) float32 values to act on.

        Args:
            features_BF: float32.
        """
        found = []
        for features_F in features_BF.numpy():
            row = self._row_of.get(_key(features_F), -1)
            learned = row >= 0 and any(self._visits[row])
            found.append(self._values[row] if learned else self._unseen())
        return torch.tensor(found, dtype=torch.float32)

    def _unseen(self) -> list[float]:
        if self._mean is not None:
            return self._mean
        visits = np.array(self._visits, dtype=np.float64).reshape(-1, self.n_actions)
        values = np.array(self._values).reshape(-1, self.n_actions)
        total_A = np.maximum(visits.sum(axis=0), 1.0)
        mean: list[float] = ((values * visits).sum(axis=0) / total_A).tolist()
        self._mean = mean
        return mean

    def tensors(self) -> dict[str, Tensor]:
        """The table: `states` (N, F) float32, `values` (N, A) float64, `visits` (N, A) int64."""
        states = np.frombuffer(b"".join(self._row_of), dtype=np.float32)
        return {
            "states": torch.from_numpy(states.copy()).reshape(-1, self.n_features),
            "values": torch.tensor(self._values, dtype=torch.float64).reshape(-1, self.n_actions),
            "visits": torch.tensor(self._visits, dtype=torch.int64).reshape(-1, self.n_actions),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "QTable":
        """The table that `tensors` wrote."""
        states, values, visits = (torch.as_tensor(tensors[part]) for part in PARTS)
        table = cls(states.shape[1], values.shape[1])
        table._row_of = {_key(state): row for row, state in enumerate(states.numpy())}
        table._values, table._visits = values.tolist(), visits.tolist()
        return table


def as_weights(tables: Sequence[QTable]) -> dict[str, Tensor]:
    """All levels' tables as tensors by name: `levels.0.states`, ..."""
    return {
        f"levels.{level}.{part}": tensor
        for level, table in enumerate(tables)
        for part, tensor in table.tensors().items()
    }


def from_weights(
    weights: Mapping[str, Tensor], *, n_levels: int, n_features: int, n_actions: int
) -> tuple[QTable, ...]:
    """The tables that `as_weights` wrote.

    Raises:
        InputError: they are not of L levels, F features and A actions.
    """
    names = {f"levels.{level}.{part}" for level in range(n_levels) for part in PARTS}
    if set(weights) != names:
        raise InputError(
            f"weights must hold a table per level, got {sorted(weights)} for {n_levels} levels."
        )
    by_level = [
        {part: weights[f"levels.{level}.{part}"] for part in PARTS} for level in range(n_levels)
    ]
    for tensors in by_level:
        n_states = tensors["states"].shape[0]
        expected = {"states": (n_states, n_features)}
        expected |= dict.fromkeys(("values", "visits"), (n_states, n_actions))
        got = {part: tuple(tensors[part].shape) for part in PARTS}
        if got != expected:
            raise InputError(
                f"a table must have a column per feature and per action, got {got}, not {expected}."
            )
    return tuple(QTable.from_tensors(tensors) for tensors in by_level)


def _key(features_F: np.ndarray) -> bytes:
    # adding 0 turns -0 into 0: equal vectors have equal bytes
    return (np.asarray(features_F, dtype=np.float32) + np.float32(0.0)).tobytes()
