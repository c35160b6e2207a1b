"""The families of shifts: what can have happened to the inputs or the labels of a task.

Every function takes a severity in [0, 1] (the more, the stronger; 0 may change something, too) and
a generator that it draws from in a fixed order: first what holds for the whole task (a direction,
a mask), then what differs from image to image. N images x of shape (N, 1, 28, 28), float64, in
[0, 1] stay in that range.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rlhf_ray.suites.images import N_CLASSES, SIZE

Kind = Literal["input", "geometric", "output"]


def _uniform(rng: Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _sign(rng: Generator) -> float:
    return 1.0 if _uniform(rng) < 0.5 else -1.0


def _ramp(rng: Generator) -> Tensor:
    """A plane from 0 to 1 over the image, in a drawn direction; (28, 28), float64."""
    angle = _uniform(rng, 0, 2 * math.pi)
    axis = torch.linspace(-0.5, 0.5, SIZE, dtype=torch.float64)
    plane = math.cos(angle) * axis[:, None] + math.sin(angle) * axis[None, :]
    return (plane - plane.min()) / (plane.max() - plane.min())


# --- input shifts


def noise(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """Gaussian noise on every pixel."""
    return (x + 1.2 * severity * torch.randn(x.shape, generator=rng, dtype=x.dtype)).clamp(0, 1)


def contrast(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """All values drawn together around mid-grey."""
    return 0.5 + (x - 0.5) * (1 - 0.95 * severity**0.5)


def blur(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """A Gaussian blur of up to 5.5 pixels standard deviation."""
    offsets = torch.arange(-12, 13).double()
    kernel = torch.exp(-0.5 * (offsets / (0.5 + 5 * severity)) ** 2)
    kernel = kernel / kernel.sum()
    x = F.conv2d(x, kernel.view(1, 1, 1, -1), padding=(0, 12))
    return F.conv2d(x, kernel.view(1, 1, -1, 1), padding=(12, 0)).clamp(0, 1)


def haze(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """A bright veil that thickens in one direction."""
    veil = severity * (0.35 + 0.6 * _ramp(rng))
    return x + veil * (1 - x)


def occlusion(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """A white square at one place, as of dirt on the lens."""
    side = round(5 + 8 * severity)
    top, left = (int(_uniform(rng, 2, 26 - side)) for _ in range(2))
    x = x.clone()
    x[:, :, top : top + side, left : left + side] = 1.0
    return x


def pixelate(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """A coarse sensor of 8 down to 3 cells a side."""
    coarse = F.adaptive_avg_pool2d(x, round(8 - 5 * severity))
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="nearest")


def stripes(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """Stripes, across or down, in which the image is inverted."""
    across = _uniform(rng) < 0.5
    line = (torch.arange(SIZE) % 4 < 2).double() * severity
    pattern = line[:, None].expand(SIZE, SIZE)
    return (x - (pattern if across else pattern.T)).abs()


def invert(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """The negative, darker at lower severity."""
    return severity * (1 - x)


def dead(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """Dead and hot pixels: the same for all images of a task."""
    broken = torch.rand((SIZE, SIZE), generator=rng) < 0.8 * severity
    value = (torch.rand((SIZE, SIZE), generator=rng) < 0.5).double()
    return torch.where(broken, value, x)


# --- geometric shifts


def _warp(x: Tensor, rows: list[list[float]]) -> Tensor:
    """Resamples by an affine map of output to input coordinates, both in [-1, 1]."""
    theta = torch.tensor([rows], dtype=x.dtype).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).clamp(0, 1)


def rotate(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """A rotation of up to 60 degrees, either way."""
    angle = _sign(rng) * severity * math.pi / 3
    cos, sin = math.cos(angle), math.sin(angle)
    return _warp(x, [[cos, -sin, 0.0], [sin, cos, 0.0]])


def translate(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """A move of up to 6 pixels in one direction."""
    angle, distance = _uniform(rng, 0, 2 * math.pi), severity * 12 / SIZE
    return _warp(
        x, [[1.0, 0.0, distance * math.cos(angle)], [0.0, 1.0, distance * math.sin(angle)]]
    )


def squeeze(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """Width or height pressed together, down to 35%."""
    factor = 1 / (1 - 0.65 * severity)
    wide = _uniform(rng) < 0.5
    return _warp(x, [[factor if wide else 1.0, 0.0, 0.0], [0.0, 1.0 if wide else factor, 0.0]])


def wave(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """Rows or columns displaced along a sine of up to 7 pixels."""
    down, phase = _uniform(rng) < 0.5, _uniform(rng, 0, 2 * math.pi)
    axis = (torch.arange(SIZE).double() + 0.5) * 2 / SIZE - 1
    vertical, horizontal = torch.meshgrid(axis, axis, indexing="ij")
    along = horizontal if down else vertical
    shift = severity * 14 / SIZE * torch.sin(2 * math.pi * along + phase)
    moved = (horizontal, vertical + shift) if down else (horizontal + shift, vertical)
    grid = torch.stack(moved, dim=-1).expand(len(x), SIZE, SIZE, 2)
    return F.grid_sample(x, grid, align_corners=False).clamp(0, 1)


def shear(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """A slant, either way."""
    return _warp(x, [[1.0, _sign(rng) * 1.1 * severity, 0.0], [0.0, 1.0, 0.0]])


def scale(x: Tensor, severity: float, rng: Generator) -> Tensor:
    """Made smaller, down to 45%."""
    factor = 1 / (1 - 0.55 * severity)
    return _warp(x, [[factor, 0.0, 0.0], [0.0, factor, 0.0]])


# --- output shifts: a permutation p of the classes, (10,); the new label of class c is p[c]


def _moved(severity: float, rng: Generator) -> Tensor:
    """The classes that change their label, in random order: 4 at a severity of 1/3, 10 at 1."""
    return torch.randperm(N_CLASSES, generator=rng)[: round(1 + 9 * severity)]


def permute(severity: float, rng: Generator) -> Tensor:
    """Some classes take one another's labels in one random cycle, so that none keeps its own."""
    p, moved = torch.arange(N_CLASSES), _moved(severity, rng)
    p[moved] = moved.roll(1)
    return p


def cycle(severity: float, rng: Generator) -> Tensor:
    """The first classes move on by one to three labels."""
    p, count = torch.arange(N_CLASSES), round(1 + 9 * severity)
    p[:count] = p[:count].roll(1 + int(_uniform(rng, 0, 3)))
    return p


def swap(severity: float, rng: Generator) -> Tensor:
    """Pairs of classes have their labels flipped."""
    p, moved = torch.arange(N_CLASSES), _moved(severity, rng)
    pairs = moved[: len(moved) // 2 * 2].view(-1, 2)
    p[pairs] = pairs.flip(1)
    return p


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of shift.

    Attributes:
        kind: "input" and "geometric" change x, "output" changes y.
        group: 0, 1 or 2: families of one group are test tasks' together (`generate.groups`).
        apply: (x, severity, generator) -> x; of an output shift (severity, generator) -> the
            permutation of the classes, (10,).
    """

    kind: Kind
    group: int
    apply: Callable[..., Tensor]

    @property
    def name(self) -> str:
        """The function's name."""
        return self.apply.__name__


N_GROUPS = 3
# By group; in fold 0 the last one is the test tasks'.
_GROUPS: dict[Kind, tuple[tuple[Callable[..., Tensor], ...], ...]] = {
    "input": ((noise, contrast, blur), (haze, occlusion, pixelate), (stripes, invert, dead)),
    "geometric": ((rotate, translate), (squeeze, wave), (shear, scale)),
    "output": ((permute,), (cycle,), (swap,)),
}
FAMILIES: tuple[Family, ...] = tuple(
    Family(kind=kind, group=group, apply=apply)
    for kind, groups in _GROUPS.items()
    for group, functions in enumerate(groups)
    for apply in functions
)
"""The table of all families; `generate.groups` says which of them a role has."""
