"""The classification routes of text-embeddings-inference, as of 1.9.3. Its `/rerank` shares a path with vLLM's.

Where it differs: `truncate` cuts the start, so that the response's end stays, and a direction `right` is refused.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, Self

from fastapi import APIRouter, Response
from pydantic import Field, model_validator

from moreward import __version__
from moreward.serve.door import Door, conversation, job_length, rendered, sigmoid
from moreward.serve.faults import Fault
from moreward.serve.queue import Job, Result
from moreward.serve.routes.common import Body, Seconds, StrictRoute, TheDoor, num_tokens, say_truncated

router = APIRouter(route_class=StrictRoute, tags=["text-embeddings-inference"])

LEFT = ("left", "Left")


class Options(Body):
    truncate: bool | None = None
    truncation_direction: str | None = None
    raw_scores: bool = False

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.truncate and self.truncation_direction not in (None, *LEFT):
            raise ValueError("truncation_direction: only Left is here: a reward is read at the response's end")
        return self


class Parameters(Body):
    """What huggingface_hub's client adds. `top_k` changes nothing: there is one label."""

    function_to_apply: Literal["none", "sigmoid"] | None = None
    top_k: int | None = None


class Predict(Options):
    inputs: str | list[str] | list[list[str]]
    parameters: Parameters = Field(default_factory=Parameters)


@router.post("/predict", summary="Texts, or pairs of a prompt and a response")
async def predict(body: Predict, response: Response, door: TheDoor, seconds: Seconds) -> Any:
    """`"text"` and `["prompt", "response"]` are one input, a list of lists is a batch of such."""
    is_batch = isinstance(body.inputs, list) and (not body.inputs or isinstance(body.inputs[0], list))
    inputs: Sequence[Any] = body.inputs if is_batch else [body.inputs]
    if not inputs:
        raise Fault(400, "empty_input", "inputs: is empty", param="inputs")
    jobs = [_job(one, i, bool(body.truncate)) for i, one in enumerate(inputs)]
    results = await _results(jobs, response, door, seconds, "inputs")
    is_raw = body.raw_scores or body.parameters.function_to_apply == "none"
    told = [[{"score": _value(result, is_raw), "label": "REWARD"}] for result in results]
    return told if is_batch else told[0]


async def ranked(
    query: str,
    texts: Sequence[str],
    options: Options,
    return_text: bool,
    response: Response,
    door: Door,
    seconds: float,
) -> list[dict[str, Any]]:
    if not texts:
        raise Fault(400, "empty_input", "texts: is empty", param="texts")
    jobs = [_job([query, text], i, bool(options.truncate)) for i, text in enumerate(texts)]
    results = await _results(jobs, response, door, seconds, "texts")
    values = [_value(result, options.raw_scores) for result in results]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return [{"index": i, "score": values[i], **({"text": texts[i]} if return_text else {})} for i in order]


@router.get("/info", summary="What is served, and its limits")
async def info(door: TheDoor) -> dict[str, Any]:
    labels = {"id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}}
    limits = door.limits
    return {
        "model_id": door.settings.name,
        "model_sha": door.about.get("version"),
        "model_dtype": {"fp32": "float32", "bf16": "bfloat16"}[door.settings.dtype],
        "served_model_name": door.settings.name,
        "model_type": {"classifier": labels},
        "max_concurrent_requests": limits.queue_items,
        "max_input_length": door.about.get("max_tokens"),
        "max_batch_tokens": limits.batch_tokens,
        "max_batch_requests": limits.batch_items,
        "max_client_batch_size": limits.items,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


async def _results(jobs: Sequence[Job], response: Response, door: Door, seconds: float, where: str) -> list[Result]:
    """With the headers that tell what it cost, in milliseconds; of several batches the longest time."""
    began = time.monotonic()
    results = await door.rewards(jobs, seconds, where)
    say_truncated(response, results)
    total = time.monotonic() - began
    times = {
        "x-compute-time": total,
        "x-total-time": total,
        "x-tokenization-time": 0.0,  # done in the model's process, as part of the inference
        "x-queue-time": max(result["waited"] for result in results),
        "x-inference-time": max(result["took"] for result in results),
    }
    response.headers.update({name: str(round(1000 * value)) for name, value in times.items()})
    response.headers["x-compute-type"] = "gpu" if str(door.about.get("device")).startswith("cuda") else "cpu"
    response.headers["x-compute-characters"] = str(sum(map(job_length, jobs)))
    response.headers["x-compute-tokens"] = str(num_tokens(results))
    return results


def _job(one: Any, i: int, truncate: bool) -> Job:
    texts = [one] if isinstance(one, str) else one
    if not 1 <= len(texts) <= 2:
        raise Fault(422, "pair", f"{len(texts)} texts; give one text, or a prompt and a response", f"inputs[{i}]", i)
    if not texts[-1]:
        raise Fault(400, "empty_input", f"inputs[{i}]: is empty", param=f"inputs[{i}]", index=i)
    if len(texts) == 1:
        return rendered(texts[0], special_tokens=True, truncate=truncate)
    return conversation(texts[0], texts[1], as_turns=True, truncate=truncate)


def _value(result: Result, is_raw: bool) -> float:
    reward: float = result["reward"]
    return reward if is_raw else sigmoid(reward)
