"""A server, asked for golden rewards.

A route is a function of (client, texts, expert) to rewards, by its name in `ROUTES`; an empty expert is the server's
own choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from moreward.client import KEY_VARIABLE, Client
from moreward.errors import ConfigError, MorewardError, ServerError
from moreward.runs import identity, model_folder
from moreward.scoring import load
from moreward.types import Conversation
from moreward.verify.checks import Check, Golden, Verified, compared
from moreward.verify.exported import exported_folders, golden_of_note, read_note
from moreward.verify.run import golden_of

Route = Callable[[str, Sequence[Golden], str], list[float]]


def native(url: str, texts: Sequence[Golden], expert: str) -> list[float]:
    """`POST /v1/rewards`."""
    with Client(url, on_long="truncate", retries=2) as client:
        items = [Conversation(prompt=one.prompt, response=one.response) for one in texts]
        return [reward.number for reward in client.score(items, expert=expert)]


def predict(url: str, texts: Sequence[Golden], expert: str) -> list[float]:
    """`POST /predict` of text-embeddings-inference: pairs of texts."""
    inputs = [[one.prompt, one.response] for one in texts]
    told = _posted(url, "/predict", {"inputs": inputs, "raw_scores": True, "truncate": True})
    return [float(one[0]["score"]) for one in told]


def classify(url: str, texts: Sequence[Golden], expert: str) -> list[float]:
    """`POST /classify` of vLLM: token ids, so that no template stands between."""
    body = {"input": [list(one.ids) for one in texts], "use_activation": False}
    told = _posted(url, "/classify", {**body, **({"model": expert} if expert else {})})
    return [float(one["probs"][0]) for one in told["data"]]


ROUTES: Mapping[str, Route] = {"native": native, "predict": predict, "classify": classify}


def verify_live(url: str, *, against: Path | None, route: str = "native", backbone: str | None = None) -> Verified:
    """Golden rewards of `against`, a run or an exported folder, asked at `url`.

    ConfigError without it; ServerError where nobody answers. A reward that does not match is told in the checks.
    """
    if against is None:
        raise ConfigError("--against RUN: name the run, or the exported folder, that the server is to agree with")
    if route not in ROUTES:
        raise ConfigError(f"--route {route!r}: there are {', '.join(ROUTES)}")
    url = url.rstrip("/")
    folders = exported_folders(against)
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise ConfigError(f"--against {against}: holds several models; name one of {names}")
    checks: list[Check] = []
    if folders:
        note = read_note(folders[0])
        golden, offset = golden_of_note(note), float(note["offset"])
        limits = {"": [float(note["tolerance"])] * len(golden)}
    else:
        scorer = load(against, device="cpu", backbone=backbone)
        golden, offset = golden_of(scorer), 0.0
        told = scorer.score([Conversation(prompt=g.prompt, response=g.response) for g in golden], on_long="truncate")
        limits = {"": [scorer.allowed(reward.weights) for reward in told]}
        limits |= {name: [scorer.allowed([name])] * len(golden) for name in (golden[0].experts if golden else ())}
        if route == "native":
            checks.append(_same_model(url, model_folder(against)))
    texts, left = _askable(golden, route)
    checks.append(Check("golden", f"{len(texts)} texts asked at {route}{left}", faults=_none(texts)))
    judges = [name for name in limits if _can_judge(name, route, limits)]
    for name in judges:
        wanted = [golden[i].experts[name] if name else golden[i].reward for i in texts]
        checks += _asked(
            url, ROUTES[route], [golden[i] for i in texts], name, wanted, [limits[name][i] for i in texts], offset
        )
    return Verified(url, f"server, {route}", tuple(checks))


def _can_judge(expert: str, route: str, limits: Mapping[str, object]) -> bool:
    """Token ids do not say where the prompt ends, so that a router cannot be asked with them."""
    if route == "classify":
        return bool(expert) or len(limits) == 1
    return route == "native" or not expert


def _asked(
    url: str,
    route: Route,
    golden: Sequence[Golden],
    expert: str,
    wanted: list[float],
    limits: list[float],
    offset: float,
) -> list[Check]:
    who = f"expert {expert}" if expert else "the model"
    try:
        together = [value + offset for value in route(url, golden, expert)]
        alone = [route(url, [one], expert)[0] + offset for one in golden]
        reverse = [value + offset for value in route(url, golden[::-1], expert)][::-1]
    except MorewardError as error:
        return [Check("rewards", who, faults=(f"{who}: {error}",))]
    labels = [f"golden text {i}, {who}," for i in range(len(golden))]
    return [
        compared("rewards", f"golden rewards of {who}", together, wanted, limits, labels),
        compared(
            "company",
            f"{who}: alone and in reverse, against together",
            [*alone, *reverse],
            together * 2,
            limits * 2,
            labels * 2,
        ),
    ]


def _askable(golden: Sequence[Golden], route: str) -> tuple[list[int], str]:
    """The golden texts that a route can carry, and how many it cannot."""
    able = [
        i
        for i, g in enumerate(golden)
        if route != "predict" or (isinstance(g.prompt, str) and isinstance(g.response, str))
    ]
    left = len(golden) - len(able)
    return able, f"; {left} left out: conversations of several turns, which it cannot carry" if left else ""


def _none(texts: Sequence[int]) -> tuple[str, ...]:
    return () if texts else ("there is no golden text that could be asked",)


def _same_model(url: str, folder: Path) -> Check:
    with Client(url, retries=2) as client:
        served = client.identity.partition("/")[0]  # what follows is how it computes
    here = identity(folder)
    faults = () if served == here else (f"serves another model: SHA-256 {served[:12]}…, not {here[:12]}…",)
    return Check("model", "the version that is served", faults=faults)


def _posted(url: str, path: str, body: Mapping[str, object]) -> Any:
    key = os.environ.get(KEY_VARIABLE, "").split(",")[0].strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx2.post(url + path, json=body, headers=headers, timeout=120)
    except httpx2.TransportError as error:
        raise ServerError(f"{url}{path}: no answer ({type(error).__name__}: {error}). Is it running?") from error
    if reply.status_code != 200:
        raise ServerError(f"{url}{path}: status {reply.status_code}: {reply.text[:200]}")
    return reply.json()
