"""What the formats share: strict bodies, turns, texts and token ids."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from moreward.serve.door import Door
from moreward.serve.faults import Fault
from moreward.serve.queue import Result
from moreward.serve.strict import parsed


class _Parsed(Request):
    value: Any = None

    async def json(self) -> Any:
        return self.value


class StrictRoute(APIRoute):
    """Bodies are JSON to the letter, not what the standard decoder takes for it, and are said to be JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.method != "POST":
                return await handler(request)
            if (kind := request.headers.get("content-type", "").partition(";")[0]) not in JSON_TYPES:
                raise Fault(415, "content_type", f"a body of type {kind[:80] or 'none'!r}; send application/json")
            told = _Parsed(request.scope, request.receive)
            told.value = parsed(await told.body())
            return await handler(told)

        return strict


class Body(BaseModel):
    """Unknown fields are refused: one that changes rewards elsewhere would be ignored here without a word. Subclasses
    name the harmless ones that clients send."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Turn(BaseModel):
    """A message. What else it holds (`name`, `tool_calls`) is for the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(max_length=64)
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        told = self.model_dump()
        if isinstance(self.content, list):
            told["content"] = "".join(part.text for part in self.content)
        return told


class TextPart(Body):
    type: str = Field(pattern="^text$")
    text: str


JSON_TYPES = ("application/json", "text/json")
"""A body without a type is refused as well: a page of another site can send one without asking."""
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


def door_of(request: Request) -> Door:
    found: Door = request.scope["state"]["door"]
    return found


def seconds_of(request: Request) -> float:
    found: float = request.scope["state"]["seconds"]
    return found


TheDoor = Annotated[Door, Depends(door_of)]
Seconds = Annotated[float, Depends(seconds_of)]


def split_turns(turns: Sequence[Turn], where: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompt's turns and the response's: the last."""
    if not turns:
        raise Fault(422, "empty_messages", f"{where}: no messages; the last one is judged", param=where)
    told = [turn.plain() for turn in turns]
    return told[:-1], told[-1:]


def say_truncated(response: Response, results: Sequence[Result]) -> None:
    if num := sum(result["truncated"] for result in results):
        response.headers["X-Truncated"] = str(num)


def num_tokens(results: Sequence[Result]) -> int:
    return sum(result["num_tokens"] for result in results)
