"""Exported folders, recomputed by the library that they are for.

A form is a function that opens a folder, whose base is told where it needs one, and gives rewards of golden texts: the
kind in its manifest chooses it from `FORMS`. N texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moreward.checkpoint import sha256_file
from moreward.errors import MorewardError, RunError
from moreward.export.adapters import opened_adapter
from moreward.export.merged import opened
from moreward.export.mixture import opened_mixture
from moreward.export.onnx_graph import opened_graph
from moreward.export.parts import NOTE
from moreward.items import as_text
from moreward.nn.backbone import directory_sha256
from moreward.runs import identity, model_folder
from moreward.scoring import load
from moreward.verify.checks import Check, Golden, Verified, compared, files_check
from moreward.verify.run import golden_of

Rewards = Callable[[list[Golden]], Tensor]


def _merged(folder: Path, base: str) -> Rewards:
    rewards = opened(folder)
    return lambda golden: rewards([list(one.ids) for one in golden])


def _adapter(folder: Path, base: str) -> Rewards:
    rewards = opened_adapter(folder, base)
    return lambda golden: rewards([list(one.ids) for one in golden])


def _mixture(folder: Path, base: str) -> Rewards:
    rewards = opened_mixture(folder)
    return lambda golden: rewards([list(one.ids) for one in golden], [list(one.prompt_ids) for one in golden])


def _graph(folder: Path, base: str) -> Rewards:
    rewards = opened_graph(folder)
    return lambda golden: rewards([list(one.ids) for one in golden], [list(one.prompt_ids) for one in golden])


FORMS: Mapping[str, Callable[[Path, str], Rewards]] = {
    "moreward-merged": _merged,
    "moreward-peft": _adapter,
    "moreward-hf": _mixture,
    "moreward-onnx": _graph,
}
LIBRARY = {"moreward-peft": "peft", "moreward-onnx": "onnxruntime"}
DECIDE = (
    "model.safetensors",
    "adapter_model.safetensors",
    "model.onnx",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


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
    golden, allowed = golden_of_note(note), float(note["tolerance"])
    if against is not None:
        checks.append(_from_run(note, golden, against, backbone))
    wanted = [one.reward for one in golden]
    try:
        rewards = FORMS[kind](folder, _base(folder, note, backbone))
    except MorewardError as error:
        checks.append(Check("rewards", "not computed: it cannot be loaded", faults=(str(error),)))
        return Verified(str(folder), kind, tuple(checks), hashes)

    def computed(texts: list[Golden]) -> list[float]:
        return [float(value) + note["offset"] for value in rewards(texts)]

    together, alone = computed(golden), [computed([one])[0] for one in golden]
    checks += [
        compared(
            "rewards",
            f"{len(golden)} golden rewards recomputed by {LIBRARY.get(kind, 'transformers')}",
            together,
            wanted,
            allowed,
        ),
        compared(
            "company",
            "alone and in reverse, against together: the same but for rounding",
            [*alone, *computed(golden[::-1])[::-1]],
            together * 2,
            allowed,
            [f"golden text {i} {way}" for way in ("alone", "in reverse") for i in range(len(golden))],
        ),
    ]
    return Verified(str(folder), kind, tuple(checks), hashes)


def read_note(folder: Path) -> dict[str, Any]:
    """What an export tells of itself. RunError where an older version wrote it."""
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    if not isinstance(note, dict) or not {"golden", "tolerance", "offset", "run", "expert"} <= note.keys():
        raise RunError(f"{folder / NOTE}: does not tell what to compare with; export the run again")
    return note


def golden_of_note(note: Mapping[str, Any]) -> list[Golden]:
    return [
        Golden(
            as_text(one["prompt"]),
            as_text(one["response"]),
            one["reward"],
            {},
            tuple(one["ids"]),
            tuple(one.get("prompt_ids", ())),
        )
        for one in note["golden"]
    ]


def _base(folder: Path, note: Mapping[str, Any], backbone: str | None) -> str:
    """Where the weights under an adapter are. RunError where they are others than those that it was trained on."""
    told = note.get("base")
    if told is None:
        return ""
    name = backbone or (str(folder / told["name"]) if (folder / told["name"]).is_dir() else told["name"])
    found = directory_sha256(name)
    if told["sha256"] and found != told["sha256"]:
        state = f"SHA-256 {found[:12]}…" if found else "cannot be found as a directory"
        raise RunError(f"the base {name!r} is not the one trained on ({state}). Say where it is with --backbone DIR.")
    return name


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
