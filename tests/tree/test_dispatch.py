"""Who carries out what, with workers that are no actors."""

import asyncio
from types import SimpleNamespace
from typing import Any

from fake_engine import request

from rlhf_ray.outcomes import Outcome, StageRequest
from rlhf_ray.tree.dispatch import Dispatcher
from rlhf_ray.tree.tally import Answer


class Worker:
    """Answers at once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ready = SimpleNamespace(remote=self._ready)
        self.run = SimpleNamespace(remote=self._run)

    async def _ready(self) -> Any:
        return SimpleNamespace(pid=self.number, node="node")

    async def _run(self, key: str, asked: StageRequest, episode: str, ledger: object) -> Answer:
        return Answer(outcome=Outcome(key=key, metric=float(self.number), loss=0.0))


def test_an_episode_whose_worker_is_gone_goes_on_at_another() -> None:
    async def episode() -> tuple[float, float]:
        dispatcher = Dispatcher(share=False, max_attempts=5)
        dispatcher.add([(0, Worker(0)), (1, Worker(1))])
        await asyncio.sleep(0)
        first = await dispatcher.carry_out("first", request(0), "episode")
        home = int(first.outcome.metric)
        same = await dispatcher.carry_out("second", request(0, 1), "episode")
        assert same.outcome.metric == home
        dispatcher.dismiss(home, "the cluster has no room for it any more")
        last = dispatcher.carry_out("third", request(0, 1, 2), "episode")
        answer = await asyncio.wait_for(last, timeout=10)
        return home, answer.outcome.metric

    before, after = asyncio.run(episode())
    assert {before, after} == {0, 1}
