"""A trained model's directory: written whole, read back exactly, refused when anything in it changed.

run/
  config.yaml          the resolved configuration
  metrics.jsonl        one line per record
  quarantine.jsonl     rows that were not used, and why
  checkpoints/         while training
  model/
    moreward.json      recipe, domains, settings, deviations, data and training reports, golden rewards
    model.safetensors  every tensor that the pretrained backbone does not hold
    backbone/          config.json and tokenizer of the backbone
    strangers/NAME/    the tokenizer of an imported expert
    experts/NAME/      a PEFT adapter directory per expert, where experts are adapters
    manifest.json      size and SHA-256 of every file
    replay.safetensors what the gate reads of some prompts of each domain, where there is a router
    calibration/       temperatures and where prompts lie, sealed by itself: it may be fitted again later
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moreward.calibration import Calibration, calibration_faults, write_calibration
from moreward.checkpoint import fsync_path, sha256_file, space_errors, verify_folder, write_json, write_manifest
from moreward.config import resolve
from moreward.data.batches import Encoder, tokenizer_sha256
from moreward.errors import RunError
from moreward.nn.backbone import Backbone, directory_sha256, load_tokenizer
from moreward.nn.peft_format import write_adapter
from moreward.nn.replay import Replay
from moreward.registry import find_recipe
from moreward.systems._base import System

CARD = "moreward.json"
SCHEMA = 1
REPLAY = "replay.safetensors"
REPLAYED = ("hidden_PD", "domain_P", "held_out_P")


def model_folder(run: str | Path) -> Path:
    """The directory of the trained model, given a run or that directory itself. Raises RunError."""
    run = Path(run)
    for folder in (run / "model", run):
        if (folder / CARD).is_file():
            return folder
    if not run.exists():
        raise RunError(f"{run}: there is no such run folder")
    hint = " Its training has not finished: start it again to go on." if (run / "checkpoints").exists() else ""
    raise RunError(f"{run}: not a trained run (no model/{CARD}).{hint}")


def read_card(folder: Path) -> dict[str, Any]:
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    if card.get("schema") != SCHEMA:
        raise RunError(f"{folder / CARD}: schema {card.get('schema')!r} is not {SCHEMA}; written by another version?")
    return dict(card)


def changes_of(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How the model came to be from the first one of its line, the oldest change first: `kind`, `domain`, `data`,
    `shape` of each. Runs of earlier versions could only be extended, and say so under `additions`."""
    added = [{"kind": "extend", "shape": None, **addition} for addition in card.get("additions", [])]
    return [*added, *card.get("changes", [])]


def write_model(
    run: Path,
    system: System,
    encoder: Encoder,
    card: dict[str, Any],
    calibration: Calibration | None = None,
    replay: Replay | None = None,
) -> Path:
    """Write `run/model` in one step: beside it first, then by rename."""
    temporary = run / f".model-{os.getpid()}"
    for left in run.glob(".model-*"):  # of writes that were cut short
        shutil.rmtree(left)
    target = run / "model"
    try:
        with space_errors(run):
            _write_files(temporary, system, encoder, card, replay)
            if calibration is not None:
                write_calibration(temporary, calibration, model=identity(temporary))
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            fsync_path(run)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_files(
    temporary: Path, system: System, encoder: Encoder, card: dict[str, Any], replay: Replay | None
) -> None:
    from safetensors.torch import save_file

    (temporary / "backbone").mkdir(parents=True)
    backbone = system.backbones()[0]
    encoder.save(temporary)
    backbone.config.save_pretrained(temporary / "backbone")
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in system.saved_tensors().items()}
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    origin = {"base_sha256": card["backbone"]["sha256"], "tokenizer_sha256": tokenizer_sha256(encoder.tokenizer)}
    for name, (head, standardize) in system.adapter_experts().items():
        # Each expert is usable alone by plain PEFT; the router's adapter, which has no reward, stays in the model file.
        folder = temporary / "experts" / name
        base = _seen_from(folder, card["backbone"]["name"])
        write_adapter(folder, backbone, name, head, standardize, base, origin)
    if replay is not None:
        tensors = {name: getattr(replay, name).contiguous() for name in REPLAYED}
        # One entry: safetensors writes several in an order of chance, and the same run has the same bytes.
        save_file(tensors, temporary / REPLAY, metadata={"domains": json.dumps(replay.domains)})
    write_json(temporary / CARD, {"schema": SCHEMA, **card})
    write_manifest(temporary, kind="moreward-model")


def _seen_from(folder: Path, backbone: str) -> str:
    """The backbone's name as an adapter directory states it: a hub name, or a path relative to that directory."""
    if not Path(backbone).is_dir():
        return backbone
    final = folder.parents[1].with_name("model") / "experts" / folder.name
    return os.path.relpath(Path(backbone).resolve(), final.resolve())


def read_model(run: str | Path, *, backbone: str | None = None) -> tuple[System, Encoder, dict[str, Any]]:
    """Rebuild a trained system. `backbone` names where the pretrained weights are now, if they moved.

    Raises RunError naming every file that changed, a backbone that is not the one trained on, and tensors that do
    not fit.
    """
    folder = model_folder(run)
    if faults := [*verify_folder(folder), *calibration_faults(folder)]:
        raise RunError(f"{folder}: not as it was written: {'; '.join(faults)}")
    card = read_card(folder)
    config = resolve(card["config"])
    recipe = find_recipe(config.recipe)
    settings = recipe.Config.model_validate(config.system)
    tokenizer = load_tokenizer(str(folder / "backbone"))
    encoder = recipe.reads_with(
        settings, Encoder(tokenizer, config.data.max_length, config.data.input_template), folder
    )
    with torch.random.fork_rng(devices=[]):
        system = recipe(settings, load_backbone(folder, card, backbone), card["domains"])
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise RunError(f"{folder}/model.safetensors: cannot be read: {error}") from error
    if faults := system.load_tensors(tensors):
        raise RunError(f"{folder}/model.safetensors: {'; '.join(faults[:5])} ({len(faults)} faults)")
    return system.eval(), encoder, card


def read_replay(run: str | Path) -> Replay | None:
    """What the run keeps of its router's prompts; None where it keeps nothing."""
    from safetensors import safe_open

    path = model_folder(run) / REPLAY
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in REPLAYED}
        return Replay(**tensors, domains=tuple(json.loads(file.metadata()["domains"])))


def load_backbone(folder: Path, card: dict[str, Any], elsewhere: str | None) -> Backbone:
    """The backbone that a model directory was trained on, before training; under `tune=full` only its shape. RunError
    where it is another one now."""
    from transformers import AutoConfig

    told = card["backbone"]
    if card["config"]["tune"] == "full":  # every weight is in the model file
        shape = AutoConfig.from_pretrained(folder / "backbone", trust_remote_code=False)
        return Backbone.from_config(shape, pooling=told["pooling"], device="cpu")
    name = elsewhere or told["name"]
    found = directory_sha256(name)
    if found != told["sha256"]:
        state = f"is another one (SHA-256 {found[:12]}…)" if found else "cannot be found as a directory"
        raise RunError(
            f"{folder}: trained on backbone {told['name']!r} (SHA-256 {told['sha256'][:12] or 'of a hub'}…), "
            f"but {name!r} {state}. Say where it is with --backbone DIR."
        )
    return Backbone.load(name, pooling=told["pooling"])


def identity(folder: Path) -> str:
    """One hash of a trained model: its manifest names the hash of every file."""
    return sha256_file(folder / "manifest.json")
