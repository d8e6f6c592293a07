"""What is as it was written is said to be; everything that is not is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moreward.checkpoint import write_manifest
from moreward.cli import app
from moreward.errors import ConfigError, RunError, ServerError
from moreward.export.adapters import export_peft
from moreward.export.merged import export_merged
from moreward.export.mixture import export_hf
from moreward.export.parts import NOTE
from moreward.scoring import load
from moreward.verify.checks import Verified, compared
from moreward.verify.exported import exported_folders, verify_exported
from moreward.verify.live import ROUTES, verify_live
from moreward.verify.run import verify_run
from serving import Live, serving
from trained import edit_card

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    return make("arliss", "bert", "pooling=own")


@pytest.fixture(scope="module")
def other(make: Make) -> Path:
    return make("arliss", "bert", "pooling=own", "seed=5")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_merged(load(run, device="cpu"), out)
    return out


@pytest.fixture(scope="module")
def live(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(run, tmp_path_factory.mktemp("live") / "log") as live:
        yield live


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def broken(found: Verified) -> list[str]:
    return [check.name for check in found.checks if not check.holds]


# ---------------------------------------------------------------- runs


def test_a_run_is_what_it_was(run: Path) -> None:
    found = verify_run(run, against=run)
    assert found.holds, found.faults
    told = {check.name: check for check in found.checks}
    assert list(told) == ["files", "model", "golden", "rewards", "experts", "company", "free batches"]
    assert told["company"].difference == 0.0
    assert told["company"].allowed == 0.0
    assert told["experts"].difference is not None
    assert {"model.safetensors", "backbone/tokenizer.json"} <= found.hashes.keys()


def test_every_file_that_changed_is_named(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path)
    for name in ("model/model.safetensors", "model/backbone/tokenizer_config.json"):
        raw = bytearray((copy / name).read_bytes())
        raw[-2] ^= 0x01
        (copy / name).write_bytes(bytes(raw))
    found = verify_run(copy)
    assert broken(found) == ["files"]
    assert len(found.faults) == 2
    assert "model.safetensors" in "".join(found.faults)
    assert "tokenizer_config.json" in "".join(found.faults)


def test_rewards_that_a_sealed_run_does_not_give_are_named(run: Path, tmp_path: Path) -> None:
    """Sealed again, so that no hash gives it away."""
    copy = copied(run, tmp_path)
    card = json.loads((copy / "model" / "moreward.json").read_text())
    card["golden"][1]["reward"] += 1.0
    name = next(iter(card["golden"][2]["experts"]))
    card["golden"][2]["experts"][name] -= 1.0
    (copy / "model" / "moreward.json").write_text(json.dumps(card))
    write_manifest(copy / "model", kind="moreward-model")
    found = verify_run(copy, against=run)
    assert broken(found) == ["model", "rewards", "experts"]
    assert "golden text 1 gets" in found.faults[1]
    assert f"golden text 2, expert {name} gets" in found.faults[2]
    assert len(found.faults) == 3


def test_other_weights_and_other_tokens_give_other_rewards(run: Path, tmp_path: Path) -> None:
    weights = copied(run, tmp_path / "weights")
    file = weights / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v + 0.1 if v.dim() > 1 else v for k, v in tensors.items()}, file, metadata={"format": "pt"})
    tokens = copied(run, tmp_path / "tokens")
    tokenizer = tokens / "model" / "backbone" / "tokenizer.json"
    told = json.loads(tokenizer.read_text())
    vocabulary = told["model"]["vocab"]
    words = [word for word in vocabulary if word.isalpha()]
    for one, two in zip(words[::2], words[1::2], strict=False):
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    tokenizer.write_text(json.dumps(told))
    for copy in (weights, tokens):
        write_manifest(copy / "model", kind="moreward-model")
        found = verify_run(copy)
        assert "rewards" in broken(found), found
        assert "company" not in broken(found)


def test_a_run_without_golden_rewards_cannot_be_verified(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path)
    edit_card(copy, lambda card: {**card, "golden": []})
    assert "no golden rewards are stored" in verify_run(copy).faults[0]
    with pytest.raises(RunError, match="no such run folder"):
        verify_run(tmp_path / "absent")


def test_a_run_that_cannot_be_loaded_says_why(run: Path, tmp_path: Path) -> None:
    found = verify_run(run, backbone=str(tmp_path / "nowhere"))
    assert broken(found) == ["rewards"]
    assert "nowhere" in found.faults[0]


def test_no_number_is_no_agreement() -> None:
    assert not compared("rewards", "", [float("nan")], [0.0], 1.0).holds
    assert compared("rewards", "", [0.5], [0.0], 0.5).holds


# ---------------------------------------------------------------- exports


def test_an_export_is_what_it_was_and_of_its_run(run: Path, other: Path, exported: Path) -> None:
    folders = exported_folders(exported)
    assert [folder.name for folder in folders] == ["long", "short"]
    for folder in folders:
        found = verify_exported(folder, against=run)
        assert found.holds, found.faults
        assert found.kind == "moreward-merged"
    faults = verify_exported(folders[0], against=other).faults
    assert "exported from another model" in faults[0]
    assert any("golden text" in fault for fault in faults)


def test_adapters_and_whole_mixtures_are_verified_by_their_own_library(run: Path, tmp_path: Path) -> None:
    scorer = load(run, device="cpu")
    export_peft(scorer, tmp_path / "peft")
    export_hf(scorer, tmp_path / "hf")
    folders = [*exported_folders(tmp_path / "peft"), *exported_folders(tmp_path / "hf")]
    assert [folder.name for folder in folders] == ["long", "short", "hf"]
    for folder in folders:
        found = verify_exported(folder, against=run)
        assert found.holds, found.faults
    assert "cannot be found" in verify_exported(folders[0], backbone=str(tmp_path / "nowhere")).faults[0]


def test_a_changed_export_is_told(exported: Path, run: Path, tmp_path: Path) -> None:
    copy = copied(exported / "long", tmp_path)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert broken(verify_exported(copy)) == ["files"]
    tensors = load_file(copy / "model.safetensors")
    name = next(k for k in tensors if k.endswith("classifier.bias"))
    save_file({**tensors, name: tensors[name] + 0.5}, copy / "model.safetensors", metadata={"format": "pt"})
    write_manifest(copy, kind="moreward-merged")
    found = verify_exported(copy, against=run)
    assert broken(found) == ["rewards"]
    assert all(f"golden text {i} gets" in fault for i, fault in enumerate(found.faults))


def test_an_export_that_does_not_say_what_to_compare_with_is_refused(exported: Path, tmp_path: Path) -> None:
    copy = copied(exported / "long", tmp_path)
    told = json.loads((copy / NOTE).read_text())
    del told["tolerance"]
    (copy / NOTE).write_text(json.dumps(told))
    write_manifest(copy, kind="moreward-merged")
    with pytest.raises(RunError, match="export the run again"):
        verify_exported(copy)


# ---------------------------------------------------------------- servers


@pytest.mark.parametrize("route", ROUTES)
def test_a_server_agrees_on_every_route(route: str, live: Live, run: Path) -> None:
    found = verify_live(live.url, against=run, route=route)
    assert found.holds, found.faults
    judges = {"native": 3, "predict": 1, "classify": 2}[route]
    assert [check.name for check in found.checks].count("rewards") == judges


def test_a_server_of_another_model_is_told(live: Live, other: Path, run: Path) -> None:
    found = verify_live(live.url, against=other)
    assert "serves another model" in found.faults[0]
    assert "rewards" in broken(found)
    assert "company" not in broken(found)
    assert "rewards" in broken(verify_live(live.url, against=other, route="classify"))


def test_what_cannot_be_asked_is_refused(live: Live, run: Path, exported: Path) -> None:
    with pytest.raises(ConfigError, match="--against RUN"):
        verify_live(live.url, against=None)
    with pytest.raises(ConfigError, match="native, predict, classify"):
        verify_live(live.url, against=run, route="carrier pigeon")
    with pytest.raises(ConfigError, match="holds several models"):
        verify_live(live.url, against=exported)
    with pytest.raises(ServerError, match=r"no answer|cannot be reached"):
        verify_live("http://127.0.0.1:9", against=run)


# ---------------------------------------------------------------- the command


def test_the_command_says_it_and_ends_with_a_code(run: Path, exported: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(run)])
    assert done.exit_code == 0, done.output
    assert "It is what was written." in done.output
    copy = copied(run, tmp_path)
    (copy / "model" / "model.safetensors").write_bytes(b"")
    done = CliRunner().invoke(app, ["verify", str(copy)])
    assert done.exit_code == 1
    assert "model.safetensors: has 0 bytes" in done.output
    done = CliRunner().invoke(app, ["verify", str(exported), "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert [one["holds"] for one in told] == [True, True]
    assert torch.isfinite(torch.tensor([one["checks"][-1]["difference"] for one in told])).all()
