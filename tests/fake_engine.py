"""An engine of toy stages: fast, deterministic by key, and a log of what it ran.

A file stands for each wish of a test: `log` gets a line "kind key" per run, `slow` holds the
seconds that a stage lasts, while there is a `gate` stages wait, `fail` the task whose stages raise.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rlhf_ray.digests import derive_seed
from rlhf_ray.operations import Train
from rlhf_ray.outcomes import (
    PRETRAINED,
    Identity,
    LevelState,
    Outcome,
    StageRequest,
    StageStep,
)

IDENTITY = Identity(
    model="m" * 64,
    levels=("conv", "dense", "head"),
    tasks={f"task{i}": f"digest{i}" for i in range(8)},
    precision="fp32",
    val_size=8,
)


def request(*levels: int, task: int = 0, rate: float = 1e-3, replica: int = 0) -> StageRequest:
    """A path that trains one level after another; a negative level: a stage that diverges."""
    path = tuple(
        StageStep(
            operation=Train(name="train", learning_rate=rate, steps=2 if level >= 0 else 1),
            levels=(abs(level),),
        )
        for level in levels
    )
    return StageRequest(task=f"task{task}", path=path, replica=replica)


class FakeEngine:
    """Weights of a level after a stage: 0.5 w + noise of the key; metric: their sum."""

    def __init__(self, folder: Path, size: int = 4) -> None:
        self.identity = IDENTITY
        self.n_levels = 3
        self._folder = folder
        self._size = size
        self._inside = False

    def start(self, request: StageRequest) -> Outcome:
        self._note("start", request)
        return self._outcome(request, (PRETRAINED,) * 3, lambda version, level: _nothing())

    def run(
        self,
        request: StageRequest,
        parent: Outcome,
        load: Callable[[str, int], LevelState],
    ) -> tuple[Outcome, dict[int, LevelState]]:
        assert not self._inside, "an engine is not re-entrant"
        self._inside = True
        try:
            return self._run(request, parent, load)
        finally:
            self._inside = False

    def release(self) -> None:
        self.released = getattr(self, "released", 0) + 1

    def _run(
        self,
        request: StageRequest,
        parent: Outcome,
        load: Callable[[str, int], LevelState],
    ) -> tuple[Outcome, dict[int, LevelState]]:
        key = self.identity.key(request)
        states = {}
        generator = torch.Generator().manual_seed(derive_seed(key))
        for level in request.path[-1].levels:
            old = self._weights(parent.versions[level], level, load)
            new = 0.5 * old + torch.randn(self._size, generator=generator)
            states[level] = LevelState(
                weights={"w": new}, optimizer={"exp_avg/w": new * 2}, optimizer_name="adam"
            )
        for level, version in enumerate(parent.versions):
            self._weights(version, level, load)
        self._note("run", request)
        while (self._folder / "gate").exists():
            time.sleep(0.01)
        slow = self._folder / "slow"
        if slow.exists():
            time.sleep(float(slow.read_text()))
        fail = self._folder / "fail"
        if fail.exists() and fail.read_text() == request.task:
            raise ValueError("no such thing\nand more")
        if request.path[-1].operation.settings().get("steps") == 1:
            return self._outcome(request, parent.versions, load, diverged=True), {}
        versions = tuple(
            key if level in states else version for level, version in enumerate(parent.versions)
        )

        def load_new(version: str, level: int) -> LevelState:
            return states[level] if version == key else load(version, level)

        return self._outcome(request, versions, load_new), states

    def test(
        self, request: StageRequest, state: Outcome, load: Callable[[str, int], LevelState]
    ) -> Outcome:
        self._note("test", request)
        return self._outcome(request, state.versions, load)

    def state_dict(
        self, state: Outcome, load: Callable[[str, int], LevelState]
    ) -> dict[str, Tensor]:
        return {
            name: self._weights(state.versions[level], level, load)
            for level, name in enumerate(self.identity.levels)
        }

    def _weights(self, version: str, level: int, load: Callable[[str, int], LevelState]) -> Tensor:
        if version == PRETRAINED:
            return torch.ones(self._size)
        return load(version, level).weights["w"]

    def _outcome(
        self,
        request: StageRequest,
        versions: tuple[str, ...],
        load: Callable[[str, int], LevelState],
        diverged: bool = False,
    ) -> Outcome:
        weights = [self._weights(version, level, load) for level, version in enumerate(versions)]
        metric = float(torch.stack(weights).sum())
        return Outcome(
            key=self.identity.key(request),
            kind=request.kind,
            metric=metric,
            loss=-metric,
            train_loss=1.0,
            diverged=diverged,
            flops={"train": 1.0},
            time_s=1.0,
            versions=versions,
            descriptors={"gradient_norm": (1.0, 2.0, 3.0)},
            meta={"device": "cpu"},
        )

    def _note(self, kind: str, request: StageRequest) -> None:
        line = f"{kind} {self.identity.key(request)} {os.getpid()}\n".encode()
        with (self._folder / "log").open("ab", buffering=0) as log:
            log.write(line)


def _nothing() -> LevelState:
    raise AssertionError("the pretrained state is never loaded")


def ran(folder: Path, kind: str = "run") -> list[str]:
    """Keys that engines of a folder ran, in their order."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split()[1] for line in lines if line.startswith(kind + " ")]
