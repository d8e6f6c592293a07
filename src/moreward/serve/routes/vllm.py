"""The pooling routes of vLLM's server, which verl speaks too, and SGLang's `/classify`.

Bodies and replies as of vLLM 0.33.0, verl 0.9.1 and SGLang 0.5.23. Rewards are raw unless `use_activation` is true.
"""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal, Self

from fastapi import APIRouter, Response
from pydantic import Field, model_validator

from moreward.serve.door import Door, conversation, rendered, sigmoid
from moreward.serve.faults import Fault
from moreward.serve.queue import Job, Result
from moreward.serve.routes import tei
from moreward.serve.routes.common import (
    Body,
    Seconds,
    StrictRoute,
    TheDoor,
    TokenIds,
    Turn,
    num_tokens,
    say_truncated,
    split_turns,
)

router = APIRouter(route_class=StrictRoute, tags=["vLLM, SGLang, verl"])


class Common(Body):
    """`priority`, `request_id` and `user` change nothing here."""

    model: str | None = None
    use_activation: bool | None = Field(None, description="true: the reward's sigmoid")
    activation: bool | None = Field(None, description="the old name of use_activation")
    truncate_prompt_tokens: int | None = Field(None, description="-1 cuts what is too long from the start")
    truncation_side: Literal["left"] | None = None
    priority: int = 0
    request_id: str | None = Field(None, max_length=256)
    user: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.truncate_prompt_tokens not in (None, -1):
            raise ValueError("truncate_prompt_tokens: only -1, the model's limit, is here")
        if None not in (self.use_activation, self.activation) and self.use_activation != self.activation:
            raise ValueError("use_activation and activation, its old name, do not agree")
        return self

    @property
    def squashed(self) -> bool:
        return bool(self.use_activation or self.activation)

    @property
    def truncates(self) -> bool:
        return self.truncate_prompt_tokens == -1


class Pooling(Common):
    input: str | list[str] | TokenIds | list[TokenIds] | None = None
    messages: list[Turn] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Literal[False] = False
    task: Literal["classify"] | None = None
    encoding_format: Literal["float", "base64"] = "float"


class Classify(Pooling):
    text: str | list[str] | None = Field(None, description="SGLang's own route")


class Score(Common):
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None


class Rerank(Common):
    """With `documents` as vLLM has it, with `texts` as text-embeddings-inference has it."""

    query: str
    documents: list[str] | None = None
    top_n: int | None = Field(None, ge=0, description="0 or none: all")
    texts: list[str] | None = None
    truncate: bool | None = None
    truncation_direction: str | None = None
    raw_scores: bool = False
    return_text: bool = False


@router.post("/classify", summary="vLLM's with `input` or `messages`, SGLang's with `text`")
@router.post("/v1/classify", include_in_schema=False)
async def classify(body: Classify, response: Response, door: TheDoor, seconds: Seconds) -> Any:
    if sum(value is not None for value in (body.input, body.messages, body.text)) != 1:
        raise Fault(422, "one_of", "give one of input, messages and text", param="input")
    if body.text is not None:
        return await _sglang(body, body.text, response, door, seconds)
    results = await _pooled(body, response, door, seconds)
    values = [_value(body, result) for result in results]
    data = [{"index": i, "label": "REWARD", "probs": [v], "num_classes": 1} for i, v in enumerate(values)]
    return _list("classify", door, body, data, results)


async def _sglang(body: Classify, text: str | list[str], response: Response, door: Door, seconds: float) -> Any:
    texts = [text] if isinstance(text, str) else text
    expert = door.expert(body.model)
    jobs = [rendered(t, special_tokens=True, truncate=body.truncates, expert=expert) for t in _not_empty(texts, "text")]
    results = await door.rewards(jobs, seconds, "text")
    say_truncated(response, results)
    told = [
        {"embedding": [_value(body, r)], "meta_info": {"id": uuid.uuid4().hex, "prompt_tokens": r["num_tokens"]}}
        for r in results
    ]
    return told[0] if isinstance(text, str) else told


@router.post("/pooling", summary="The reward as pooled data")
async def pooling(body: Pooling, response: Response, door: TheDoor, seconds: Seconds) -> Any:
    results = await _pooled(body, response, door, seconds)
    data = [{"index": i, "object": "pooling", "data": _written(body, [_value(body, r)])} for i, r in enumerate(results)]
    return _list("pool", door, body, data, results)


@router.post("/v1/embeddings", summary="The reward as an embedding of one number, never normalised")
async def embeddings(body: Pooling, response: Response, door: TheDoor, seconds: Seconds) -> Any:
    results = await _pooled(body, response, door, seconds)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(body, [_value(body, r)])}
        for i, r in enumerate(results)
    ]
    return _list("embd", door, body, data, results)


@router.post("/score", summary="Pairs of texts: a prompt and a response")
@router.post("/v1/score", include_in_schema=False)
async def score(body: Score, response: Response, door: TheDoor, seconds: Seconds) -> Any:
    names = [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
    given = [(a, b) for a, b in names if getattr(body, a) is not None and getattr(body, b) is not None]
    if len(given) != 1:
        raise Fault(422, "one_of", "give one of text_1/text_2, queries/documents, queries/items, data_1/data_2")
    (first, second) = given[0]
    prompts, responses = _listed(getattr(body, first)), _listed(getattr(body, second))
    if len(prompts) == 1:
        prompts = prompts * len(responses)
    if len(prompts) != len(responses) or not responses:
        raise Fault(
            422, "lengths", f"{first} has {len(prompts)}, {second} {len(responses)}: give 1 to n, or n to n", second
        )
    results = await _pairs(body, door, prompts, responses, response, seconds, second)
    data = [{"index": i, "object": "score", "score": _value(body, r)} for i, r in enumerate(results)]
    return _list("embd", door, body, data, results)


@router.post("/rerank", summary="Responses to one prompt, best first; with `texts` as text-embeddings-inference has it")
@router.post("/v1/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def rerank(body: Rerank, response: Response, door: TheDoor, seconds: Seconds) -> Any:
    if (body.texts is None) == (body.documents is None):
        raise Fault(422, "one_of", "give one of documents and texts", param="documents")
    if body.texts is not None:
        how = tei.Options(
            truncate=body.truncate, truncation_direction=body.truncation_direction, raw_scores=body.raw_scores
        )
        return await tei.ranked(body.query, body.texts, how, body.return_text, response, door, seconds)
    documents = body.documents or []
    if not documents:
        raise Fault(400, "empty_input", "documents: is empty", param="documents")
    results = await _pairs(body, door, [body.query] * len(documents), documents, response, seconds, "documents")
    values = [_value(body, r) for r in results]
    order = sorted(range(len(values)), key=lambda i: -values[i])[: body.top_n or None]
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": body.model or door.settings.name,
        "usage": {"prompt_tokens": num_tokens(results), "total_tokens": num_tokens(results)},
        "results": [{"index": i, "document": {"text": documents[i]}, "relevance_score": values[i]} for i in order],
    }


@router.get("/v1/models", summary="The mixture, and each expert that can be asked alone")
async def models(door: TheDoor) -> dict[str, Any]:
    most = door.about.get("max_tokens")
    common = {"object": "model", "created": door.started, "owned_by": "moreward", "max_model_len": most}
    name = door.settings.name
    data = [{"id": name, **common, "root": name, "parent": None}]
    data += [{"id": alias, **common, "root": name, "parent": None} for alias in door.settings.names[1:]]
    data += [{"id": expert, **common, "root": name, "parent": name} for expert in door.experts]
    return {"object": "list", "data": data}


async def _pooled(body: Pooling, response: Response, door: Door, seconds: float) -> list[Result]:
    if (body.input is None) == (body.messages is None):
        raise Fault(422, "one_of", "give one of input and messages", param="input")
    expert = door.expert(body.model)
    jobs: list[Job]
    if body.messages is not None:
        prompt, answer = split_turns(body.messages, "messages")
        jobs, where = [conversation(prompt, answer, truncate=body.truncates, expert=expert)], "messages"
    else:
        special = body.add_special_tokens is not False
        jobs = [
            rendered(text, special_tokens=special, truncate=body.truncates, expert=expert)
            for text in _not_empty(_inputs(body.input), "input")
        ]
        where = "input"
    results = await door.rewards(jobs, seconds, where)
    say_truncated(response, results)
    return results


async def _pairs(
    body: Common,
    door: Door,
    prompts: Sequence[str],
    responses: Sequence[str],
    response: Response,
    seconds: float,
    where: str,
) -> list[Result]:
    expert = door.expert(body.model)
    jobs = [
        conversation(prompt, text, as_turns=True, truncate=body.truncates, expert=expert)
        for prompt, text in zip(prompts, _not_empty(responses, where), strict=True)
    ]
    results = await door.rewards(jobs, seconds, where)
    say_truncated(response, results)
    return results


def _inputs(given: Any) -> list[Any]:
    """One text or one list of ids, or a list of either."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    return list(given)


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def _not_empty(texts: Sequence[Any], where: str) -> Sequence[Any]:
    if not texts:
        raise Fault(400, "empty_input", f"{where}: is empty", param=where)
    for i, text in enumerate(texts):
        if not text:
            raise Fault(400, "empty_input", f"{where}[{i}]: is empty", param=f"{where}[{i}]", index=i)
    return texts


def _value(body: Common, result: Result) -> float:
    reward: float = result["reward"]
    return sigmoid(reward) if body.squashed else reward


def _written(body: Pooling, vector: list[float]) -> list[float] | str:
    if body.encoding_format == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _list(kind: str, door: Door, body: Common, data: list[dict[str, Any]], results: Sequence[Result]) -> dict[str, Any]:
    tokens = num_tokens(results)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": body.model or door.settings.name,
        "data": data,
        "usage": usage,
    }
