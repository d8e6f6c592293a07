"""Keeps the process that owns the model: starts it, speaks to it, starts it again when it dies."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from moreward.errors import RunError
from moreward.serve.faults import unavailable
from moreward.serve.settings import Settings
from moreward.serve.wire import packed, receive

log = logging.getLogger(__name__)

MOST_DEATHS = 3
WINDOW = 60.0
"""After so many deaths within so many seconds it is not started again."""


class Owner:
    """`state` is loading, ready, worker_down or self_test_failed; `about` what the model says of itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.state = "loading"
        self.about: Mapping[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._deaths: list[float] = []
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    async def start(self) -> None:
        """Load the model. Raises RunError with the worker's own word where it cannot."""
        await self._load()
        self._keeper = asyncio.create_task(self._keep())

    async def wait_ready(self) -> None:
        await self._ready.wait()

    async def score(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One result a job. Raises Fault 503 where the process dies meanwhile. One call at a time."""
        process = self._process
        if self.state != "ready" or process is None:
            raise unavailable(self.state)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(packed(jobs))
            await process.stdin.drain()
            reply = await receive(process.stdout)
        except (OSError, asyncio.IncompleteReadError) as error:
            self._not_ready("worker_down")
            raise unavailable("worker_down") from error
        results: list[dict[str, Any]] = reply["results"]
        return results

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 2)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _load(self) -> None:
        told = {
            "run": str(self.settings.run),
            "device": self.settings.device,
            "dtype": self.settings.dtype,
            "backbone": self.settings.backbone,
            "free_batches": self.settings.free_batches,
        }
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moreward.serve.worker", json.dumps(told)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for us alone
        )
        assert self._process.stdout is not None
        try:
            said = await receive(self._process.stdout)
        except asyncio.IncompleteReadError as error:
            code = await self._process.wait()
            raise RunError(f"{self.settings.run}: the model's process ended while loading (exit {code})") from error
        if "failed" in said:
            raise RunError(said["failed"])
        self.about, self.state = said["ready"], "ready"
        self._ready.set()

    def _not_ready(self, state: str) -> None:
        self.state = state
        self._ready.clear()

    async def _keep(self) -> None:
        """Waits for the process to die, and starts another."""
        while self._process is not None:
            code = await self._process.wait()
            self._not_ready("worker_down")
            now = time.monotonic()
            self._deaths = [*(d for d in self._deaths if now - d < WINDOW), now]
            log.error("the process of the model ended (exit %s), %d of %d deaths", code, len(self._deaths), MOST_DEATHS)
            if len(self._deaths) >= MOST_DEATHS:
                log.error("not started again: it would die again")
                return
            await asyncio.sleep(0.25 * 2 ** (len(self._deaths) - 1))
            try:
                await self._load()
            except RunError as error:
                log.error("%s", error)
                self._not_ready("self_test_failed")
                return
