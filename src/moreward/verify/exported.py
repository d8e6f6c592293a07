"""Exported folders, recomputed by the library that they are for.

A form is a function that opens a folder and gives the rewards of token ids: the kind in its manifest chooses it from
`FORMS`. N texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moreward.checkpoint import sha256_file
from moreward.errors import RunError
from moreward.export.merged import NOTE, opened
from moreward.items import as_text
from moreward.runs import identity, model_folder
from moreward.scoring import load
from moreward.verify.checks import Check, Golden, Verified, compared, files_check
from moreward.verify.run import golden_of

Rewards = Callable[[list[list[int]]], Tensor]
FORMS: Mapping[str, Callable[[Path], Rewards]] = {"moreward-merged": opened}
DECIDE = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def kind_of(folder: Path) -> str:
    """The kind that a folder was sealed as; empty where it was not."""
    try:
        told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(told.get("kind", "")) if isinstance(told, dict) else ""


def exported_folders(path: Path) -> list[Path]:
    """The exported folders at `path`: itself, or one a mixture's expert; empty where there is none."""
    if kind_of(path) in FORMS:
        return [path]
    if not path.is_dir():
        return []
    return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and kind_of(folder) in FORMS]


def verify_exported(folder: Path, *, backbone: str | None = None, against: Path | None = None) -> Verified:
    """All checks of one exported folder; `against` is the run that it is said to come from."""
    kind = kind_of(folder)
    checks = [files_check(folder)]
    hashes = {name: sha256_file(folder / name) for name in DECIDE if (folder / name).is_file()}
    if not checks[0].holds:
        checks.append(Check("rewards", "not computed: a file is not what it was", done=False))
        return Verified(str(folder), kind, tuple(checks), hashes)
    note = read_note(folder)
    golden, allowed = golden_of_note(note), float(note["allowed"])
    if against is not None:
        checks.append(_from_run(note, golden, against, backbone))
    rewards = FORMS[kind](folder)
    ids, wanted = [list(one.ids) for one in golden], [one.reward for one in golden]

    def computed(texts: list[list[int]]) -> list[float]:
        return [float(value) + note["offset"] for value in rewards(texts)]

    together, alone = computed(ids), [computed([one])[0] for one in ids]
    checks += [
        compared("rewards", f"{len(golden)} golden rewards recomputed by transformers", together, wanted, allowed),
        compared(
            "company",
            "alone and in reverse, against together: the same but for rounding",
            [*alone, *computed(ids[::-1])[::-1]],
            together * 2,
            allowed,
            [f"golden text {i} {way}" for way in ("alone", "in reverse") for i in range(len(golden))],
        ),
    ]
    return Verified(str(folder), kind, tuple(checks), hashes)


def read_note(folder: Path) -> dict[str, Any]:
    """What an export tells of itself. RunError where an older version wrote it."""
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    if not isinstance(note, dict) or not {"golden", "allowed", "offset", "run", "expert"} <= note.keys():
        raise RunError(f"{folder / NOTE}: does not tell what to compare with; export the run again")
    return note


def golden_of_note(note: Mapping[str, Any]) -> list[Golden]:
    return [
        Golden(as_text(one["prompt"]), as_text(one["response"]), one["reward"], {}, tuple(one["ids"]))
        for one in note["golden"]
    ]


def _from_run(note: Mapping[str, Any], golden: list[Golden], against: Path, backbone: str | None) -> Check:
    """That the folder is an export of this run as it is now: its hash, its texts' tokens, its rewards."""
    here = identity(model_folder(against))
    faults = (
        [] if note["run"] == here else [f"exported from another model (SHA-256 {note['run'][:12]}…) than {against}"]
    )
    scorer = load(against, device="cpu", backbone=backbone)
    stored = golden_of(scorer)
    if len(stored) != len(golden):
        faults.append(f"has {len(golden)} golden rewards, {against} has {len(stored)}")
    for i, (one, theirs) in enumerate(zip(golden, stored, strict=False)):
        wanted = theirs.experts.get(note["expert"], theirs.reward)
        if one.ids != theirs.ids:
            faults.append(f"golden text {i} has other tokens than in {against}: another tokenizer or chat template")
        if one.reward != wanted:
            faults.append(f"golden text {i} is told to get {one.reward:.9g}; in {against} it got {wanted:.9g}")
    return Check("run", f"is an export of {against}: hash, tokens, golden rewards", faults=tuple(faults))
