"""The pool of workers while a driver lives: their number is kept right as the cluster changes.

What a worker or the tree's actor is, and how Ray starts them, stands in `workers`.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayError

from rlhf_ray.errors import InputError, RlhfRayError
from rlhf_ray.outcomes import Identity
from rlhf_ray.placement import Nodes
from rlhf_ray.progress import Progress
from rlhf_ray.tree.client import STATS_TIMEOUT_S, RayStages
from rlhf_ray.tree.dispatch import Ledger
from rlhf_ray.tree.stage_worker import as_ours

HowMany = Callable[[Nodes], int]
"""How many workers there should be on the nodes that live, >= 1."""

FIRST_WORD_S, WORD_EVERY_S = 15.0, 30.0
"""When it is first said what a missing worker waits for, and how often again."""

CROWDED_OUT_S = 15.0
"""How long no worker may be up before one is started that reserves no CPUs."""

dumps: Callable[[object], bytes] = cloudpickle.dumps  # pyright: ignore[reportPrivateImportUsage]
"""Pickles what actors are handed that may restart."""


def living_nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes that live."""
    return [node for node in ray.nodes() if node["Alive"]]


def node_resources() -> list[dict[str, float]]:
    """What each living node has."""
    return [node["Resources"] for node in living_nodes()]


class StagesHandle:
    """The driver's hold on the workers and the tree's actor: they live as long as it does.

    A thread looks at the cluster every `poll_s`: workers are started when nodes have joined;
    those beyond what a smaller cluster has room for are dismissed (but none that runs a stage);
    those that are lost for good are replaced, `max_replaced` times in all. Where trials have taken
    the CPUs that were left, so that none of them is up and they wait for its stages for ever, one
    is started that reserves no CPUs. A tree's actor that was started anew is handed the workers
    again. Whatever changes is said through `progress`.

    Attributes:
        stages: the client, for trials and the driver alike.
    """

    def __init__(
        self,
        make_worker: Callable[..., Any],
        how_many: HowMany,
        *,
        needs: str,
        progress: Progress,
        max_replaced: int,
        poll_s: float,
    ) -> None:
        self._make_worker = make_worker
        self._how_many = how_many
        self._needs = needs
        self._progress = progress
        self._replaceable = max_replaced
        self._given_up = 0
        self._ledger = Ledger()
        self._poll_s = poll_s
        self._numbers = itertools.count()
        self._workers: dict[int, Any] = {}
        self._tree: Any = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._short_since: float | None = None
        self._none_since: float | None = None
        self._next_word_s = FIRST_WORD_S
        self.stages: RayStages

    def __enter__(self) -> "StagesHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stats(self) -> dict[str, Any]:
        """What is going on: see `TreeActor.stats`."""
        return self.stages.stats()

    def stop(self) -> None:
        """Ends workers and tree; what is committed stays."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for actor in [*self._workers.values(), *filter(None, [self._tree])]:
            ray.kill(actor)

    def first_worker(self, patience_s: float | None) -> Identity:
        """Starts workers; waits for the first, and says meanwhile what it waits for.

        Raises:
            InputError: no node has had room for a worker for `patience_s`.
            StageError: it could not make its engine.
        """
        self._start(self._how_many(node_resources()))
        began = time.monotonic()
        ready = {handle.ready.remote(): number for number, handle in self._workers.items()}
        while True:
            done, _ = ray.wait(list(ready), num_returns=1, timeout=1.0)
            if done:
                break
            waited_s = time.monotonic() - began
            self._say_what_for(waited_s, "no worker is up yet: one needs")
            if patience_s is not None and waited_s > patience_s:
                raise InputError(
                    f"a node must have room for a worker, which needs {self._needs}, got none in "
                    f"{waited_s:.0f} s; the cluster has {_amounts(ray.cluster_resources())}. Ask "
                    "for less, or add nodes."
                )
        try:
            info = ray.get(done[0])
        except RayError as error:
            info = as_ours("a worker must start", error)
        if isinstance(info, RlhfRayError):
            raise info
        return info.identity

    def run(self, tree: Any, identity: Identity, *, share: bool) -> None:
        """Hands the workers to the tree's actor, and follows the cluster from now on."""
        self._tree = tree
        self.stages = RayStages(tree, identity, share=share)
        self._hand_in(list(self._workers))
        self._thread = threading.Thread(target=self._follow, daemon=True, name="rlhf_ray_workers")
        self._thread.start()

    def _start(self, n: int, **options: float) -> list[int]:
        numbers = list(itertools.islice(self._numbers, n))
        self._workers |= {number: self._make_worker(**options) for number in numbers}
        return numbers

    def _hand_in(self, numbers: Sequence[int]) -> None:
        # Pickled, so that an actor that restarts finds the handles without Ray's warning.
        pairs = [(number, self._workers[number]) for number in numbers]
        self._tree.add_workers.remote(dumps(pairs), self._ledger)

    def _follow(self) -> None:
        while not self._ended.wait(self._poll_s):
            try:
                known = {worker["number"]: worker for worker in self.stats()["workers"]}
                found: Ledger = ray.get(self._tree.record.remote(), timeout=STATS_TIMEOUT_S)
                if found.answered >= self._ledger.answered:  # less: it was started anew
                    self._ledger = found
                nodes = living_nodes()
                living = {node["NodeID"] for node in nodes}
                for worker in known.values():  # those of a lost node are told of it only when used
                    if worker["state"] in ("idle", "busy") and worker["node"] not in living:
                        worker["state"] = "restarting"
                self._adjust(known, self._how_many([node["Resources"] for node in nodes]))
            except ActorDiedError:
                return  # for good: askers are told so
            except RayError:
                continue  # the tree's actor restarts

    def _adjust(self, known: dict[int, dict[str, Any]], wanted: int) -> None:
        """Makes what is there what is wanted.

        Args:
            known: what the tree's actor says of each worker that it knows.
            wanted: how many there should be.
        """
        unknown = [number for number in self._workers if number not in known]
        if unknown:
            self._hand_in(unknown)  # the actor was started anew
        replaced = self._drop_lost(known)
        missing = wanted - self._given_up - len(self._workers)
        states = {n: known[n]["state"] for n in self._workers if n in known}
        absent = [n for n, state in states.items() if state in ("starting", "restarting")]
        if missing > 0:
            self._hand_in(self._start(missing))
            if missing > replaced:
                self._tell("more", missing - replaced)
        elif missing < 0:
            # Idle ones too: restarted on a smaller cluster, they may hold what a trial waits for.
            spare = [*absent, *(n for n, state in states.items() if state == "idle")]
            self._dismiss(spare[:-missing])
        self._watch_short(sum(number in self._workers for number in absent), wanted)
        self._watch_crowded(none_up=bool(self._workers) and set(absent) >= set(self._workers))

    def _drop_lost(self, known: dict[int, dict[str, Any]]) -> int:
        """Forgets the workers that are lost for good; returns how many may be replaced."""
        lost = [n for n in self._workers if n in known and known[n]["state"] == "gone"]
        replaced = min(len(lost), self._replaceable)
        self._replaceable -= replaced
        self._given_up += len(lost) - replaced
        for number in lost:
            ray.kill(self._workers.pop(number))  # its process may live: it could make no engine
        if lost:
            reason = known[lost[-1]]["reason"]
            will = f"{replaced} of them will be replaced"
            self._progress.message(f"{len(lost)} workers are lost, {will}: {reason}")
            if not self._workers and not replaced:
                self._tree.give_up.remote(reason)
        return replaced

    def _dismiss(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        reason = "the cluster has no room for it any more"
        self._tree.dismiss_workers.remote(list(numbers), reason)
        for number in numbers:
            ray.kill(self._workers.pop(number))
        self._tell("fewer", len(numbers))

    def _tell(self, what: str, n: int) -> None:
        why = "grown" if what == "more" else "shrunk"
        are = f"{n} workers {what}, now {len(self._workers)}"
        self._progress.message(f"the cluster has {why}: {are}")

    def _watch_short(self, n_absent: int, wanted: int) -> None:
        """Says it when workers wait for room for long."""
        if not n_absent:
            self._short_since, self._next_word_s = None, FIRST_WORD_S
            return
        now = time.monotonic()
        self._short_since = self._short_since or now
        self._say_what_for(
            now - self._short_since, f"{n_absent} of {wanted} workers are not up: each needs"
        )

    def _watch_crowded(self, *, none_up: bool) -> None:
        """Starts a worker without CPUs, once, when none has been up for long."""
        if not none_up:
            self._none_since = None
            return
        now = time.monotonic()
        self._none_since = self._none_since or now
        if now - self._none_since >= CROWDED_OUT_S:
            self._none_since = math.inf  # until one has been up
            why = "no worker is up, trials may hold all CPUs"
            self._progress.message(f"{why}: one will reserve no CPUs")
            self._hand_in(self._start(1, num_cpus=0.0))

    def _say_what_for(self, waited_s: float, who: str) -> None:
        if waited_s < self._next_word_s:
            return
        self._next_word_s = waited_s + WORD_EVERY_S
        self._progress.message(
            f"{who} {self._needs}; the cluster has {_amounts(ray.cluster_resources())}, "
            f"free {_amounts(ray.available_resources())}"
        )


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"
