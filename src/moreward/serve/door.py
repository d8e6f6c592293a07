"""Between the routes and the queue: conversations become jobs, results become rewards or a Fault."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from moreward.serve.faults import Fault
from moreward.serve.metrics import Metrics
from moreward.serve.owner import Loaded, Owner
from moreward.serve.queue import Job, Queue, Result
from moreward.serve.settings import Settings

CHARACTERS_PER_TOKEN = 3
MOST_CHARACTERS_PER_TOKEN = 250
"""Of a model's longest input: what is longer is refused before it costs anything."""


class Door:
    """`model` is set in the door of a request: it does not change there. Elsewhere it is None: the one that serves."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.limits = settings, settings.limits
        self.metrics = Metrics()
        self.owner = Owner(settings, loaded=self.metrics.loaded)
        self.queue = Queue(self.owner, settings.limits, told=self.metrics.batched)
        self.metrics.watch(self.queue, lambda: self.owner.state == "ready")
        self.started = int(time.time())
        self.is_draining = False
        self.model: Loaded | None = None

    @property
    def state(self) -> str:
        return "draining" if self.is_draining else self.owner.state

    @property
    def about(self) -> Mapping[str, Any]:
        return self.owner.about if self.model is None else self.model.about

    @contextmanager
    def of_a_request(self) -> Iterator[Door]:
        """The door for one request: whatever is loaded meanwhile, one model answers all of it."""
        model = self.owner.current
        if model is None:
            yield self
            return
        pinned = copy.copy(self)
        pinned.model = model
        model.num_users += 1
        try:
            yield pinned
        finally:
            model.num_users -= 1

    async def reload(self) -> Mapping[str, Any]:
        """As `Owner.reload`, and counted."""
        try:
            about = await self.owner.reload()
        except Fault:
            self.metrics.reloads.labels("refused").inc()
            raise
        self.metrics.reloads.labels("done").inc()
        return about

    @property
    def experts(self) -> Sequence[str]:
        found: Sequence[str] = self.about.get("experts", ())
        return found

    def expert(self, model: str | None) -> str:
        """The expert that a `model` of a request means, empty for the mixture. Fault 404 for an unknown one."""
        if not model or model in self.settings.names or model == self.settings.name:
            return ""
        if model in self.experts:
            return model
        known = ", ".join([self.settings.name, *self.experts])
        raise Fault(404, "model_not_found", f"model {model[:80]!r} is not here. There are: {known}.", param="model")

    def temperature(self, expert: str) -> float:
        """That makes of a difference of rewards a calibrated probability; 1 where none was fitted."""
        found: Mapping[str, float] = self.about.get("temperatures", {})
        return found.get(expert, found.get(self.about.get("everyone", ""), 1.0))

    def probability(self, result: Result) -> float:
        """σ(reward / temperature)."""
        return sigmoid(result["reward"] / self.temperature(result["expert"]))

    async def results(self, jobs: Sequence[Job], seconds: float, where: str) -> list[Result]:
        """One result a job, those in error with their `error`. `where` names the list in the request.

        Raises Fault: 413 for too many or too long, and what `Queue.put` raises.
        """
        if len(jobs) > self.limits.items:
            raise Fault(413, "too_many_items", f"{len(jobs)} items; at most {self.limits.items} at once", param=where)
        most = min(self.limits.text_characters, MOST_CHARACTERS_PER_TOKEN * self.about.get("max_tokens", 512))
        sized = []
        for i, job in enumerate(jobs):
            length = job_length(job)
            if length > most:
                raise Fault(
                    413, "text_too_large", f"{length} characters; at most {most}", param=f"{where}[{i}]", index=i
                )
            sized.append((job, length // CHARACTERS_PER_TOKEN + 1))
        results = await self.queue.put(sized, seconds, self.model)
        for result in results:
            self.metrics.rewarded(result)
        return results

    async def rewards(self, jobs: Sequence[Job], seconds: float, where: str) -> list[Result]:
        """As `results`; the first job in error is a Fault that names it: 422, and 500 for what is not finite."""
        results = await self.results(jobs, seconds, where)
        for i, result in enumerate(results):
            if "error" in result:
                raise fault_of(result["error"], where, i)
        return results


def fault_of(error: Mapping[str, str], where: str, index: int) -> Fault:
    status = 500 if error["code"] == "non_finite" else 422
    return Fault(status, error["code"], error["message"], param=f"{where}[{index}]", index=index)


def conversation(
    prompt: Any,
    response: Any,
    *,
    domain: str = "",
    tools: Any = None,
    as_turns: bool = False,
    explain: bool = False,
    uncertainty: bool = False,
    truncate: bool = False,
    expert: str = "",
) -> Job:
    """`as_turns`: two texts become a user's and an assistant's turn where the model has a chat template."""
    return {
        "prompt": prompt,
        "response": response,
        "domain": domain,
        "tools": tools,
        "as_turns": as_turns,
        "explain": explain,
        "uncertainty": uncertainty,
        "truncate": truncate,
        "expert": expert,
    }


def rendered(
    text: str | Sequence[int],
    *,
    begins: str = "",
    special_tokens: bool = False,
    explain: bool = False,
    truncate: bool = False,
    expert: str = "",
) -> Job:
    """Of text that is the model's input already; `begins` is its prompt, where that is known."""
    return {
        "text": text,
        "begins": begins,
        "special_tokens": special_tokens,
        "explain": explain,
        "uncertainty": False,
        "truncate": truncate,
        "expert": expert,
    }


def job_length(job: Job) -> int:
    """In characters; a token id counts as a token."""
    if "text" in job:
        text = job["text"]
        return len(text) if isinstance(text, str) else CHARACTERS_PER_TOKEN * len(text)
    return sum(_length(job[side]) for side in ("prompt", "response"))


def _length(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(len(turn.get("content") or "") for turn in text)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
