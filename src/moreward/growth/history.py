"""The line of versions that changes make, and the way back."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from moreward.checkpoint import space_errors, verify_folder
from moreward.errors import RunError
from moreward.runs import changes_of, identity, model_folder, read_card


@dataclass(frozen=True)
class Version:
    """`change` is how it was made, `state` what is wrong with it now, empty if nothing."""

    run: Path
    model: str
    change: str
    domains: tuple[str, ...]
    state: str = ""


def history(run: str | Path) -> list[Version]:
    """The versions that led to `run`, the first one first. One whose folder is gone ends the line. RunError where `run`
    is none."""
    found: list[Version] = []
    place, wanted = Path(run), ""
    while True:
        try:
            folder = model_folder(place)
            card = read_card(folder)
        except (RunError, OSError, ValueError):
            if not found:
                raise
            found.append(Version(place, wanted, "", (), "the folder is gone"))
            break
        model = identity(folder)
        state = "another model is there now" if wanted not in ("", model) else ""
        last = (changes_of(card) or [{"kind": "", "domain": ""}])[-1]
        change = f"{last['kind']} {last['domain']}".strip() or "trained"
        found.append(Version(place, model, change, tuple(card["domains"]), state))
        parent = card.get("parent")
        if state or not parent:
            break
        place, wanted = _parent_place(place, parent["run"]), parent["model"]
    return found[::-1]


def roll_back(run: str | Path, out: str | Path | None = None) -> Path:
    """The version before `run`, byte for byte, in a new folder; nothing is changed or deleted. RunError where there
    is none or where it is not what it was."""
    versions = history(run)
    if len(versions) < 2:
        raise RunError(f"{run}: is the first version; there is none before it")
    before = versions[-2]
    target = Path(out or f"{run}-back")
    if before.state:
        raise RunError(f"{before.run}: cannot go back to it: {before.state}")
    if faults := verify_folder(model_folder(before.run)):
        raise RunError(f"{before.run}: not as it was written: {'; '.join(faults)}")
    if target.exists():
        raise RunError(f"--out {target}: exists; name a new folder")
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        with space_errors(target.parent):
            shutil.copytree(before.run, temporary, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _parent_place(run: Path, told: str) -> Path:
    """Where a parent is: where it was, seen from here, or beside its child when both have moved."""
    beside = run.parent / Path(told).name
    return beside if not Path(told).exists() and beside.exists() else Path(told)
