"""Small trained runs: the product's own training on tiny backbones, each kind of run made once a session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moreward.checkpoint import write_manifest
from moreward.config import merge, parse_assignments
from moreward.types import Preference

SPEED = (
    "train.epochs=1",
    "train.eval_every=1",
    "train.batch_size=8",
    "train.learning_rate=0.02",  # so that rewards differ by more than rounding
    "data.val_fraction=0.25",
    "data.max_length=96",
)
FIELDS = ("prompt", "chosen", "rejected", "domain", "capability", "id", "margin", "tools", "chat_template_kwargs")

_made: dict[tuple[str, ...], Path] = {}


def write_pairs(path: Path, pairs: Iterable[Preference]) -> Path:
    """A file of pairs as people have them: one JSON object a line, only the columns that hold something."""
    rows = [{k: v for k in FIELDS if (v := getattr(p, k)) not in (None, "", {})} for p in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def given(recipe: str, backbone: Path, data: Path | None, out: Path, *words: str) -> dict[str, Any]:
    """A configuration that trains in about a second; `words` are `key=value` as on the command line."""
    base = {"recipe": recipe, "backbone": str(backbone), "out": str(out)}
    if data is not None:
        base |= {"data": {"train": str(data)}}
    return merge(merge(base, parse_assignments(SPEED)), parse_assignments(words))


def trained(
    folder: Path,
    tiny_backbone: Callable[[str], Path],
    pairs: Sequence[Preference],
    recipe: str = "arliss",
    kind: str = "bert",
    *words: str,
) -> Path:
    """A finished run, made in `folder` at the first call and shared after that: do not write into it."""
    from moreward.train.runner import train

    key = (recipe, kind, *words)
    if key not in _made:
        data = write_pairs(folder / "pairs.jsonl", pairs)
        _made[key] = train(given(recipe, tiny_backbone(kind), data, folder / "run", *words))
    return _made[key]


def weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def card(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "model" / "moreward.json").read_text(encoding="utf-8")))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def edit_card(run: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Change a model's card as someone would who seals the folder again."""
    file = run / "model" / "moreward.json"
    file.write_text(json.dumps(change(card(run))), encoding="utf-8")
    write_manifest(run / "model", kind="moreward-model")
