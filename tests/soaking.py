"""What is asked of a server for long, in any size: each function gives figures, its callers judge them."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2

from moreward.scoring import Scorer
from serving import Live

WORDS = ["calm", "bright", "old", "quiet", "fresh", "winter", "sea", "maps", "bread", "violin", "train", "library"]


def texts(num: int, *, most_words: int = 6, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct prompts and responses of mixed length."""
    draw = random.Random(seed)

    def some() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most_words)))

    return [(f"{i}: {some()}", some()) for i in range(num)]


def compositions(live: Live, scorer: Scorer, num: int, *, seed: int = 0) -> int:
    """S12: how many rewards differ in any bit over so many batches of shuffled company, four at once."""
    pool = texts(40)
    truth = [reward.number for reward in scorer.score(pool)]
    draw = random.Random(seed)
    chosen = [draw.sample(range(len(pool)), draw.randint(1, 16)) for _ in range(num)]

    def differ(rows: Sequence[int]) -> int:
        items = [{"prompt": pool[i][0], "response": pool[i][1]} for i in rows]
        told = client.post("/v1/rewards", json={"items": items}).json()["data"]
        return sum(one["score"] != truth[i] for one, i in zip(told, rows, strict=True))

    with live.client() as client, ThreadPoolExecutor(4) as threads:
        return sum(threads.map(differ, chosen))


def mixed_up(live: Live, scorer: Scorer, num_each: int, *, num_threads: int = 16) -> tuple[int, int]:
    """S13: how many of `num_threads` × `num_each` rewards of named experts are wrong by more than 1e-6; and of how
    many."""
    pool = texts(6, seed=1)
    truth = {name: [r.number for r in scorer.score(pool, expert=name)] for name in scorer.experts}
    assert len({tuple(row) for row in truth.values()}) == len(truth), "the experts must not agree"

    def thread(number: int) -> int:
        draw, wrong = random.Random(number), 0
        for _ in range(num_each):
            name, i = draw.choice(scorer.experts), draw.randrange(len(pool))
            body = {"items": [{"prompt": pool[i][0], "response": pool[i][1]}], "expert": name}
            told = client.post("/v1/rewards", json=body).json()["data"][0]
            wrong += told["expert"] != name or abs(told["score"] - truth[name][i]) > 1e-6
        return wrong

    with live.client() as client, ThreadPoolExecutor(num_threads) as threads:
        return sum(threads.map(thread, range(num_threads))), num_threads * num_each


def flood(live: Live, seconds: float, *, num_clients: int) -> Counter[int]:
    """S1: status codes of clients that ask again at once, whatever they are told."""
    codes: Counter[int] = Counter()
    ends = time.monotonic() + seconds

    def ask(number: int) -> None:
        body = {"input": [f"text {number} " + "x " * 30] * 4}
        with live.client() as client:
            while time.monotonic() < ends:
                codes[client.post("/classify", json=body).status_code] += 1

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(num_clients)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return codes


def many(live: Live, num: int, *, num_clients: int = 8) -> None:
    """S17: so many requests of mixed length, each with a text that was not there before; all must be answered."""

    def ask(number: int) -> None:
        draw = random.Random(number)
        with live.client() as client:
            for i in range(num // num_clients):
                body = {"input": f"{number}/{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 10)))}
                assert client.post("/classify", json=body).status_code == 200

    with ThreadPoolExecutor(num_clients) as threads:
        list(threads.map(ask, range(num_clients)))


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    told = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8")
    return int(told.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def both(live: Live) -> dict[str, int]:
    """Memory of the process that speaks HTTP and of the one that owns the model."""
    return {"http": memory(live.process.pid), "model": memory(live.worker)}


def description(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = httpx2.get(f"{live.url}/openapi.json", timeout=10).json()
    return found
