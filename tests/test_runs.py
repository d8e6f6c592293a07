"""A trained model's folder: read back exactly, and refused by name when anything in it is not as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward.checkpoint import write_manifest
from moreward.errors import BackboneError, MorewardError, RunError
from moreward.nn.backbone import Backbone
from moreward.registry import find_recipe
from moreward.runs import identity, model_folder, read_model
from moreward.scoring import load
from moreward.types import Preference
from tiny import make_backbone
from trained import card, digests, edit_card, trained, weights

Tiny = Callable[[str], Path]
Make = Callable[..., Path]
PROBE = [("Tell me about the sea.", "It is calm."), ("In the long style, tell me.", "It is bright, and so on.")]


@pytest.fixture(scope="module")
def spare(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run to be damaged and mended."""
    return Path(shutil.copytree(make(), tmp_path_factory.mktemp("spare") / "run"))


# ---------------------------------------------------------------- damage


@settings(max_examples=40)
@given(data=st.data())
def test_one_changed_byte_anywhere_is_refused_and_the_file_named(data: st.DataObject, spare: Path) -> None:
    folder = spare / "model"
    name = data.draw(st.sampled_from(sorted(set(digests(folder)) - {"manifest.json", "calibration/manifest.json"})))
    raw = (folder / name).read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    bit = data.draw(st.integers(0, 7))
    (folder / name).write_bytes(raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :])
    try:
        with pytest.raises(RunError, match=rf"model: not as it was written: {name}: content changed"):
            load(spare)
    finally:
        (folder / name).write_bytes(raw)


def test_the_model_folder_holds_what_its_docs_say(make: Make) -> None:
    names = set(digests(make() / "model"))
    assert {"moreward.json", "model.safetensors", "manifest.json", "backbone/config.json"} <= names
    for expert in ("long", "short"):
        assert {f"experts/{expert}/adapter_config.json", f"experts/{expert}/adapter_model.safetensors"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    assert not [n for n in digests(make("rodos") / "model") if n.startswith("experts")]


@pytest.mark.parametrize("how", ["shorter", "gone", "emptied"])
@pytest.mark.parametrize("name", ["moreward.json", "model.safetensors", "backbone/tokenizer.json"])
def test_a_file_that_is_cut_or_gone_is_named(how: str, name: str, spare: Path) -> None:
    file = spare / "model" / name
    raw = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(raw[:-1] if how == "shorter" else b"")
    try:
        with pytest.raises(RunError, match=name):
            load(spare)
    finally:
        file.write_bytes(raw)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": {}}'])
def test_a_damaged_manifest_is_refused(content: bytes, spare: Path) -> None:
    file = spare / "model" / "manifest.json"
    raw = file.read_bytes()
    file.write_bytes(content)
    try:
        with pytest.raises(RunError, match=r"manifest\.json"):
            load(spare)
    finally:
        file.write_bytes(raw)


def test_a_pickle_put_into_the_folder_is_refused(spare: Path) -> None:
    file = spare / "model" / "training_args.bin"
    file.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    try:
        with pytest.raises(RunError, match=r"training_args\.bin: refused, files of this kind can run code"):
            load(spare)
    finally:
        file.unlink()


def test_a_card_of_another_schema_is_refused(make: Make, tmp_path: Path) -> None:
    run = Path(shutil.copytree(make(), tmp_path / "run"))
    edit_card(run, lambda told: {**told, "schema": 99})
    with pytest.raises(RunError, match=r"moreward\.json: schema 99 is not 1"):
        load(run)


def test_tensors_that_do_not_fit_are_refused_by_name(make: Make, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    run = Path(shutil.copytree(make(), tmp_path / "run"))
    tensors = weights(run)
    gate = "routed.router.router.gate.weight"
    del tensors["routed.router.router.gate.bias"]
    save_file({**tensors, gate: torch.zeros(3, 32), "more": torch.zeros(1)}, run / "model" / "model.safetensors")
    write_manifest(run / "model", kind="moreward-model")
    with pytest.raises(RunError) as caught:
        load(run)
    for fault in (
        "gate.bias' is missing",
        "'more' is not of this system",
        "has shape (3, 32), not (2, 32)",
        "3 faults",
    ):
        assert fault in str(caught.value)


# ---------------------------------------------------------------- missing


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"runs/nowhere: there is no such run folder$"):
        load(tmp_path / "runs" / "nowhere")


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a trained run \(no model/moreward\.json\)\.$"):
        load(tmp_path)


def test_a_run_that_has_not_finished_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match=r"not a trained run .* has not finished: start it again to go on\."):
        load(tmp_path)


def test_a_run_and_its_model_folder_both_name_the_model(make: Make) -> None:
    assert model_folder(make()) == model_folder(make() / "model") == make() / "model"
    assert load(make()).identity == load(make() / "model").identity == identity(make() / "model")
    assert load(make()).identity != load(make("rodos")).identity


# ---------------------------------------------------------------- the backbone


def test_another_backbone_at_the_same_place_is_refused(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_backbone("bert"), backbone)
    run = trained(tmp_path, lambda kind: backbone, pairs, "arliss", "own backbone")
    shutil.rmtree(backbone)
    make_backbone(backbone, "bert", seed=1)
    with pytest.raises(
        RunError, match=r"trained on backbone '.*' \(SHA-256 .*…\), but .* is another one .* --backbone DIR"
    ):
        load(run)
    shutil.rmtree(backbone)
    with pytest.raises(RunError, match=r"but '.*backbone' cannot be found as a directory\. .* --backbone DIR"):
        load(run)
    moved = load(run, backbone=str(tiny_backbone("bert")))
    assert moved.check_golden() == 0.0
    with pytest.raises(RunError, match="is another one"):
        load(run, backbone=str(tiny_backbone("roberta")))


def test_a_model_trained_in_full_needs_no_backbone(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_backbone("bert"), backbone)
    run = trained(tmp_path, lambda kind: backbone, pairs, "rodos", "own backbone")
    before = [r.reward for r in load(run).score(PROBE)]
    shutil.rmtree(backbone)
    assert [r.reward for r in load(run).score(PROBE)] == before


def test_a_backbone_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="cannot be loaded as an encoder or decoder"):
        Backbone.load(str(tmp_path))
    assert issubclass(BackboneError, MorewardError)


# ---------------------------------------------------------------- exactly


@pytest.mark.parametrize(
    "what", [("arliss",), ("rodos",), ("baseline",), ("base_lora",), ("arliss", "bert", "tune=frozen")]
)
def test_a_run_read_twice_gives_the_same_bits_whatever_the_generator_does(what: tuple[Any, ...], make: Make) -> None:
    torch.manual_seed(1)
    one = [r.reward for r in load(make(*what)).score(PROBE)]
    state = torch.manual_seed(2).get_state()
    assert [r.reward for r in load(make(*what)).score(PROBE)] == one
    assert torch.equal(torch.get_rng_state(), state), "loading draws nothing from the caller's generator"


@pytest.mark.parametrize("recipe", ["arliss", "rodos"])
def test_every_tensor_that_the_backbone_does_not_hold_is_in_the_file(recipe: str, make: Make) -> None:
    run = make(recipe)
    system, _, told = read_model(run)
    backbone = Backbone.load(told["backbone"]["name"])
    fresh = find_recipe(recipe)(system.config, backbone, told["domains"])
    pretrained = dict(fresh.named_parameters())
    stored = weights(run)
    for name, value in system.named_parameters():
        assert name in stored or torch.equal(value, pretrained[name]), name
    if recipe == "arliss":
        assert not any("word_embeddings" in name for name in stored), "the backbone is named, not copied"


def test_the_card_holds_the_whole_configuration(make: Make) -> None:
    told = card(make())["config"]
    assert told["train"]["epochs"] == 1
    assert told["system"]["rank"] == 12
    assert told["recipe"] == "arliss"
