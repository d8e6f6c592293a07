"""Servers for tests: a real one on a port, and the application in process over a model that the test writes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from moreward.serve.app import create_app
from moreward.serve.door import Door
from moreward.serve.settings import Limits, Settings

KEY = "sk-canary-1234567890"
LAUNCH = """
import json, sys
from pathlib import Path
from moreward.errors import MorewardError
from moreward.serve.run import serve
from moreward.serve.settings import Limits, Settings
told = json.loads(sys.argv[1])
limits = Limits(**told.pop("limits"))
try:
    serve(Settings(run=Path(told.pop("run")), limits=limits, keys=tuple(told.pop("keys", ())), **told),
          lambda said: print(said, flush=True))
except MorewardError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@dataclass
class Live:
    """A server process. `log` is where its standard error goes."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def client(self, **more: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, **more)

    @property
    def worker(self) -> int:
        """The process id of the one that owns the model."""
        told = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "serve.worker"], capture_output=True, text=True, check=True
        )
        return int(told.stdout.split()[0])

    def end(self) -> int:
        """Kills it, if it has not ended; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return self.process.wait()

    def wait_ready(self, seconds: float = 60, key: str = "") -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            try:
                if httpx2.get(f"{self.url}/readyz", headers=headers, timeout=5).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {seconds} s: {self.log.read_text(encoding='utf-8')}")


def started(run: Path, log: Path, *, limits: Mapping[str, Any] | None = None, **settings: Any) -> Live:
    told = json.dumps({"run": str(run), "port": 0, "limits": dict(limits or {}), **settings})
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, told],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "MOREWARD_THREADS": "1"},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    return Live(process, line.split()[0] if line else "", log)


@contextmanager
def serving(run: Path, log: Path, *, limits: Mapping[str, Any] | None = None, **settings: Any) -> Iterator[Live]:
    live = started(run, log, limits=limits, **settings)
    try:
        live.wait_ready(key=(settings.get("keys") or [""])[0])
        yield live
    finally:
        live.end()


# ---- in process --------------------------------------------------------------------------------------------------

ABOUT = {
    "version": "v1",
    "recipe": "arliss",
    "experts": ["chat", "code"],
    "domains": ["chat", "code"],
    "max_tokens": 64,
    "temperatures": {"chat": 2.0, "code": 0.5, "(all)": 1.0},
    "everyone": "(all)",
    "device": "cpu",
    "threads": 1,
    "deterministic": True,
}


def result(reward: float, **more: Any) -> dict[str, Any]:
    """What a worker says of a job."""
    told = {"reward": reward, "expert": "code", "weights": {"code": 1.0}, "expert_rewards": {}, "parts": {}}
    told |= {"part_rewards": {}, "uncertainty": None, "abstained": "", "router_entropy": 0.25}
    return {**told, "num_tokens": 3, "truncated": False, "id": "", **more}


class Model:
    """In the place of the process that owns a model. `answer` is given a job."""

    def __init__(self, answer: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self.answer = answer
        self.state, self.about, self.num_users = "ready", ABOUT, 0
        self.batches: list[int] = []
        self.opened = asyncio.Event()
        self.opened.set()

    @property
    def current(self) -> Model:
        return self

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def wait_ready(self) -> None: ...

    async def score(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        self.batches.append(len(jobs))
        await self.opened.wait()
        return [self.answer(job) for job in jobs]


@asynccontextmanager
async def application(
    model: Model, *, keys: tuple[str, ...] = (), limits: Mapping[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[httpx2.AsyncClient, Door]]:
    """The application over `model`, with a client for it."""
    told = Settings(run=Path("mixture"), keys=keys, limits=Limits(**(limits or {})), **settings)
    guard = create_app(told)
    guard.door.owner = guard.door.queue.models = model  # type: ignore[assignment]
    feeding = asyncio.create_task(guard.door.queue.run())
    transport = httpx2.ASGITransport(app=guard, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test", timeout=20) as client:
        yield client, guard.door
    feeding.cancel()
