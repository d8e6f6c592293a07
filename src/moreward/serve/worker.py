"""The process that owns the model: batches of jobs in on standard input, their results out on standard output.

It is started by `owner`, has one thread of work, and ends when its input ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moreward.errors import ConfigError, DataError, MorewardError, NonFiniteError
from moreward.serve.wire import packed, read
from moreward.types import Conversation, Rendered, Reward

if TYPE_CHECKING:
    from moreward.items import Item
    from moreward.scoring import Scorer

OPTIONS = ("explain", "uncertainty", "truncate", "expert")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent drains, and then closes our input
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand between the replies
    try:
        scorer = _load(json.loads(sys.argv[1]))
    except MorewardError as error:
        _say(replies, {"failed": str(error)})
        return
    _say(replies, {"ready": about(scorer)})
    while (jobs := read(sys.stdin.buffer)) is not None:
        _say(replies, {"results": answered(scorer, jobs)})


def _load(told: Mapping[str, Any]) -> Scorer:
    from moreward.scoring import Scorer

    return Scorer.load(
        told["run"],
        device=told["device"],
        dtype=told["dtype"],
        backbone=told["backbone"],
        deterministic=not told["free_batches"],
    )


def _say(stream: Any, message: Any) -> None:
    stream.write(packed(message))
    stream.flush()


def about(scorer: Scorer) -> dict[str, Any]:
    """What the other process must know of the model."""
    import torch

    from moreward.calibration import EVERYONE

    calibration = scorer.find_calibration()
    judges = [*scorer.experts, EVERYONE]
    return {
        "version": scorer.identity,
        "recipe": scorer.card["recipe"],
        "experts": list(scorer.experts) if _asks_one(scorer) else [],
        "domains": list(scorer.domains),
        "max_tokens": scorer.encoder.max_length,
        "temperatures": {name: calibration.temperature(name) for name in judges} if calibration else {},
        "everyone": EVERYONE,
        "device": str(scorer.device),
        "threads": torch.get_num_threads(),
        "deterministic": scorer.deterministic,
    }


def _asks_one(scorer: Scorer) -> bool:
    try:
        return bool(scorer.experts) and scorer.expert_number(scorer.experts[0]) == 0
    except ConfigError:
        return False


def answered(scorer: Scorer, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One result a job, in order. Jobs that want the same are scored together."""
    results: dict[int, dict[str, Any]] = {}
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(tuple(job[name] for name in OPTIONS), []).append(i)
    for (explain, uncertainty, truncate, expert), rows in groups.items():
        try:
            told = scorer.score_each(
                [_item(scorer, jobs[i]) for i in rows],
                explain=explain,
                uncertainty=uncertainty,
                on_long="truncate" if truncate else "error",
                expert=expert,
            )
        except MorewardError as error:  # what is asked of all of them cannot be had
            told = [error] * len(rows)
        results |= {i: _result(one) for i, one in zip(rows, told, strict=True)}
    return [results[i] for i in range(len(jobs))]


def _item(scorer: Scorer, job: Mapping[str, Any]) -> Item:
    if "text" in job:
        text = job["text"] if isinstance(job["text"], str) else tuple(job["text"])
        return Rendered(text=text, prompt=job["begins"], special_tokens=job["special_tokens"])
    prompt, response = job["prompt"], job["response"]
    if job["as_turns"] and scorer.encoder.has_template:
        prompt, response = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}]
    return Conversation(
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        response=response if isinstance(response, str) else tuple(response),
        domain=job["domain"],
        tools=job["tools"],
    )


def _result(told: Reward | MorewardError) -> dict[str, Any]:
    if isinstance(told, Reward):
        return asdict(told)
    code = "non_finite" if isinstance(told, NonFiniteError) else "validation"
    message = str(told)
    if isinstance(told, DataError):  # the number is that of the batch, not of the request
        code = "too_long" if " tokens, the limit is " in message else "invalid"
        message = message.partition(": ")[2] if message.startswith("items[") else message
    return {"error": {"code": code, "message": message}}


if __name__ == "__main__":
    main()
