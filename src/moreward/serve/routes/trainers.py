"""What trainers ask for rewards by: OpenRLHF's `/get_reward`, LLaMA-Factory's `/v1/score/evaluation`, slime's `/rm`."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import Field

from moreward.serve.door import conversation, rendered
from moreward.serve.faults import Fault
from moreward.serve.routes.common import Body, Seconds, StrictRoute, TheDoor, Turn, say_truncated

router = APIRouter(route_class=StrictRoute, tags=["trainers"])


class GetReward(Body):
    """`labels` change nothing here."""

    query: str | list[str]
    prompts: str | list[str] | None = None
    labels: Any = None


@router.post("/get_reward", summary="OpenRLHF 0.11")
async def get_reward(body: GetReward, response: Response, door: TheDoor, seconds: Seconds) -> dict[str, Any]:
    """`query` is text as the policy saw and wrote it, template and all; where `prompts` begin it, routers read these.
    With `--retemplate` what follows the prompt is judged as its answer in the model's own form, and `retemplated` is 0
    for a query that its prompt does not begin.
    `scores` are calibrated, in [0, 1]; `extra_logs` has the number of the expert that spoke."""
    queries = [body.query] if isinstance(body.query, str) else body.query
    prompts = [body.prompts] if isinstance(body.prompts, str) else body.prompts or [""] * len(queries)
    if len(prompts) != len(queries):
        raise Fault(422, "lengths", f"{len(queries)} queries, {len(prompts)} prompts: give as many", param="prompts")
    jobs, again = [], []
    for query, prompt in zip(queries, prompts, strict=True):
        response_text = query.removeprefix(prompt).strip() if prompt.strip() and query.startswith(prompt) else ""
        again.append(int(bool(door.settings.retemplate and response_text)))
        if again[-1]:
            jobs.append(conversation(prompt, response_text, as_turns=True))
        else:
            jobs.append(rendered(query, begins=prompt))
    results = await door.rewards(jobs, seconds, "query")
    say_truncated(response, results)
    told: dict[str, Any] = {
        "rewards": [result["reward"] for result in results],
        "scores": [door.probability(result) for result in results],
        "extra_logs": {},
    }
    if door.experts:
        told["extra_logs"] = {
            "expert": [door.experts.index(result["expert"]) for result in results],
            "route_entropy": [result["router_entropy"] or 0.0 for result in results],
        }
    if door.settings.retemplate:
        told["extra_logs"]["retemplated"] = again
    return told


class Evaluation(Body):
    """Its client always says `model`: the name is not looked at."""

    model: str = ""
    messages: list[str]
    max_length: int | None = None


@router.post("/v1/score/evaluation", summary="LLaMA-Factory 0.9")
async def evaluation(body: Evaluation, response: Response, door: TheDoor, seconds: Seconds) -> dict[str, Any]:
    if not body.messages:
        raise Fault(400, "empty_input", "messages: is empty", param="messages")
    if body.max_length is not None and body.max_length < door.about["max_tokens"]:
        most = door.about["max_tokens"]
        raise Fault(422, "max_length", f"max_length: {body.max_length}; the model's own {most} is used", "max_length")
    results = await door.rewards([rendered(text) for text in body.messages], seconds, "messages")
    say_truncated(response, results)
    return {
        "id": f"scoreval-{uuid.uuid4().hex}",
        "object": "score.evaluation",
        "model": body.model or door.settings.name,
        "scores": [result["reward"] for result in results],
    }


class Rollout(Body):
    """`label` changes nothing here."""

    prompt: str | list[Turn]
    response: str = Field(min_length=1)
    label: Any = None


@router.post("/rm", summary="slime: a bare number, or an object with `?key=score`")
async def rm(
    body: Rollout, response: Response, door: TheDoor, seconds: Seconds, key: Literal["score"] | None = None
) -> Any:
    prompt: Any = body.prompt if isinstance(body.prompt, str) else [turn.plain() for turn in body.prompt]
    answer: Any = body.response if isinstance(prompt, str) else [{"role": "assistant", "content": body.response}]
    results = await door.rewards([conversation(prompt, answer)], seconds, "response")
    say_truncated(response, results)
    reward = results[0]["reward"]
    return {key: reward} if key else reward
