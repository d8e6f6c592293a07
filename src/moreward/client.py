"""Rewards of a server, with the methods of `Scorer`. Imports no torch."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import httpx2

from moreward.errors import ConfigError, DataError, ServerError
from moreward.items import Item, as_conversation
from moreward.types import Comparison, Conversation, Rendered, Reward, Text, Uncertainty

KEY_VARIABLE = "MOREWARD_API_KEY"
TRY_AGAIN = (502, 503, 504)
LONGEST_WAIT = 30.0


@dataclass(frozen=True, kw_only=True)
class _Wishes:
    """What is asked, and how hard."""

    url: str
    key: str = field(repr=False)
    timeout: float
    retries: int
    batch: int

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def wait(self, attempt: int, response: httpx2.Response | None) -> float:
        """Seconds before the next try: twice as long each time, a little apart from other clients', and not before
        the server asked for."""
        told = response.headers.get("Retry-After", "") if response is not None else ""
        asked = float(told) if told.isdigit() else 0.0
        wanted: float = max(asked, 0.5 * 2**attempt) * random.uniform(1.0, 1.25)
        return min(LONGEST_WAIT, wanted)


def _wishes(url: str, key: str | None, timeout: float, retries: int, batch: int) -> _Wishes:
    faults = []
    if not url.startswith(("http://", "https://")):
        faults.append(f"url: {url!r} is none; give http://HOST:PORT")
    if batch < 1 or retries < 0 or timeout <= 0:
        faults.append(f"batch, retries, timeout: at least 1, 0 and more than 0 (got {batch}, {retries}, {timeout})")
    if faults:
        raise ConfigError(faults)
    told = os.environ.get(KEY_VARIABLE, "").split(",")[0].strip() if key is None else key
    return _Wishes(url=url.rstrip("/"), key=told, timeout=timeout, retries=retries, batch=batch)


class _Asking:
    """What both clients have in common: what is sent, and what is made of the answer."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        batch: int = 64,
        on_long: str = "error",
    ) -> None:
        """`key` None is that of $MOREWARD_API_KEY. A request holds `batch` items; on a status of 502 to 504 and on a
        broken connection it is sent again, `retries` times, waiting longer each time. `on_long`: `error` or
        `truncate`, as in `Scorer`."""
        self.wishes = _wishes(url, key, timeout, retries, batch)
        self.on_long = on_long

    def _requests(
        self, items: Sequence[Item], explain: bool, uncertainty: bool, on_long: str | None, expert: str
    ) -> Iterator[dict[str, Any]]:
        bodies = [_item(as_conversation(item, i)) for i, item in enumerate(items)]
        for start in range(0, len(bodies), self.wishes.batch):
            yield {
                "items": bodies[start : start + self.wishes.batch],
                "explain": explain,
                "uncertainty": uncertainty,
                "truncate": "left" if (on_long or self.on_long) == "truncate" else "error",
                "expert": expert or "auto",
            }

    def _comparison_request(
        self, prompt: Text, responses: Sequence[Text], explain: bool, uncertainty: bool
    ) -> dict[str, Any]:
        if not responses:
            raise DataError("compare: at least one response is needed (got 0)")
        told = {"prompt": _plain(prompt), "responses": [_plain(r) for r in responses]}
        return {**told, "explain": explain, "uncertainty": uncertainty, "truncate": _how(self.on_long)}

    def _checked(self, response: httpx2.Response, first: int = 0) -> Any:
        """The body of an answer. DataError for what is wrong with the items, ServerError for all else."""
        if response.status_code == 200:
            return response.json()
        told = _told(response)
        if response.status_code in (400, 413, 422):
            index = told.get("index")
            where = f"items[{first + index}]: " if isinstance(index, int) else ""
            raise DataError(f"{where}{told.get('message', response.text[:200])}")
        word = told.get("message") or f"status {response.status_code}"
        raise ServerError(f"{self.wishes.url}: {word}")

    def _given_up(self, error: Exception) -> ServerError:
        return ServerError(
            f"{self.wishes.url}: no answer after {self.wishes.retries + 1} tries ({type(error).__name__}: {error}). "
            "Is the server running?"
        )


class Client(_Asking):
    """Use as a context manager, or `close` it. Threads may share it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def __init__(self, url: str, **more: Any) -> None:
        super().__init__(url, **more)
        self._http = httpx2.Client(base_url=self.wishes.url, headers=self.wishes.headers, timeout=self.wishes.timeout)

    @property
    def identity(self) -> str:
        """The version of the model that the server has now."""
        return str(self.about()["version"])

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self.about()["experts"])

    def about(self) -> dict[str, Any]:
        """What is served: model, recipe, experts, domains, limits."""
        told: dict[str, Any] = self._checked(self._send("GET", "/v1/about"))
        return told

    def score(
        self,
        items: Sequence[Item],
        *,
        explain: bool = False,
        uncertainty: bool = False,
        on_long: str | None = None,
        expert: str = "",
    ) -> list[Reward]:
        """As `Scorer.score`. DataError names the item; ServerError where the server cannot be reached or fails."""
        rewards: list[Reward] = []
        for body in self._requests(items, explain, uncertainty, on_long, expert):
            told = self._checked(self._send("POST", "/v1/rewards", body), first=len(rewards))
            rewards += [_reward(row) for row in told["data"]]
        return [_renamed(reward, item, i) for i, (reward, item) in enumerate(zip(rewards, items, strict=True))]

    def compare(
        self, prompt: Text, responses: Sequence[Text], *, explain: bool = False, uncertainty: bool = False
    ) -> Comparison:
        """As `Scorer.compare`, with calibrated probabilities where the run has them."""
        body = self._comparison_request(prompt, responses, explain, uncertainty)
        return _comparison(self._checked(self._send("POST", "/v1/compare", body)))

    def rank(self, prompt: Text, responses: Sequence[Text]) -> list[int]:
        """Indices of the responses, best first."""
        return self.compare(prompt, responses).order

    def best_of_n(self, prompt: Text, responses: Sequence[Text]) -> int:
        return self.rank(prompt, responses)[0]

    def _send(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        for attempt in range(self.wishes.retries + 1):
            response = None
            try:
                response = self._http.request(method, path, json=body)
                if response.status_code not in TRY_AGAIN or attempt == self.wishes.retries:
                    return response
            except httpx2.TransportError as error:
                if attempt == self.wishes.retries:
                    raise self._given_up(error) from error
            time.sleep(self.wishes.wait(attempt, response))
        raise AssertionError


class AsyncClient(_Asking):
    """`Client` for asyncio; requests of one call run at the same time, at most `at_once`."""

    def __init__(self, url: str, *, at_once: int = 8, **more: Any) -> None:
        super().__init__(url, **more)
        self._room = asyncio.Semaphore(at_once)
        self._http = httpx2.AsyncClient(
            base_url=self.wishes.url, headers=self.wishes.headers, timeout=self.wishes.timeout
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def about(self) -> dict[str, Any]:
        told: dict[str, Any] = self._checked(await self._send("GET", "/v1/about"))
        return told

    async def score(
        self,
        items: Sequence[Item],
        *,
        explain: bool = False,
        uncertainty: bool = False,
        on_long: str | None = None,
        expert: str = "",
    ) -> list[Reward]:
        """As `Client.score`."""
        bodies = list(self._requests(items, explain, uncertainty, on_long, expert))
        answers = await asyncio.gather(*(self._send("POST", "/v1/rewards", body) for body in bodies))
        rewards: list[Reward] = []
        for answer in answers:
            rewards += [_reward(row) for row in self._checked(answer, first=len(rewards))["data"]]
        return [_renamed(reward, item, i) for i, (reward, item) in enumerate(zip(rewards, items, strict=True))]

    async def compare(
        self, prompt: Text, responses: Sequence[Text], *, explain: bool = False, uncertainty: bool = False
    ) -> Comparison:
        body = self._comparison_request(prompt, responses, explain, uncertainty)
        return _comparison(self._checked(await self._send("POST", "/v1/compare", body)))

    async def rank(self, prompt: Text, responses: Sequence[Text]) -> list[int]:
        return (await self.compare(prompt, responses)).order

    async def best_of_n(self, prompt: Text, responses: Sequence[Text]) -> int:
        return (await self.rank(prompt, responses))[0]

    async def _send(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        for attempt in range(self.wishes.retries + 1):
            response = None
            try:
                async with self._room:
                    response = await self._http.request(method, path, json=body)
                if response.status_code not in TRY_AGAIN or attempt == self.wishes.retries:
                    return response
            except httpx2.TransportError as error:
                if attempt == self.wishes.retries:
                    raise self._given_up(error) from error
            await asyncio.sleep(self.wishes.wait(attempt, response))
        raise AssertionError


def _how(on_long: str) -> str:
    return "left" if on_long == "truncate" else "error"


def _item(item: Conversation | Rendered) -> dict[str, Any]:
    if isinstance(item, Rendered):
        if not isinstance(item.text, str) or item.prompt or item.special_tokens:
            raise DataError("a server takes rendered text alone here: no token ids, prompt or special tokens")
        return {"text": item.text}
    if item.chat_template_kwargs:
        raise DataError("chat_template_kwargs: a server takes none")
    told: dict[str, Any] = {"prompt": _plain(item.prompt), "response": _plain(item.response), "domain": item.domain}
    return {**told, "tools": [dict(tool) for tool in item.tools]} if item.tools else told


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [dict(turn) for turn in text]


def _reward(row: Mapping[str, Any]) -> Reward:
    route = row.get("route", {})
    doubt = row.get("uncertainty")
    return Reward(
        reward=row["score"],
        expert=row["expert"],
        weights=route.get("weights", {}),
        expert_rewards=row.get("expert_scores", {}),
        parts=row.get("parts", {}),
        part_rewards=row.get("part_rewards", {}),
        uncertainty=Uncertainty(**doubt) if doubt else None,
        abstained=row.get("abstained", ""),
        router_entropy=route.get("entropy"),
        num_tokens=row["tokens"],
        truncated=row["truncated"],
    )


def _renamed(reward: Reward, item: Item, i: int) -> Reward:
    return replace(reward, id=as_conversation(item, i).id)


def _comparison(told: Mapping[str, Any]) -> Comparison:
    num = len(told["scores"])
    doubts = told.get("uncertainty") or [None] * num
    routes = told.get("routes") or [{}] * num
    rewards = [
        Reward(
            reward=told["scores"][i],
            expert=told["experts"][i],
            weights=routes[i].get("weights", {}),
            expert_rewards=(told.get("expert_scores") or [{}] * num)[i],
            parts=(told.get("parts") or [{}] * num)[i],
            uncertainty=Uncertainty(**doubts[i]) if doubts[i] else None,
            router_entropy=routes[i].get("entropy"),
            num_tokens=told["tokens"][i],
            truncated=told["truncated"][i],
        )
        for i in range(num)
    ]
    return Comparison(rewards, told["order"], told["probabilities"])


def _told(response: httpx2.Response) -> dict[str, Any]:
    try:
        told = response.json()
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
