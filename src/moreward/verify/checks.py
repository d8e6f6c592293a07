"""What was checked, and what did not match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moreward.checkpoint import verify_folder


@dataclass(frozen=True)
class Check:
    """`difference` is the largest one seen and `allowed` what it may be, both in units of the reward; None where
    nothing is measured. It holds where there are no faults; one that could not be made is not `done`."""

    name: str
    said: str
    difference: float | None = None
    allowed: float | None = None
    faults: tuple[str, ...] = ()
    done: bool = True

    @property
    def holds(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class Verified:
    """`hashes` are SHA-256 of the files that decide a reward, as they are now."""

    what: str
    kind: str
    checks: tuple[Check, ...]
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    @property
    def faults(self) -> list[str]:
        return [f"{self.what}: {fault}" for check in self.checks for fault in check.faults]


@dataclass(frozen=True)
class Golden:
    """A text with what it got when the model was written: `reward`, and that of each expert by name. `ids` are its
    tokens, `prompt_ids` those of its prompt."""

    prompt: Any
    response: Any
    reward: float
    experts: Mapping[str, float]
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...] = ()


def files_check(folder: Path) -> Check:
    """Every file against the hashes that the folder was sealed with."""
    faults = verify_folder(folder)
    return Check("files", "SHA-256 of every file, as it was sealed", faults=tuple(faults))


def compared(
    name: str,
    said: str,
    found: Sequence[float],
    wanted: Sequence[float],
    allowed: Sequence[float] | float,
    labels: Iterable[str] = (),
) -> Check:
    """One reward after the other. `labels` name them in faults; the limit told is that of the largest difference."""
    limits = [allowed] * len(found) if isinstance(allowed, float | int) else list(allowed)
    names = list(labels) or [f"golden text {i}" for i in range(len(found))]
    differences = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
    faults = [
        f"{name}: {label} gets {a:.9g}, not {b:.9g} (differs by {d:.2g}, allowed {limit:.2g})"
        for label, a, b, d, limit in zip(names, found, wanted, differences, limits, strict=True)
        if not d <= limit
    ]
    worst = max(range(len(differences)), key=differences.__getitem__) if differences else None
    return Check(
        name,
        said,
        None if worst is None else differences[worst],
        None if worst is None else limits[worst],
        tuple(faults),
    )
