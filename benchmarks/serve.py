"""Requests per second and waiting times of the server, beside the same experts behind a plain FastAPI handler.

python -m benchmarks.serve [--run RUN] [--seconds 20] [--clients 1,8,64] [--quick]

The plain handler is what one writes in an afternoon: PEFT's adapters of the run's experts on one model, a lock,
`set_adapter`, one text a forward. Clients are a process of their own, on loopback, and ask again once answered.
Ours is asked by name like the plain one and with its router, with batches that move no reward by a bit (the default:
a text a forward) and with free ones. Without --run a mixture is trained for a few
steps on the packaged MiniLM: its rewards are worth nothing, its cost is that of a trained one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx2

from benchmarks.harness import RESULTS, append, told
from benchmarks.machine import ROOT, commit, describe

DOMAINS = ("advice", "code", "facts", "stories")
WORDS = "sea calm bright old map winter tells more than bread violin quiet library".split()  # noqa: SIM905
OURS, ROUTED, PLAIN = "moreward serve, expert named", "moreward serve, routed", "FastAPI and PEFT, expert named"
FREE, FREE_ROUTED = "moreward serve --free-batches, expert named", "moreward serve --free-batches, routed"
SERVERS = {OURS: "ours", ROUTED: "ours", FREE: "free", FREE_ROUTED: "free", PLAIN: "plain"}


def texts(num: int, words: int = 24) -> list[tuple[str, str]]:
    draw = random.Random(0)
    return [(" ".join(draw.choices(WORDS, k=words)), " ".join(draw.choices(WORDS, k=words))) for _ in range(num)]


def mixture(folder: Path) -> Path:
    """Four experts on MiniLM with its own pooling, two steps each."""
    from moreward.train.runner import train

    data = folder / "pairs.jsonl"
    pool = texts(96)
    rows = [
        {"prompt": p, "chosen": r, "rejected": pool[i - 1][1], "domain": DOMAINS[i % len(DOMAINS)]}
        for i, (p, r) in enumerate(pool)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {"recipe": "arliss", "backbone": "minilm", "out": str(folder / "run"), "pooling": "own"}
    return train({**settings, "data": {"train": str(data), "max_length": 256}, "train": {"max_steps": 2}})


def plain(run: Path, port: int) -> None:
    """The handler that ours is measured against."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folders = sorted((run / "model" / "experts").iterdir())
    card = json.loads((run / "model" / "moreward.json").read_text(encoding="utf-8"))
    from moreward.nn.backbone import resolve_backbone

    base = AutoModelForSequenceClassification.from_pretrained(resolve_backbone(card["backbone"]["name"]), num_labels=1)
    model = PeftModel.from_pretrained(base, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model" / "backbone")
    lock = threading.Lock()
    app = FastAPI()

    @app.post("/reward")
    def reward(body: dict[str, str]) -> dict[str, float]:
        inputs = tokenizer(body["prompt"], body["response"], return_tensors="pt", truncation=True, max_length=256)
        inputs.pop("token_type_ids", None)
        with lock, torch.no_grad():
            model.set_adapter(body["expert"])
            return {"reward": float(model(**inputs).logits[0, 0])}

    uvicorn.run(app, port=port, log_level="warning")


def ask(url: str, kind: str, experts: Sequence[str], num_clients: int, seconds: float) -> dict[str, Any]:
    """What so many clients saw. Latencies in milliseconds."""
    pool = texts(256)
    taken: list[float] = []
    codes: dict[int, int] = {}
    first: dict[str, float] = {}

    def request(i: int) -> tuple[str, dict[str, Any]]:
        prompt, response = pool[i % len(pool)]
        expert = experts[i % len(experts)]
        if kind == PLAIN:
            return "/reward", {"prompt": prompt, "response": response, "expert": expert}
        named = expert if kind in (OURS, FREE) else "auto"
        return "/v1/rewards", {"items": [{"prompt": prompt, "response": response}], "expert": named}

    async def client(number: int, ends: float) -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=120) as asking:
            i = number
            while time.perf_counter() < ends:
                path, body = request(i)
                began = time.perf_counter()
                reply = await asking.post(path, json=body)
                taken.append(1000 * (time.perf_counter() - began))
                codes[reply.status_code] = codes.get(reply.status_code, 0) + 1
                if i < 8 and reply.status_code == 200:
                    answer = reply.json()
                    first[str(i)] = answer["reward"] if kind == PLAIN else answer["data"][0]["score"]
                i += num_clients

    async def all_clients() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(client(n, began + seconds) for n in range(num_clients)))
        return time.perf_counter() - began

    wall = asyncio.run(all_clients())
    cuts = quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else taken * 99
    return {
        "clients": num_clients,
        "requests": len(taken),
        "codes": codes,
        "per_second": len(taken) / wall,
        "p50_ms": cuts[49],
        "p99_ms": cuts[98],
        "first": first,
    }


@contextmanager
def process(words: Sequence[str], url: str, path: str) -> Iterator[None]:
    """A server until the block ends; the block begins when `path` answers."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    running = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment)
    try:
        ends = time.monotonic() + 180
        while True:
            if running.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"{' '.join(words[:3])} did not start")
            try:
                if httpx2.get(url + path, timeout=5).status_code < 500:
                    break
            except httpx2.TransportError:
                pass
            time.sleep(0.2)
        yield
    finally:
        running.terminate()
        running.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def measured(run: Path, clients: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """All servers run at the same time and are asked in turns, so that what else the machine does meets all."""
    experts = [folder.name for folder in sorted((run / "model" / "experts").iterdir())]
    urls = {name: f"http://127.0.0.1:{free_port()}" for name in ("ours", "free", "plain")}
    ports = {name: url.rpartition(":")[2] for name, url in urls.items()}
    ours = ["-m", "moreward", "serve", str(run), "--port", ports["ours"]]
    free = ["-m", "moreward", "serve", str(run), "--free-batches", "--port", ports["free"]]
    other = ["-m", "benchmarks.serve", "--plain", str(run), "--port", ports["plain"]]
    found = []
    with (
        process(ours, urls["ours"], "/readyz"),
        process(free, urls["free"], "/readyz"),
        process(other, urls["plain"], "/docs"),
    ):
        for kind, server in SERVERS.items():
            _client(urls[server], kind, experts, 2, min(seconds, 3))
        for number in clients:
            for kind, server in SERVERS.items():
                found.append({"server": kind, **_client(urls[server], kind, experts, number, seconds)})
    return found


def _client(url: str, kind: str, experts: Sequence[str], num_clients: int, seconds: float) -> dict[str, Any]:
    words = json.dumps({"url": url, "kind": kind, "experts": experts, "num_clients": num_clients, "seconds": seconds})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve", "--client", words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return dict(json.loads(done.stdout))


def furthest(results: Sequence[Mapping[str, Any]]) -> float:
    """The largest difference between the two servers' rewards of the same text and expert."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for one in results:
        if one["server"] in (OURS, PLAIN):
            (ours if one["server"] == OURS else theirs).update(one["first"])
    return max((abs(ours[i] - theirs[i]) for i in ours.keys() & theirs.keys()), default=float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run whose experts are adapters with the backbone's own pooling")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--quick", action="store_true", help="two seconds each; nothing is written")
    parser.add_argument("--results", type=Path, default=RESULTS / "serve")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        print(json.dumps(ask(**json.loads(options.client))))
        return
    if options.plain:
        plain(options.plain, options.port)
        return
    seconds = 2.0 if options.quick else options.seconds
    record: dict[str, Any] = {
        "benchmark": "serve",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "seconds": seconds,
        **commit(),
        "machine": describe(),
    }
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or mixture(Path(folder))
        record["results"] = measured(run.resolve(), [int(n) for n in options.clients.split(",")], seconds)
    record["largest_difference"] = furthest(record["results"])
    record["load_average_after"] = os.getloadavg()
    print(f"{told(record)}\n\n| clients | server | requests/s | p50 ms | p99 ms | answers |\n|---|---|---|---|---|---|")
    for one in record["results"]:
        codes = ", ".join(f"{count} × {code}" for code, count in one["codes"].items())
        print(
            f"| {one['clients']} | {one['server']} | {one['per_second']:.1f} | {one['p50_ms']:.1f} "
            f"| {one['p99_ms']:.1f} | {codes} |"
        )
    print(f"\nLargest difference between the two servers' rewards: {record['largest_difference']:.2g}")
    if not options.quick:
        append(record, options.results)


if __name__ == "__main__":
    main()
