"""A bounded queue in front of the model: jobs of many requests become batches, in order of arrival."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moreward.serve.faults import Fault, overloaded, unavailable
from moreward.serve.settings import Limits

Job = Mapping[str, Any]
Result = dict[str, Any]


class Model(Protocol):
    @property
    def about(self) -> Mapping[str, Any]: ...

    async def score(self, jobs: Sequence[Job]) -> list[Result]: ...


class Models(Protocol):
    """The model that new requests get is `current`; it changes when another is loaded."""

    state: str

    @property
    def current(self) -> Model | None: ...

    async def wait_ready(self) -> None: ...


@dataclass(eq=False)
class Waiting:
    job: Job
    model: Model
    size: int
    since: float
    answer: asyncio.Future[Result]


@dataclass(frozen=True)
class Batched:
    """What a batch was, for those who measure: seconds that its oldest job waited, and that the model took."""

    num_items: int
    num_tokens: int
    waited: float
    took: float


@dataclass(eq=False)
class Queue:
    """Holds so many items and tokens, those that the model works on included. `told` is called after each batch.

    Each result is told its seconds: `waited` for the model, and `took`, those of its batch. A job is answered by the
    model that it was put for; a batch has one model.
    """

    models: Models
    limits: Limits
    told: Callable[[Batched], None] = lambda batched: None
    num_items: int = 0
    num_tokens: int = 0
    closed: bool = False
    _waiting: deque[Waiting] = field(default_factory=deque)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    async def put(self, jobs: Sequence[tuple[Job, int]], seconds: float, model: Model | None = None) -> list[Result]:
        """The results of jobs of these sizes, in order, all by `model` or by the one that serves now. Raises Fault: 503
        where there is no room or the model is down, 504 after `seconds`. What is not needed any more leaves the queue.
        """
        if not jobs:
            return []
        if self.closed:
            raise unavailable("draining")
        model = model or self.models.current
        if self.models.state != "ready" or model is None:
            raise unavailable(self.models.state)
        num_tokens = sum(size for _, size in jobs)
        if self.num_items + len(jobs) > self.limits.queue_items:
            raise overloaded(f"{self.num_items} of {self.limits.queue_items} items are in it")
        if self.num_tokens + num_tokens > self.limits.queue_tokens and self.num_items:
            raise overloaded(f"{self.num_tokens} of {self.limits.queue_tokens} tokens are in it")
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        mine = [Waiting(job, model, size, now, loop.create_future()) for job, size in jobs]
        self._waiting.extend(mine)
        self.num_items += len(mine)
        self.num_tokens += num_tokens
        self._more.set()
        try:
            return list(await asyncio.wait_for(asyncio.gather(*(one.answer for one in mine)), seconds))
        except TimeoutError:
            raise Fault(504, "deadline", f"no reward after {seconds:g} s; allow more, or send less") from None
        finally:
            self._forget(mine)

    def _forget(self, mine: Sequence[Waiting]) -> None:
        """Take out what still waits: its request is over."""
        for one in mine:
            one.answer.cancel()
        over = {id(one) for one in mine}
        gone = [one for one in self._waiting if id(one) in over]
        if gone:
            self._waiting = deque(one for one in self._waiting if id(one) not in over)
            self._leave(gone)

    def _leave(self, some: Sequence[Waiting]) -> None:
        self.num_items -= len(some)
        self.num_tokens -= sum(one.size for one in some)

    async def run(self) -> None:
        """Feeds the model for ever."""
        while True:
            await self._more.wait()
            await self.models.wait_ready()
            batch = self._next()
            if not batch:
                self._more.clear()
                continue
            began = time.monotonic()
            try:
                results = await batch[0].model.score([one.job for one in batch])
            except Fault as fault:  # the model is gone: nobody shall wait until it is back
                for one in (*batch, *self._waiting):
                    if one.model is batch[0].model and not one.answer.done():
                        one.answer.set_exception(fault)
                self._leave(batch)
                continue
            took = time.monotonic() - began
            self._leave(batch)
            for one, result in zip(batch, results, strict=True):
                if not one.answer.done():
                    one.answer.set_result({**result, "waited": began - one.since, "took": took})
            waited = began - min(one.since for one in batch)
            self.told(Batched(len(batch), sum(one.size for one in batch), waited, took))

    def _next(self) -> list[Waiting]:
        """The oldest jobs for one model, as many as make a batch."""
        batch: list[Waiting] = []
        num_tokens = 0
        while self._waiting and len(batch) < self.limits.batch_items:
            first = self._waiting[0]
            if batch and num_tokens + first.size > self.limits.batch_tokens:
                break
            if batch and first.model is not batch[0].model:
                break
            batch.append(self._waiting.popleft())
            num_tokens += batch[-1].size
        return batch

    async def drained(self) -> None:
        """Takes nothing new; returns when nothing waits or runs."""
        self.closed = True
        while self.num_items:
            await asyncio.sleep(0.02)
