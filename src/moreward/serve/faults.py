"""Why a request got no reward: a status, a word for programs and a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass

KIND = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    415: "content_type",
    422: "validation",
    500: "internal",
    503: "unavailable",
    504: "deadline",
}
MOST_CHARACTERS = 400
"""Of a message. With what surrounds it a reply stays under 1 kB, whatever was sent."""


@dataclass(eq=False)
class Fault(Exception):
    """`param` names the field (`items[3].response`), `index` the item. `retry_after` in seconds."""

    status: int
    code: str
    message: str
    param: str = ""
    index: int | None = None
    retry_after: int | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.message = shortened(self.message)
        self.param = shortened(self.param, 80)

    @property
    def kind(self) -> str:
        return KIND.get(self.status, "error")


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """In characters that JSON writes with one byte each, so that a limit on them is one on the reply."""
    text = text.encode("ascii", "backslashreplace").decode("ascii")
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def overloaded(what: str) -> Fault:
    return Fault(503, "overloaded", f"the queue is full ({what}); try again", retry_after=1)


def unavailable(state: str) -> Fault:
    return Fault(503, state, f"the model is not ready: {state}", retry_after=2)
