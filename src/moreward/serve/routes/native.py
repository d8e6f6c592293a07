"""Our own routes: rewards with their explanation, comparisons, health and metrics."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from fastapi import APIRouter, Response
from pydantic import Field, model_validator

from moreward.serve.door import Door, conversation, fault_of, rendered, sigmoid
from moreward.serve.faults import Fault, unavailable
from moreward.serve.queue import Job, Result
from moreward.serve.routes.common import (
    Body,
    Seconds,
    StrictRoute,
    TheDoor,
    Turn,
    num_tokens,
    say_truncated,
    split_turns,
)

router = APIRouter(route_class=StrictRoute, tags=["moreward"])

Text = str | list[Turn]


class RewardItem(Body):
    """Either `messages`, whose last turn is judged, or `prompt` and `response`, or `text` that is rendered already."""

    id: str | None = Field(None, max_length=256)
    messages: list[Turn] | None = None
    prompt: Text | None = None
    response: Text | None = None
    text: str | None = None
    domain: str = Field("", max_length=256)
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        given = [self.messages is not None, self.response is not None, self.text is not None]
        if sum(given) != 1 or (self.prompt is not None and self.response is None):
            raise ValueError("give either messages, or prompt and response, or text")
        return self


class RewardsRequest(Body):
    items: list[RewardItem]
    model: str | None = None
    expert: str = Field("auto", description="auto, or the expert that judges whatever the router says")
    explain: bool = False
    uncertainty: bool = False
    deterministic: bool = False
    on_error: Literal["fail", "item"] = "fail"
    truncate: Literal["error", "left"] = Field("error", description="left cuts the start; the response's end stays")


class CompareRequest(Body):
    messages: list[Turn] | None = None
    prompt: Text | None = None
    responses: list[Text]
    model: str | None = None
    expert: str = "auto"
    explain: bool = False
    uncertainty: bool = False
    truncate: Literal["error", "left"] = "error"

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Self:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or prompt: what the responses answer")
        return self


@router.post("/v1/rewards", summary="A reward for each item")
async def rewards(body: RewardsRequest, response: Response, door: TheDoor, seconds: Seconds) -> dict[str, Any]:
    """In order, as many as there are items. With `on_error: item` one that gets no reward gets its `error` instead of
    failing the whole."""
    ids = [item.id for item in body.items if item.id is not None]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise Fault(422, "duplicate_id", f"id {twice[:80]!r} is there twice", param="items")
    if body.deterministic and not door.about.get("deterministic"):
        raise Fault(422, "not_deterministic", "this server was started with --free-batches", param="deterministic")
    expert = _expert(door, body.expert, body.model)
    jobs: dict[int, Job] = {}
    results: dict[int, Result] = {}
    for i, item in enumerate(body.items):
        try:
            jobs[i] = _job(item, i, expert, body)
        except Fault as fault:
            if body.on_error == "fail":
                raise
            results[i] = {"error": {"code": fault.code, "message": fault.message, "param": fault.param}}
    scored = await door.results(list(jobs.values()), seconds, "items")
    results |= dict(zip(jobs, scored, strict=True))
    told = [results[i] for i in range(len(body.items))]
    if body.on_error == "fail":
        for i, result in enumerate(told):
            if "error" in result:
                raise fault_of(result["error"], "items", i)
    good = [result for result in told if "error" not in result]
    say_truncated(response, good)
    return {
        "object": "reward.list",
        "model": door.settings.name,
        "model_version": door.about["version"],
        "data": [_told(body.items[i], i, result, body.explain) for i, result in enumerate(told)],
        "usage": {"prompt_tokens": num_tokens(good), "total_tokens": num_tokens(good)},
    }


def _expert(door: Door, expert: str, model: str | None) -> str:
    named = door.expert(model)
    return named if expert == "auto" else door.expert(expert)


def _job(item: RewardItem, i: int, expert: str, body: RewardsRequest) -> Job:
    how: dict[str, Any] = {"explain": body.explain, "truncate": body.truncate == "left", "expert": expert}
    if item.text is not None:
        _refuse_empty(item.text, f"items[{i}].text", i)
        return rendered(item.text, **how)
    prompt: Any
    answer: Any
    if item.messages is not None:
        prompt, answer = split_turns(item.messages, f"items[{i}].messages")
        last = item.messages[-1].plain().get("content")
        if not last and len(item.messages[-1].plain()) == 2:
            raise Fault(422, "empty_response", f"items[{i}].messages: the last is empty", f"items[{i}].messages", i)
    else:
        assert item.response is not None
        prompt, answer = _plain(item.prompt or ""), _plain(item.response)
        _refuse_empty(item.response, f"items[{i}].response", i)
    return conversation(
        prompt,
        answer,
        domain=item.domain,
        tools=item.tools,
        uncertainty=body.uncertainty,
        **how,
    )


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [turn.plain() for turn in text]


def _refuse_empty(text: Text, where: str, index: int) -> None:
    if not (text.strip() if isinstance(text, str) else text):
        raise Fault(422, "empty_response", f"{where} is empty", param=where, index=index)


def _told(item: RewardItem, index: int, result: Result, explain: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"id": item.id if item.id is not None else str(index), "index": index}
    if "error" in result:
        fault = fault_of(result["error"], "items", index)
        return {
            **told,
            "error": {
                "error_type": fault.kind,
                "code": fault.code,
                "message": fault.message,
                "param": result["error"].get("param") or fault.param,
            },
        }
    told |= {"score": result["reward"], "expert": result["expert"]}
    told |= {"truncated": result["truncated"], "tokens": result["num_tokens"]}
    if result["abstained"]:
        told["abstained"] = result["abstained"]
    if explain:
        told |= {"expert_scores": result["expert_rewards"], "route": _route(result)}
        told |= {name: result[name] for name in ("parts", "part_rewards") if result[name]}
    if result["uncertainty"]:
        told["uncertainty"] = result["uncertainty"]
    return told


def _route(result: Result) -> dict[str, Any]:
    return {"weights": result["weights"], "top": result["expert"], "entropy": result["router_entropy"]}


@router.post("/v1/compare", summary="Responses to one prompt, best first")
async def compare(body: CompareRequest, response: Response, door: TheDoor, seconds: Seconds) -> dict[str, Any]:
    """`probabilities[i][j]` is the calibrated probability that response i is better than response j."""
    if not body.responses:
        raise Fault(422, "empty_responses", "responses: at least one is needed", param="responses")
    expert = _expert(door, body.expert, body.model)
    prompt = _plain(body.messages if body.messages is not None else body.prompt or "")
    how: dict[str, Any] = {"explain": body.explain, "uncertainty": body.uncertainty, "expert": expert}
    how["truncate"] = body.truncate == "left"
    jobs = []
    for i, one in enumerate(body.responses):
        _refuse_empty(one, f"responses[{i}]", i)
        answer: Any = _plain(one)
        if isinstance(prompt, list) and isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        jobs.append(conversation(prompt, answer, **how))
    results = await door.rewards(jobs, seconds, "responses")
    say_truncated(response, results)
    values = [result["reward"] for result in results]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    degrees = [[_temperature(door, a, b) for b in results] for a in results]
    told = {
        "object": "comparison",
        "model": door.settings.name,
        "model_version": door.about["version"],
        "scores": values,
        "order": order,
        "best": order[0],
        "margins": [[a - b for b in values] for a in values],
        "probabilities": [
            [sigmoid((a - b) / degrees[i][j]) for j, b in enumerate(values)] for i, a in enumerate(values)
        ],
        "calibrated": bool(door.about.get("temperatures")),
        "experts": [result["expert"] for result in results],
        "tokens": [result["num_tokens"] for result in results],
        "truncated": [result["truncated"] for result in results],
    }
    if body.explain:
        told |= {
            "routes": [_route(result) for result in results],
            "expert_scores": [result["expert_rewards"] for result in results],
            "parts": [result["parts"] for result in results],
        }
    if body.uncertainty:
        told["uncertainty"] = [result["uncertainty"] for result in results]
    return told


def _temperature(door: Door, first: Result, second: Result) -> float:
    return door.temperature(first["expert"] if first["expert"] == second["expert"] else "")


@router.get("/v1/about", summary="What is served")
async def about(door: TheDoor) -> dict[str, Any]:
    if door.state != "ready":
        raise unavailable(door.state)
    kept = ("recipe", "version", "experts", "domains", "max_tokens", "device", "threads", "deterministic")
    told = {name: door.about[name] for name in kept}
    return {"model": door.settings.name, **told, "calibrated": bool(door.about["temperatures"])}


@router.get("/livez", summary="200 while the process runs")
async def livez() -> dict[str, str]:
    return {"status": "alive"}


@router.get("/readyz", summary="200 when the model has loaded and scored its golden texts right")
async def readyz(door: TheDoor) -> Response:
    is_ready = door.state == "ready"
    body = json.dumps({"status": door.state})
    headers = {} if is_ready else {"Retry-After": "2"}
    return Response(body, 200 if is_ready else 503, headers, media_type="application/json")


@router.get("/health", summary="As /readyz, with an empty body")
@router.get("/ping", include_in_schema=False)
async def health(door: TheDoor) -> Response:
    return Response(status_code=200 if door.state == "ready" else 503)


@router.get("/metrics", summary="For Prometheus")
async def metrics(door: TheDoor) -> Response:
    return Response(door.metrics.text(), media_type="text/plain; version=0.0.4")
