"""Keeps the process that owns the model: starts it, starts it again when it dies, and puts another in its place."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moreward.errors import RunError
from moreward.serve.faults import Fault, unavailable
from moreward.serve.settings import Settings
from moreward.serve.wire import packed, receive

log = logging.getLogger(__name__)

MOST_DEATHS = 3
WINDOW = 60.0
"""After so many deaths within so many seconds it is not started again."""


class Loaded:
    """A process that owns a model, which has scored its golden texts. `about` is what the model says of itself.

    `num_users` counts the requests that began with it: it is ended when there are none and another took its place.
    """

    def __init__(self, process: asyncio.subprocess.Process, about: Mapping[str, Any]) -> None:
        self.process, self.about = process, about
        self.num_users = 0
        self.broken: Callable[[], None] = lambda: None

    @classmethod
    async def start(cls, settings: Settings) -> Loaded:
        """Raises RunError with the process's own word where the model cannot be loaded."""
        told = {
            "run": str(settings.run),
            "device": settings.device,
            "dtype": settings.dtype,
            "backbone": settings.backbone,
            "free_batches": settings.free_batches,
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moreward.serve.worker", json.dumps(told)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for us alone
        )
        assert process.stdout is not None
        try:
            said = await receive(process.stdout)
        except asyncio.IncompleteReadError as error:
            code = await process.wait()
            raise RunError(f"{settings.run}: the model's process ended while loading (exit {code})") from error
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if "failed" in said:
            await process.wait()
            raise RunError(said["failed"])
        return cls(process, said["ready"])

    async def score(self, jobs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One result a job. Raises Fault 503 where the process dies meanwhile. One call at a time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(packed(jobs))
            await self.process.stdin.drain()
            reply = await receive(self.process.stdout)
        except (OSError, asyncio.IncompleteReadError) as error:
            self.broken()
            raise unavailable("worker_down") from error
        results: list[dict[str, Any]] = reply["results"]
        return results

    async def stop(self) -> None:
        if self.process.returncode is not None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 2)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class Owner:
    """`state` is loading, ready, worker_down or self_test_failed; `current` is the model that new requests get.
    `loaded` is called with what a model says of itself when its turn comes."""

    def __init__(self, settings: Settings, loaded: Callable[[Mapping[str, Any]], None] = lambda about: None) -> None:
        self.settings, self._told_loaded = settings, loaded
        self.state = "loading"
        self.current: Loaded | None = None
        self._deaths: list[float] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = asyncio.Event()
        self._is_reloading = False

    @property
    def about(self) -> Mapping[str, Any]:
        return {} if self.current is None else self.current.about

    async def start(self) -> None:
        """Load the model. Raises RunError with the worker's own word where it cannot."""
        self._take(await Loaded.start(self.settings))

    async def wait_ready(self) -> None:
        await self._ready.wait()

    async def reload(self) -> Mapping[str, Any]:
        """Load what stands at the run's place now, beside the model that serves, and let it serve from the next
        request on; requests that have begun are answered by the old one, which is ended after the last of them.
        Returns what the new model says of itself.

        Raises Fault 409 where the new one cannot be loaded or a reload is under way: the old one goes on serving.
        """
        if self._is_reloading or self.state == "loading":
            raise Fault(409, "reloading", "the model is being loaded already; ask again when that has ended")
        self._is_reloading = True
        try:
            new = await Loaded.start(self.settings)
        except RunError as error:
            log.error("reload refused: %s", error)
            raise Fault(
                409, "reload_refused", f"the old model goes on: {re.sub(r'/[^ :]*/', '', str(error))}"
            ) from None
        finally:
            self._is_reloading = False
        old = self.current
        self._take(new)
        log.info("model %s serves now", new.about["version"])
        if old is not None:
            self._run(self._retire(old))
        return new.about

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.current is not None:
            await self.current.stop()

    def _take(self, new: Loaded) -> None:
        self.current, self.state = new, "ready"
        new.broken = lambda: self._not_ready("worker_down", new)
        self._ready.set()
        self._told_loaded(new.about)
        self._run(self._keep(new))

    def _run(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _not_ready(self, state: str, which: Loaded) -> None:
        if which is self.current:
            self.state = state
            self._ready.clear()

    async def _retire(self, old: Loaded) -> None:
        try:
            while old.num_users and old.process.returncode is None:
                await asyncio.sleep(0.02)
        finally:
            await old.stop()

    async def _keep(self, loaded: Loaded) -> None:
        """Waits for the process to die, and starts another if it was the one that serves."""
        code = await loaded.process.wait()
        if loaded is self.current:
            self._not_ready("worker_down", loaded)
            now = time.monotonic()
            self._deaths = [*(d for d in self._deaths if now - d < WINDOW), now]
            log.error("the process of the model ended (exit %s), %d of %d deaths", code, len(self._deaths), MOST_DEATHS)
            if len(self._deaths) >= MOST_DEATHS:
                log.error("not started again: it would die again")
                return
            await asyncio.sleep(0.25 * 2 ** (len(self._deaths) - 1))
            try:
                new = await Loaded.start(self.settings)
            except RunError as error:
                log.error("%s", error)
                self._not_ready("self_test_failed", loaded)
                return
            if loaded is self.current:
                self._take(new)
            else:  # a reload was faster
                await new.stop()
