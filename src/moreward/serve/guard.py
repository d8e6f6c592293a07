"""What every request passes first: its key, its size and pace, its number, and whether its client still waits."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moreward.serve.door import Door
from moreward.serve.faults import Fault, unavailable

WITHOUT_KEY = frozenset({"/livez"})
ALWAYS_OPEN = frozenset({"/livez", "/readyz", "/health", "/ping", "/metrics"})
"""Routes that answer while the server drains."""
ADMIN = "/admin/"
"""Routes under this path are there with an admin key only, which is another than those of the other routes."""
ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Shape = Callable[[str, bytes, Fault], tuple[int, bytes, dict[str, str]]]


class Guard:
    """ASGI. `shape` writes a Fault as the route at a path writes it, from the path and the request's body."""

    def __init__(self, app: ASGIApp, door: Door, shape: Shape) -> None:
        self.app, self.door, self.shape = app, door, shape
        self.digests = digests(door.settings.keys)
        self.admin_digests = digests(door.settings.admin_keys)
        self.public = WITHOUT_KEY | ({"/metrics"} if door.settings.metrics_public else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        reply = Reply(send, given if ID.fullmatch(given) else uuid.uuid4().hex)
        body = b""
        try:
            self._check(scope["path"], headers)
            scope.setdefault("state", {})["seconds"] = self._deadline(headers)
            body = await self._read(headers, receive)
            scope["state"]["body"] = body
            with self.door.of_a_request() as door:
                scope["state"]["door"] = door
                reply.version = door.about.get("version", "")
                await self._answer(scope, body, receive, reply)
        except Fault as fault:
            await reply.fault(self.shape(scope["path"], body, fault))
            self.door.metrics.rejected.labels(fault.code).inc()
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.door.metrics.requests.labels(route, reply.status).inc()
            self.door.metrics.latency.labels("request").observe(time.monotonic() - began)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        is_admin = path.startswith(ADMIN)
        keys = self.admin_digests if is_admin and self.admin_digests else self.digests
        if keys and path not in self.public and not has_key(headers.get("authorization", ""), keys):
            raise Fault(401, "no_key", "a key is needed: Authorization: Bearer KEY")
        if is_admin and not self.admin_digests:
            raise Fault(404, "no_route", "Not Found")
        if self.door.is_draining and path not in ALWAYS_OPEN:
            raise unavailable("draining")
        if headers.get("content-encoding", "identity") != "identity":
            raise Fault(413, "compressed", "compressed bodies are not taken; send it as it is")

    def _deadline(self, headers: dict[str, str]) -> float:
        told = headers.get("x-request-timeout")
        if told is None:
            return self.door.limits.deadline
        if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", told) or float(told) == 0:
            raise Fault(400, "bad_timeout", "X-Request-Timeout: give seconds, more than 0", param="X-Request-Timeout")
        return min(float(told), self.door.limits.deadline)

    async def _read(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body, or a Fault as soon as it is too large or too slow."""
        most = self.door.limits.body_bytes
        told = headers.get("content-length", "0")
        if told.isdigit() and int(told) > most:
            raise Fault(413, "body_too_large", f"a body of {told} bytes; at most {most}")
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.door.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Fault(408, "gone", "the client went away before its body ended")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise Fault(413, "body_too_large", f"a body of more than {most} bytes")
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise Fault(408, "slow_body", f"the body took more than {self.door.limits.body_seconds:g} s") from None

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, reply: Reply) -> None:
        """Runs the route, and gives it up when the client goes away."""
        route: asyncio.Future[None] = asyncio.ensure_future(self.app(scope, _once(body), reply))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({route, gone}, return_when=asyncio.FIRST_COMPLETED)
            if route.done():
                route.result()
            else:
                reply.status = 499
        finally:
            for task in (route, gone):
                task.cancel()
            await asyncio.gather(route, gone, return_exceptions=True)


class Reply:
    """Where an answer goes: remembers its status and adds the headers that every answer has."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.send, self.status, self.version = send, 0, ""
        self.headers = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            version = [(b"x-model-version", self.version.encode())] if self.version else []
            message = {**message, "headers": [*message.get("headers", []), *self.headers, *version]}
        await self.send(message)

    async def fault(self, told: tuple[int, bytes, dict[str, str]]) -> None:
        if self.status:  # an answer has begun; the connection's end is all that can be said
            return
        status, body, headers = told
        fields = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        if status in (408, 413):
            fields["connection"] = "close"
        raw = [(k.encode(), v.encode()) for k, v in fields.items()]
        await self({"type": "http.response.start", "status": status, "headers": raw})
        await self({"type": "http.response.body", "body": body})


def digests(keys: Sequence[str]) -> list[bytes]:
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def has_key(authorization: str, keys: Sequence[bytes]) -> bool:
    """Bearer, or Basic with the key as password, which is what a browser can send. `keys` are digests."""
    scheme, _, told = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            told = base64.b64decode(told, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    digest = hashlib.sha256(told.strip().encode()).digest()
    return any([hmac.compare_digest(digest, one) for one in keys])  # noqa: C419  all are compared


def _once(body: bytes) -> Receive:
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()  # type: ignore[no-any-return]
        await asyncio.Event().wait()
        raise AssertionError

    return receive


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
