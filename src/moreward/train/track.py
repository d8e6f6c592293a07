"""Where a run's numbers go while it trains: JSON lines, the console, and the trackers that accelerate knows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Reporter(Protocol):
    """What a user sees. The library's default is silence."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...
    def step(self, done: int, text: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, text: str) -> None: ...


class Silent:
    def start(self, what: str, total: int, done: int = 0) -> None: ...
    def step(self, done: int, text: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, text: str) -> None: ...


class Console:
    """A progress bar with rate and time left on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = RichConsole(stderr=True)
        self._columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"),
        )
        self._make = Progress
        self._bar: Any = None
        self._started = (0.0, 0)
        self._what = ""

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.finish()
        self._what, self._started = what, (time.monotonic(), done)
        if self.console.is_terminal:
            self._bar = self._make(*self._columns, console=self.console, transient=False)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, completed=done, rate="", text="")
        self._total, self._text = total, ""

    def step(self, done: int, text: str = "") -> None:
        began, first = self._started
        rate = (done - first) / max(time.monotonic() - began, 1e-9)
        self._text = text or self._text
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.1f}/s", text=self._text)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._what:
            seconds = time.monotonic() - self._started[0]
            self.console.print(f"{self._what}: {self._total} in {seconds:.1f} s {self._text}", highlight=False)
        self._what = ""

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)


class MetricsFile:
    """`metrics.jsonl`: one line per record, each with its stage and step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def write(self, record: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def drop_after(self, stage: str, step: int) -> None:
        """Forget what a killed run wrote of this stage after its last checkpoint, and a cut last line."""
        kept = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["stage"] != stage or record["step"] <= step:
                kept.append(line + b"\n")
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_bytes(b"".join(kept))
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
