"""One question to an OpenAI-compatible endpoint, asked until it is answered or has proved hopeless."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import yaml

from moreward.data.judge.cache import cache_key
from moreward.errors import ConfigError, JudgeError

_AGAIN = (408, 409, 425, 429)
_HOPELESS = {
    401: "the key was refused",
    403: "access was refused",
    404: "the address or the model is not there",
    405: "the address takes no questions",
}
_NUM_SHOWN = 200
_OURS = ("messages", "model", "stream", "n")


class QuestionError(Exception):
    """This question got no answer; others may."""


class _AskAgain(Exception):
    def __init__(self, fault: str, wait: float | None = None) -> None:
        super().__init__(fault)
        self.wait = wait


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the judge is and how it is asked. Waits and the time limit are in seconds.

    A question is asked `tries` times at most. Before try n it waits, drawn at random, up to `first_wait`·2ⁿ and never
    over `longest_wait`; where the server says how long (Retry-After), all questions wait so long, and a little more.
    `options` are further keys of the request; None takes one of ours away. The key is in no message, not even in
    `repr`.
    """

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 60.0
    tries: int = 6
    first_wait: float = 0.5
    longest_wait: float = 120.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if faults := self._faults():
            raise ConfigError(faults)

    def _faults(self) -> list[str]:
        faults = []
        try:
            url = httpx2.URL(self.base_url)
            if url.userinfo or url.query:
                faults.append("base URL: may hold no user, password or query; the key comes from the environment")
            elif url.scheme not in ("http", "https") or not url.host:
                faults.append(f"base URL: expected something like https://host/v1 (got {self.base_url!r})")
        except httpx2.InvalidURL:
            faults.append("base URL: is none; expected something like https://host/v1")
        if not self.model:
            faults.append("model: the judge's name is missing; give --model or set OPENAI_MODEL")
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            faults.append("key: holds blanks or letters that no key has; is it set rightly?")
        return faults

    @property
    def parameters(self) -> dict[str, Any]:
        """The request without the question."""
        ours: dict[str, Any] = {"model": self.model, "temperature": 0, "max_tokens": 256}
        return {name: value for name, value in {**ours, **self.options}.items() if value is not None}

    @property
    def name(self) -> str:
        """The judge's identity: model, address, and a hash of the parameters where they are not the default."""
        options = f" {cache_key(self.options)[:8]}" if self.options else ""
        return f"{self.model} at {self.base_url.rstrip('/')}{options}"

    @property
    def is_exposed(self) -> bool:
        """Whether the key would travel readably over a network."""
        url = httpx2.URL(self.base_url)
        return bool(self.key) and url.scheme == "http" and url.host not in ("localhost", "127.0.0.1", "::1")


class Asker:
    """A context with the connections. `ask` may be called from many threads; `stop` ends their waiting."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.num_sent = 0
        self._open_at = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._client = httpx2.Client(headers=headers, timeout=endpoint.timeout, follow_redirects=False)
        self._url = f"{endpoint.base_url.rstrip('/')}/chat/completions"

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._client.close()

    def stop(self) -> None:
        self._stopped.set()

    def ask(self, question: str) -> str:
        """The answer's text.

        Raises:
            QuestionError: this one was refused, or every try failed.
            JudgeError: no question can be answered: a bad key, no such model, a wait that is too long, stopped.
        """
        fault = ""
        for attempt in range(self.endpoint.tries):
            self._rest(attempt)
            try:
                return self._once(question)
            except _AskAgain as again:
                fault = str(again)
                if again.wait is not None:
                    self._close_for(again.wait, fault)
        raise QuestionError(f"{fault}, in each of {self.endpoint.tries} tries")

    def _rest(self, attempt: int) -> None:
        now, e = time.monotonic(), self.endpoint
        own = random.uniform(0, min(e.longest_wait, e.first_wait * 2**attempt)) if attempt else 0.0
        with self._lock:
            common = self._open_at - now
        if common > 0:  # not all at the same moment
            common += random.uniform(0, max(e.first_wait, 0.1 * common))
        if self._stopped.wait(max(own, common, 0.0)):
            raise JudgeError("stopped")

    def _close_for(self, seconds: float, fault: str) -> None:
        if seconds > self.endpoint.longest_wait:
            raise JudgeError(
                f"the judge asks to wait {seconds:,.0f} s ({fault}), longer than the {self.endpoint.longest_wait:g} s "
                "allowed. What was answered is kept: start again then"
            )
        with self._lock:
            self._open_at = max(self._open_at, time.monotonic() + seconds)

    def _once(self, question: str) -> str:
        body = {**self.endpoint.parameters, "messages": [{"role": "user", "content": question}]}
        with self._lock:
            self.num_sent += 1
        try:
            response = self._client.post(self._url, json=body)
        except httpx2.TimeoutException:
            raise _AskAgain(f"no answer within {self.endpoint.timeout:g} s") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _AskAgain(self._clean(f"no connection ({type(error).__name__}: {error})")) from None
        if response.status_code != 200:
            raise self._refusal(response)
        return self._clean(_content(response))

    def _refusal(self, response: httpx2.Response) -> Exception:
        status = response.status_code
        said = self._clean(f"HTTP {status}: {' '.join(response.text.split())[:_NUM_SHOWN]}")
        if status in _HOPELESS:
            return JudgeError(f"{self._url}: {_HOPELESS[status]} ({said})")
        if response.is_redirect:
            return JudgeError(f"{self._url}: leads elsewhere ({said}); give the address that it leads to")
        if status in _AGAIN or status >= 500:
            return _AskAgain(said, _retry_after(response.headers.get("retry-after", "")))
        return QuestionError(said)

    def _clean(self, text: str) -> str:
        """Text from the server, which may repeat what it was sent, without the key."""
        return text.replace(self.endpoint.key, "[key]") if self.endpoint.key else text


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words, the values read as YAML, as keys of a request. ConfigError with every fault."""
    faults = [f"--body: expected KEY=VALUE (got {word!r})" for word in words if not word.partition("=")[1]]
    keys = [word.partition("=")[0] for word in words]
    faults += [f"--body: {key} is not yours to set" for key in _OURS if key in keys]
    options = {}
    for key, _, value in (word.partition("=") for word in words):
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            faults.append(f"--body: the value of {key} is no YAML (got {value!r})")
    if faults:
        raise ConfigError(faults)
    return options


def _content(response: httpx2.Response) -> str:
    """The reply's text; an answer without one (a refusal, an empty reply) is an empty text."""
    try:
        message = response.json()["choices"][0]["message"]
        content = message.get("content")
        if content is None:
            content = message.get("refusal") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _AskAgain("the answer is no chat completion") from None
    if not isinstance(content, str):
        raise _AskAgain("the answer is no chat completion: its content is no text")
    return content.encode("utf-8", "replace").decode()


def _retry_after(value: str) -> float | None:
    """Seconds, given as such or as a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
