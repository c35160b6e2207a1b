"""Q-networks for levels that take turns: one policy per level, with or without a shared encoder.

For comparison, one policy for all levels: the features alone tell it whose turn it is.

Plain torch, no Ray: the search trains these networks inside RLlib, a saved policy runs them alone.
Every network may be an ensemble of members (M), evaluated in one batched product per layer.

Dimensions: B batch, L level, F feature, A action, M ensemble member, H hidden unit.
"""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError

EncoderKind = Literal["shared", "separate"]
Controller = Literal["levels", "single"]

UNTRIED = -1e6
"""What an action counts that was not met often enough to leave a schedule for it."""

HEAD_SCALE = 0.1
"""Initial scale of the heads: values of actions never tried start near 0, not at random."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Shape of the levels' Q-networks.

    Attributes:
        n_levels: L, >= 1.
        n_features: F, >= 1.
        n_actions: A, >= 1, the same for all levels.
        hidden: units of each hidden layer of the encoder, at least one layer.
        dueling: values as state value plus centred advantages (Wang et al. 2016).
        encoder: "shared": one encoder under all heads; "separate": an encoder per level.
        controller: "levels": a head per level; "single": one head decides at every level's turn.
        n_members: M, independently initialised members of an ensemble, >= 1.
        pessimism: standard deviations over members that are taken off the mean, >= 0.
        schedule: per stages done (rows) and acting level, the action that is taken unless another
            is surely better; None: the highest value alone decides.
        progress: place of the feature that tells stages done as a part of the schedule's rows.
        least_tried: times that an action must have been met, after as many stages and at the same
            level, before the schedule is left for it, >= 0.
        assurance: standard deviations over members of its advantage over the schedule's action
            that are taken off that advantage, >= 0.
        margin: what is left must exceed this, >= 0, in units of the reward.
        departs: False: the schedule is left only where its own action is not open.
    """

    n_levels: int
    n_features: int
    n_actions: int
    hidden: tuple[int, ...] = (64, 64)
    dueling: bool = True
    encoder: EncoderKind = "shared"
    controller: Controller = "levels"
    n_members: int = 1
    pessimism: float = 0.0
    schedule: tuple[tuple[int, ...], ...] | None = None
    progress: int = 0
    least_tried: int = 5
    assurance: float = 2.0
    margin: float = 0.003
    departs: bool = True

    def __post_init__(self) -> None:
        sizes = {
            "n_levels": self.n_levels,
            "n_features": self.n_features,
            "n_actions": self.n_actions,
            "n_members": self.n_members,
            "hidden": min(self.hidden, default=0),
        }
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {name}={value}.")
        if self.encoder not in ("shared", "separate"):
            raise InputError(f"encoder must be 'shared' or 'separate', got {self.encoder!r}.")
        if self.controller not in ("levels", "single"):
            raise InputError(f"controller must be 'levels' or 'single', got {self.controller!r}.")
        if self.controller == "single" and self.encoder == "separate":
            raise InputError(
                "encoder must be 'shared' for a single controller, got encoder='separate'."
            )
        for name in ("pessimism", "least_tried", "assurance", "margin"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be finite and >= 0, got {name}={value}.")
        actions = [action for row in self.schedule or () for action in row]
        if not all(0 <= action < self.n_actions for action in actions):
            raise InputError(
                f"schedule must hold actions in [0, {self.n_actions - 1}], got "
                f"schedule={self.schedule}."
            )

    @property
    def n_heads(self) -> int:
        """Heads there are."""
        return 1 if self.controller == "single" else self.n_levels

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON-able values; `NetworkSettings(**...)` takes them back."""
        return {**asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "NetworkSettings":
        """The settings that `to_json` wrote."""
        rows = fields.get("schedule")
        schedule = None if rows is None else tuple(tuple(row) for row in rows)
        return cls(**{**fields, "hidden": tuple(fields["hidden"]), "schedule": schedule})


class MemberLinear(nn.Module):
    """M linear layers side by side: (M, B, n_in) -> (M, B, n_out)."""

    def __init__(
        self, n_members: int, n_in: int, n_out: int, generator: torch.Generator, scale: float = 1.0
    ) -> None:
        super().__init__()
        bound = scale / math.sqrt(n_in)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) * bound)

        self.weight = draw(n_members, n_in, n_out)
        self.bias = draw(n_members, 1, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Applies every member to its own slice of `x`."""
        return torch.baddbmm(self.bias, x, self.weight)


class LevelQNetwork(nn.Module):
    """One level's policy: encoder and head, either perhaps shared with other levels."""

    tried: Tensor | None

    def __init__(
        self,
        encoder: nn.ModuleList,
        head: MemberLinear,
        settings: NetworkSettings,
        level: int,
        tried: Tensor | None,
    ) -> None:
        super().__init__()
        self.index = level
        self.register_buffer("tried", tried)
        self.encoder = encoder
        self.head = head
        self.settings = settings

    def forward(self, features_BF: Tensor) -> Tensor:
        """Q-values of every member.

        Args:
            features_BF: float32.

        Returns:
            (M, B, A) float32.
        """
        x = features_BF.expand(self.settings.n_members, *features_BF.shape)
        for layer in self.encoder:
            x = torch.relu(layer(x))
        return _q_values(self.head(x), self.settings)

    def values(self, features_BF: Tensor) -> Tensor:
        """(B, A) Q-values: the mean over members less `pessimism` deviations."""
        return pessimistic(self(features_BF), self.settings.pessimism)

    def decided(self, features_BF: Tensor) -> Tensor:
        """(B, A) values by which to act: see `decided`."""
        level_B = torch.full((len(features_BF),), self.index)
        return decided(self(features_BF), features_BF, level_B, self.settings, self.tried)


class LevelQNetworks(nn.Module):
    """The Q-networks of all levels.

    Args:
        settings: their shape.
        seed: of the initial weights; equal seeds give equal weights.
    """

    tried: Tensor | None

    def __init__(self, settings: NetworkSettings, *, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        n_encoders = 1 if settings.encoder == "shared" else settings.n_levels
        self.encoders = nn.ModuleList(_encoder(settings, seed, i) for i in range(n_encoders))
        self.heads = nn.ModuleList(_head(settings, seed, i) for i in range(settings.n_heads))
        shape = (len(settings.schedule or ()), settings.n_levels, settings.n_actions)
        self.register_buffer("tried", torch.zeros(shape) if settings.schedule else None)

    def level(self, level: int) -> LevelQNetwork:
        """One level's network; its parameters are the ones held here."""
        encoder = self.encoders[level % len(self.encoders)]
        head = self.heads[level % len(self.heads)]
        return LevelQNetwork(encoder, head, self.settings, level, self.tried)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def note_tried(self, features_NF: Tensor, level_N: Tensor, action_N: Tensor) -> None:
        """Counts, where there is a schedule, how often each action was met, by stages and level."""
        if self.tried is None:
            return
        done_N = stages_done(features_NF, self.settings)
        n, (_, n_levels, n_actions) = self.tried.numel(), self.tried.shape
        place_N = (done_N * n_levels + level_N) * n_actions + action_N
        self.tried.copy_(torch.bincount(place_N, minlength=n).view(self.tried.shape))

    def forward(self, features_BF: Tensor, level_B: Tensor) -> Tensor:
        """Q-values of a mixed batch, each row by its own level's network.

        All levels' heads (and encoders) are evaluated on all rows in one product per layer, and
        each row takes its own: cheaper for small networks than one pass per level.

        Args:
            features_BF: float32.
            level_B: int64, the level whose network is asked.

        Returns:
            (M, B, A) float32.
        """
        shape, batch = self.settings, features_BF.shape[0]
        n_encoders = len(self.encoders)
        x = features_BF.expand(n_encoders * shape.n_members, *features_BF.shape)
        for i in range(len(shape.hidden)):
            x = torch.relu(_stacked([encoder[i] for encoder in self.encoders], x))  # pyright: ignore[reportIndexIssue]
        if n_encoders == 1:
            # all heads side by side on one encoding: (M, B, L * n_out)
            weight = torch.cat([head.weight for head in self._heads()], dim=-1)
            bias = torch.cat([head.bias for head in self._heads()], dim=-1)
            out = torch.baddbmm(bias, x, weight)
            out_MBLO = out.view(shape.n_members, batch, shape.n_heads, -1)
        else:
            out = _stacked(self._heads(), x).view(shape.n_levels, shape.n_members, batch, -1)
            out_MBLO = out.permute(1, 2, 0, 3)
        if shape.n_heads == 1:
            return _q_values(out_MBLO.squeeze(2), shape)
        n_out = out_MBLO.shape[-1]
        index_MB1O = level_B.view(1, -1, 1, 1).expand(shape.n_members, -1, 1, n_out)
        return _q_values(out_MBLO.gather(2, index_MB1O).squeeze(2), shape)

    def _heads(self) -> list[Any]:
        return list(self.heads)


def pessimistic(values_MBA: Tensor, pessimism: float) -> Tensor:
    """(B, A) mean over members, less `pessimism` standard deviations."""
    mean = values_MBA.mean(dim=0)
    if pessimism == 0.0 or values_MBA.shape[0] == 1:
        return mean
    return mean - pessimism * values_MBA.std(dim=0, correction=0)


def stages_done(features_BF: Tensor, settings: NetworkSettings) -> Tensor:
    """(B,) int64, as the features tell it; needs a schedule."""
    horizon = len(settings.schedule or ())
    return (features_BF[:, settings.progress] * horizon).round().long().clamp(0, horizon - 1)


def decided(
    values_MBA: Tensor,
    features_BF: Tensor,
    level_B: Tensor,
    settings: NetworkSettings,
    tried: Tensor | None,
) -> Tensor:
    """(B, A) values by which a policy decides, the highest open one.

    Without a schedule: see `pessimistic`. With one: the members' mean advantage over the schedule's
    action less `assurance` deviations of it, and `margin` for that action itself, so that it is
    departed from only where that is surely better and has been tried (safe policy improvement with
    baseline bootstrapping, Laroche et al. 2019, which goes by counts; an ensemble's spread, too).

    Args:
        values_MBA: Q-values of the members.
        features_BF: they are of.
        level_B: int64, who acts.
        settings: of the networks.
        tried: (stages done, level, action): how often it was met; None without a schedule.
    """
    if settings.schedule is None or tried is None:
        return pessimistic(values_MBA, settings.pessimism)
    done_B = stages_done(features_BF, settings)
    place_B1 = torch.tensor(settings.schedule)[done_B, level_B].unsqueeze(-1)
    usual_MB1 = values_MBA.gather(-1, place_B1.expand(len(values_MBA), -1, 1))
    sure = pessimistic(values_MBA - usual_MB1, settings.assurance)
    if not settings.departs:  # below the schedule's action, in their own order
        sure = sure - sure.amax(-1, keepdim=True) - 1.0
    # below every other, but above what is not open: the schedule's action may not be open itself
    sure = sure.where(tried[done_B, level_B] >= settings.least_tried, UNTRIED)
    return sure.scatter(-1, place_B1, settings.margin)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values, with minus infinity where `mask` (broadcast from the right) is 0."""
    return values.masked_fill(mask == 0, -torch.inf)


def _q_values(out: Tensor, settings: NetworkSettings) -> Tensor:
    if not settings.dueling:
        return out
    advantage = out[..., 1:]
    return out[..., :1] + advantage - advantage.mean(dim=-1, keepdim=True)


def _stacked(layers: list[Any], x: Tensor) -> Tensor:
    if len(layers) == 1:
        return torch.baddbmm(layers[0].bias, x, layers[0].weight)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return torch.baddbmm(bias, x, weight)


def _encoder(settings: NetworkSettings, seed: int, index: int) -> nn.ModuleList:
    generator = torch.Generator().manual_seed(derive_seed(seed, "encoder", index))
    sizes = (settings.n_features, *settings.hidden)
    return nn.ModuleList(
        MemberLinear(settings.n_members, n_in, n_out, generator) for n_in, n_out in pairwise(sizes)
    )


def _head(settings: NetworkSettings, seed: int, level: int) -> MemberLinear:
    generator = torch.Generator().manual_seed(derive_seed(seed, "head", level))
    n_out = settings.n_actions + int(settings.dueling)
    return MemberLinear(settings.n_members, settings.hidden[-1], n_out, generator, HEAD_SCALE)
