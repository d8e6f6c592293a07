"""The two kinds of judge: one that is asked questions, and one that gives rewards."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from moreward.data.judge.cache import Cache, cache_key
from moreward.data.judge.endpoint import QuestionError
from moreward.data.judge.pairs import Pair
from moreward.data.judge.prompts import Templates
from moreward.data.judge.verdicts import Verdict, parse_verdict
from moreward.data.points import Points
from moreward.errors import JudgeError
from moreward.types import Conversation, text_key

Progress = Callable[[int, int], None]
"""Told how much is done, of how much."""

BYTES_PER_TOKEN = 4
"""Roughly, of UTF-8: English has four letters a token; Chinese has three bytes a letter and about a token each."""
TEXTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would take: `calls` in all, of which the cache holds `cached`; tokens of the rest, roughly."""

    calls: int
    cached: int
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def to_send(self) -> int:
        return self.calls - self.cached


class Judge(Protocol):
    """`name` is its identity, on which the cache depends."""

    name: str
    reads_order: bool

    def estimate(self, pairs: Sequence[Pair], points: Points, cache: Cache) -> Estimate: ...

    def fill(self, pairs: Sequence[Pair], points: Points, cache: Cache, progress: Progress) -> int:
        """Bring into the cache what is missing there; how many calls it took."""
        ...

    def verdicts(self, pair: Pair, point: str, meaning: str, cache: Cache) -> tuple[Verdict, Verdict]:
        """As the pair is, and with its replies exchanged."""
        ...

    def version(self, task: str, point: str) -> str: ...


@dataclass(slots=True)
class ByQuestions:
    """Asks a language model, through `ask` (a question to an answer; see `Asker.ask`), which of two replies is better.

    At most `concurrency` questions are under way. A question without an answer discards its pair and is asked again
    by the next job; more than `max_failed_share` of those to ask (but one at least) end the job.
    """

    name: str
    ask: Callable[[str], str]
    stop: Callable[[], None] = lambda: None
    templates: Templates = field(default_factory=Templates)
    concurrency: int = 8
    max_failed_share: float = 0.01
    tokens_per_answer: int = 8
    reads_order: bool = True

    def estimate(self, pairs: Sequence[Pair], points: Points, cache: Cache) -> Estimate:
        calls = size = 0
        missing: set[str] = set()
        for question in self._questions(pairs, points):
            calls += 1
            key = self._key(question)
            if key not in cache and key not in missing:
                missing.add(key)
                size += len(question.encode())
        return Estimate(calls, calls - len(missing), size // BYTES_PER_TOKEN, len(missing) * self.tokens_per_answer)

    def fill(self, pairs: Sequence[Pair], points: Points, cache: Cache, progress: Progress) -> int:
        # keys only: the questions of a large job do not fit into memory
        missing = {key for q in self._questions(pairs, points) if (key := self._key(q)) not in cache}
        desk = _Desk(self.ask, cache, allowed=max(1, math.ceil(self.max_failed_share * len(missing))))
        questions, done = self._once(self._questions(pairs, points), missing), 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                under_way = {pool.submit(desk.settle, *q) for q in islice(questions, 2 * self.concurrency)}
                while under_way:
                    ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    done += _raise_first(ended)
                    progress(done, len(missing))
                    under_way |= {pool.submit(desk.settle, *q) for q in islice(questions, len(ended))}
            except BaseException:
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
        return len(missing)

    def verdicts(self, pair: Pair, point: str, meaning: str, cache: Cache) -> tuple[Verdict, Verdict]:
        straight, swapped = (
            self._verdict(self.templates.question(pair, point, meaning, swapped=swapped), cache)
            for swapped in (False, True)
        )
        return straight, swapped

    def version(self, task: str, point: str) -> str:
        return self.templates.version(task, point)

    def _verdict(self, question: str, cache: Cache) -> Verdict:
        said = cache.get(self._key(question))
        return parse_verdict(said) if isinstance(said, str) else Verdict.FAILED

    def _questions(self, pairs: Sequence[Pair], points: Points) -> Iterator[str]:
        for pair in pairs:
            for point, meaning in points[pair.domain].items():
                for swapped in (False, True):
                    yield self.templates.question(pair, point, meaning, swapped=swapped)

    def _once(self, questions: Iterator[str], wanted: Set[str]) -> Iterator[tuple[str, str]]:
        """Key and text of the questions wanted, each the first time that it comes."""
        seen: set[str] = set()
        for question in questions:
            key = self._key(question)
            if key in wanted and key not in seen:
                seen.add(key)
                yield key, question

    def _key(self, question: str) -> str:
        """The question holds template, point, texts and their order."""
        return cache_key("question", self.name, question)


class _Desk:
    """Settles single questions, from many threads, and counts those that fail."""

    def __init__(self, ask: Callable[[str], str], cache: Cache, allowed: int) -> None:
        self.ask, self.cache, self.allowed = ask, cache, allowed
        self.num_failed = 0
        self._lock = threading.Lock()

    def settle(self, key: str, question: str) -> None:
        try:
            answer = self.ask(question)
        except QuestionError as error:
            with self._lock:
                self.num_failed += 1
                is_one_too_many = self.num_failed == self.allowed + 1
            if is_one_too_many:  # it ends the job; those under way beside it have nothing to add
                raise JudgeError(
                    f"{self.allowed + 1} questions got no answer, {self.allowed} are allowed (--max-failed); the last: "
                    f"{error}. What was answered is kept: start again to go on"
                ) from None
        else:
            self.cache.put({key: answer})


def _raise_first(ended: set[Future[None]]) -> int:
    for future in ended:
        future.result()
    return len(ended)


Reward = Callable[[Sequence[Conversation], str], Sequence[float]]
"""Rewards of conversations, in the named point if the judge tells points apart."""


@dataclass(slots=True)
class ByRewards:
    """A reward model: the response with the higher reward is the better one, and order plays no part. Unless `by_point`
    its rewards are the same in every point."""

    name: str
    rewards: Reward
    by_point: bool = False
    reads_order: bool = False

    def estimate(self, pairs: Sequence[Pair], points: Points, cache: Cache) -> Estimate:
        wanted = self._wanted(pairs, points)
        return Estimate(len(wanted), sum(key in cache for key in wanted))

    def fill(self, pairs: Sequence[Pair], points: Points, cache: Cache, progress: Progress) -> int:
        missing = {key: what for key, what in self._wanted(pairs, points).items() if key not in cache}
        of_point: dict[str, list[tuple[str, Conversation]]] = {}
        for key, (point, conversation) in missing.items():
            of_point.setdefault(point, []).append((key, conversation))
        done = 0
        for point, items in of_point.items():
            for start in range(0, len(items), TEXTS_AT_ONCE):
                chunk = items[start : start + TEXTS_AT_ONCE]
                rewards = self.rewards([conversation for _, conversation in chunk], point)
                cache.put({key: float(r) for (key, _), r in zip(chunk, rewards, strict=True)})
                done += len(chunk)
                progress(done, len(missing))
        return len(missing)

    def verdicts(self, pair: Pair, point: str, meaning: str, cache: Cache) -> tuple[Verdict, Verdict]:
        first, second = (cache.get(self._key(self._point(point), side)) for side in _sides(pair))
        if not isinstance(first, float) or not isinstance(second, float):
            return Verdict.FAILED, Verdict.FAILED
        if first == second:
            return Verdict.NEITHER, Verdict.NEITHER
        return (Verdict.FIRST, Verdict.SECOND) if first > second else (Verdict.SECOND, Verdict.FIRST)

    def version(self, task: str, point: str) -> str:
        return ""

    def _wanted(self, pairs: Sequence[Pair], points: Points) -> dict[str, tuple[str, Conversation]]:
        return {
            self._key(named, side): (named, side)
            for pair in pairs
            for named in dict.fromkeys(map(self._point, points[pair.domain]))
            for side in _sides(pair)
        }

    def _point(self, point: str) -> str:
        return point if self.by_point else ""

    def _key(self, point: str, item: Conversation) -> str:
        texts = text_key(item.prompt, item.response)
        return cache_key("reward", self.name, point, item.domain, texts, item.tools, item.chat_template_kwargs)


def _sides(pair: Pair) -> tuple[Conversation, Conversation]:
    first, second = (
        Conversation(
            prompt=pair.prompt,
            response=response,
            id=pair.id,
            domain=pair.domain,
            tools=pair.tools,
            chat_template_kwargs=pair.chat_template_kwargs,
        )
        for response in (pair.first, pair.second)
    )
    return first, second
