"""What a policy's choices hang on: how often another value of one feature would change them.

Model-agnostic and exact over the decisions met: no random shuffles, no gradients. It says what the
policy looks at, not what is good to look at; of features that carry the same thing each shows less.
No Ray here. Dimensions: N decisions, F feature, A action.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.evaluation.rollouts import Act
from rlhf_ray.policies.networks import LevelQNetwork, LevelQNetworks, masked
from rlhf_ray.policies.policy import Policy

MAX_DECISIONS = 96
"""Per level; of more, so many at even distances."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a level saw when it chose: its number, features (F,) and mask of open actions (A,)."""

    level: int
    features: NDArray[np.float32]
    mask: NDArray[np.int8]


def recorded(act: Act, decisions: list[Decision]) -> Act:
    """The same policy; what it sees is appended to `decisions`, from any thread."""

    def act_and_record(level: int, features: NDArray[np.float32], mask: NDArray[np.int8]) -> int:
        decisions.append(Decision(level=level, features=features, mask=mask))
        return act(level, features, mask)

    return act_and_record


def drivers(policy: Policy, decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """How much each level's choice hangs on each feature.

    A feature's value in one decision is replaced by its value in another decision of the same
    level; `changed` is the share of all such replacements after which the greedy action differs.

    Args:
        policy: who decided.
        decisions: as met in roll-outs, in any order.

    Returns:
        JSON-able, per level: `level` (its name), `decisions` (how many were met), `features`: name
        and `changed` in [0, 1] of those above 0, highest first; empty with fewer than two; None
        where it cannot be told, for tables.
    """
    networks = _networks(policy)
    found = []
    for level, name in enumerate(policy.levels):
        mine = sorted(
            (d for d in decisions if d.level == level),
            key=lambda d: (d.features.tobytes(), d.mask.tobytes()),
        )
        features = None
        if networks is not None:
            shares = _changed(networks.level(level), _thinned(mine)) if len(mine) > 1 else {}
            ordered = sorted(shares.items(), key=lambda item: -item[1])
            features = [{"name": policy.features[f], "changed": share} for f, share in ordered]
        found.append({"level": name, "decisions": len(mine), "features": features})
    return found


def _networks(policy: Policy) -> LevelQNetworks | None:
    """None for tables, which know states as a whole.

    With one feature replaced a state is one that does not occur (two operations as one stage): all
    tables answer those with their mean, and nothing would be told but how often features vary.
    """
    if policy.network is None:
        return None
    networks = LevelQNetworks(policy.network)
    networks.load_state_dict(dict(policy.weights))
    return networks


def _thinned(decisions: list[Decision]) -> list[Decision]:
    n = len(decisions)
    kept = np.unique(np.linspace(0, n - 1, min(n, MAX_DECISIONS)).round().astype(int))
    return [decisions[i] for i in kept]


def _changed(network: LevelQNetwork, decisions: Sequence[Decision]) -> dict[int, float]:
    """Feature -> share of replacements that change the action, where there is any."""
    features_NF = torch.from_numpy(np.stack([d.features for d in decisions]).astype(np.float32))
    mask_NA = torch.from_numpy(np.stack([d.mask for d in decisions]) != 0)
    n, shares = len(decisions), {}
    with torch.no_grad():
        chosen_N = masked(network.decided(features_NF), mask_NA).argmax(-1)
        for f in range(features_NF.shape[1]):
            if (features_NF[:, f] == features_NF[0, f]).all():
                continue
            swapped = features_NF.repeat_interleave(n, dim=0)  # row i * n + j: i with j's value
            swapped[:, f] = features_NF[:, f].repeat(n)
            values = masked(network.decided(swapped), mask_NA.repeat_interleave(n, dim=0))
            changed = int((values.argmax(-1) != chosen_N.repeat_interleave(n)).sum())
            if changed:
                shares[f] = changed / (n * (n - 1))
    return shares
