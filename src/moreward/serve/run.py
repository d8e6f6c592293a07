"""The server as a process: started, drained on SIGTERM and ended with a code that says how."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from moreward.errors import RunError
from moreward.runs import model_folder
from moreward.serve.app import create_app
from moreward.serve.faults import Fault
from moreward.serve.settings import Settings

HEADER_SECONDS = 5.0


class Impatient(HttpToolsProtocol):
    """Closes a connection whose request's head does not arrive in time: uvicorn itself would hold it for ever."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Leaves signals to `serve`: uvicorn's own handler would end the process by the signal, not with 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; what is in flight then is finished first. `say` is told the address.

    RunError: the run is not there or does not compute what it should, or the port is taken.
    """
    model_folder(settings.run)  # before anything is started
    listening = _bound(settings.host, settings.port)
    failures: list[str] = []
    server: Server

    def failed(message: str) -> None:
        failures.append(message)
        server.should_exit = True

    guard = create_app(settings, failed)
    config = uvicorn.Config(
        guard,
        http=Impatient,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.limits.drain),
    )
    server = Server(config)

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def drain() -> None:
            guard.door.is_draining = True
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, drain)
        reloads: set[asyncio.Task[None]] = set()

        async def reload() -> None:
            with suppress(Fault):  # it is in the log; the old model goes on
                await guard.door.reload()

        def begin_reload() -> None:
            task = loop.create_task(reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, begin_reload)
        await server.serve(sockets=[listening])

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(f"http://{host}:{listening.getsockname()[1]}  (ready when /readyz says so)")
    asyncio.run(run())
    if failures:
        raise RunError(failures[0])


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on, which costs each reply 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
    except OSError as error:
        listening.close()
        raise RunError(f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --port") from error
    return listening
