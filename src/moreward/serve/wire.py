"""Messages between the two processes: a length of four bytes, then JSON. Nothing that could run code when read."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, BinaryIO

LENGTH = struct.Struct(">I")


def packed(message: Any) -> bytes:
    """Raises ValueError for NaN and infinities."""
    body = json.dumps(message, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(body)) + body


def read(stream: BinaryIO) -> Any:
    """The next message; None at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = stream.read(LENGTH.unpack(head)[0])
    return json.loads(body.decode("utf-8", "surrogatepass"))


async def receive(stream: asyncio.StreamReader) -> Any:
    """As `read`. Raises IncompleteReadError at the end."""
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    return json.loads((await stream.readexactly(length)).decode("utf-8", "surrogatepass"))
