"""Ends work as kill -9 and a full disk do: a process that has loaded its libraries forks a child for each task."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import moreward

SOURCE = Path(moreward.__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
NEED_SPACE = ("fsync", "mkdir")
CHANGE_THE_DISK = (*NEED_SPACE, "replace", "rename", "rmdir", "unlink", "truncate")


class Forks:
    """`program` is Python that loads what is needed and defines `work(*words)`; it finds `arguments` as a list.

    A context: the process ends with it. What the last child said is in `log`.
    """

    def __init__(self, program: str, *arguments: object, log: str | Path = os.devnull) -> None:
        self.log = Path(log)
        self.process = subprocess.Popen(
            [sys.executable, __file__, program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def run(self, *words: object, crash_at: int = 0, full_at: int = 0, kill_after: float = 0.0) -> int:
        """The exit code of a child that does `work(*words)`, negative for a signal.

        It ends with code 9 at that one of its calls that change the disk (a file just opened stays empty), finds the
        disk full from that one on of those that need space, or gets a kill -9 after so many seconds; 0 means never.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        told = {"words": list(map(str, words)), "crash_at": crash_at, "full_at": full_at, "kill_after": kill_after}
        self.process.stdin.write(json.dumps({**told, "log": str(self.log)}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def said(self) -> str:
        return self.log.read_text()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


def _serve(program: str) -> None:
    scope: dict[str, Any] = {"arguments": sys.argv[2:]}
    exec(program, scope)
    for line in sys.stdin:
        told = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_do(scope["work"], told))
        if told["kill_after"]:
            time.sleep(told["kill_after"])
            os.kill(child, signal.SIGKILL)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _do(work: Callable[..., object], told: dict[str, Any]) -> int:
    log = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if told["crash_at"]:
        _at_call(told["crash_at"], CHANGE_THE_DISK, lambda number, at: os._exit(9) if number == at else None)
    if told["full_at"]:
        _at_call(told["full_at"], NEED_SPACE, _no_space)
    try:
        work(*told["words"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # noqa: BLE001 - whatever ends the child is told by its exit code
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _no_space(number: int, at: int) -> None:
    if number >= at:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _at_call(at: int, names: tuple[str, ...], act: Callable[[int, int], None]) -> None:
    """Let `act` see the number of each call of `os` by these names, before it, and of each opening to write, after."""
    numbers = itertools.count(1)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            act(next(numbers), at)
            return call(*args, **options)

        return run

    def opened(*args: Any, **options: Any) -> Any:
        file = open(*args, **options)  # noqa: SIM115 - the caller closes it
        if "r" not in file.mode or "+" in file.mode:
            try:
                act(next(numbers), at)
            except OSError:
                file.close()
                raise
        return file

    for name in names:
        setattr(os, name, counted(getattr(os, name)))
    io.open = opened


if __name__ == "__main__":
    _serve(sys.argv[1])
