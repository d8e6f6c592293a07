"""What a server may be asked for, and how much of it."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from moreward.errors import ConfigError

KEY_VARIABLE = "MOREWARD_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes in bytes, characters, items and tokens; times in seconds.

    `queue_tokens` and `batch_tokens` count estimated tokens, of three characters each: the process that holds the
    queue does not tokenise.
    """

    body_bytes: int = 8 * 2**20
    body_seconds: float = 5.0
    items: int = 1024
    text_characters: int = 1_000_000
    queue_items: int = 8192
    queue_tokens: int = 4_000_000
    batch_items: int = 256
    batch_tokens: int = 16_384
    deadline: float = 120.0
    drain: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`names` are what the model is called, the first in replies. `keys` open every route; none means no key.
    `admin_keys` open those under /admin/, which are not there without one."""

    run: Path
    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    insecure: bool = False
    metrics_public: bool = False
    retemplate: bool = False
    device: str = "auto"
    dtype: str = "fp32"
    backbone: str | None = None
    free_batches: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.port < 65536:
            faults.append(f"--port: {self.port} is no port; give 1 to 65535, or 0 for any that is free")
        if not _is_loopback(self.host) and not self.keys and not self.insecure:
            faults.append(
                f"--host: {self.host} can be reached from other machines, and no key is set. Set {KEY_VARIABLE} or "
                "--api-key-file, listen on 127.0.0.1, or say --insecure"
            )
        if {*self.keys} & {*self.admin_keys}:
            faults.append("--admin-key-file: holds a key of the other routes; an admin key is another one")
        if faults:
            raise ConfigError(faults)

    @property
    def name(self) -> str:
        return self.names[0] if self.names else self.run.resolve().name


def read_keys(file: Path | None, option: str = "--api-key-file") -> tuple[str, ...]:
    """Keys from a file, one a line, else from the environment, between commas: never from the command line, which
    other users of the machine can read. ConfigError for a file that is not there, or a key of fewer than 16 characters.
    """
    try:
        text = os.environ.get(KEY_VARIABLE, "").replace(",", "\n") if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {file} cannot be read: {error}") from error
    where = KEY_VARIABLE if file is None else str(file)
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not keys:
        raise ConfigError(f"{where}: holds no key; write one a line")
    if any(len(key) < 16 or not key.isascii() for key in keys):
        raise ConfigError(f"{where}: a key has 16 ASCII characters or more (one of {len(keys)} has not)")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
