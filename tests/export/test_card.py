"""Model cards of exports: the evaluation with its intervals, or that there was none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moreward.checkpoint import verify_folder
from moreward.cli import app
from moreward.errors import ConfigError
from moreward.runs import identity
from moreward.types import Preference
from trained import trained, write_pairs


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]
) -> Path:
    return trained(tmp_path_factory.mktemp("card"), tiny_backbone, pairs, "arliss", "bert", "pooling=own")


@pytest.mark.parametrize("form", ["merged", "peft", "hf", "onnx"])
def test_the_card_has_the_evaluation_that_was_printed(
    form: str, run: Path, tmp_path: Path, pairs: Sequence[Preference]
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    printed = CliRunner().invoke(app, ["eval", str(run), "--data", str(data), "--json"])
    assert printed.exit_code == 0, printed.output
    (tmp_path / "eval.json").write_text(printed.stdout, encoding="utf-8")
    words = ["export", str(run), "--to", form, "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(app, [*words, "--evaluation", str(tmp_path / "eval.json")])
    assert told.exit_code == 0, told.output
    folder = tmp_path / "out" if form in ("hf", "onnx") else tmp_path / "out" / "short"
    card = (folder / "README.md").read_text(encoding="utf-8")
    macro = json.loads(printed.stdout)["evaluation"]["macro"]
    low, high = (f"{100 * macro['interval'][end]:.1f}" for end in ("low", "high"))
    assert f"| {100 * macro['accuracy']:.1f} | {low} to {high} |" in card
    assert ("not of this expert alone" in card) is (form in ("merged", "peft"))
    assert verify_folder(folder) == []


def test_without_an_evaluation_the_card_says_so(run: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["export", str(run), "--out", str(tmp_path / "out")]).exit_code == 0
    assert "is not known here" in (tmp_path / "out" / "short" / "README.md").read_text(encoding="utf-8")


def test_a_file_that_is_no_evaluation_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text('{"evaluation": {}}', encoding="utf-8")
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--evaluation", str(tmp_path / "eval.json")]
    told = CliRunner().invoke(app, words)
    assert isinstance(told.exception, ConfigError)
    assert "moreward eval" in str(told.exception)
    assert not (tmp_path / "out").exists()


def test_the_evaluation_of_another_run_is_refused(
    run: Path, make: Callable[..., Path], tmp_path: Path, pairs: Sequence[Preference]
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    other = make("baseline", "bert", "pooling=own")
    printed = CliRunner().invoke(app, ["eval", str(other), "--data", str(data), "--json"])
    (tmp_path / "eval.json").write_text(printed.stdout, encoding="utf-8")
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--evaluation", str(tmp_path / "eval.json")]
    told = CliRunner().invoke(app, words)
    assert isinstance(told.exception, ConfigError)
    assert f"is of another model ({other}, {identity(other / 'model')[:12]}" in str(told.exception)
    assert not (tmp_path / "out").exists()


def test_the_evaluation_of_a_run_that_was_moved_is_still_its_own(
    run: Path, tmp_path: Path, pairs: Sequence[Preference]
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    moved = shutil.copytree(run, tmp_path / "moved")
    printed = CliRunner().invoke(app, ["eval", str(moved), "--data", str(data), "--json"])
    (tmp_path / "eval.json").write_text(printed.stdout, encoding="utf-8")
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--evaluation", str(tmp_path / "eval.json")]
    assert CliRunner().invoke(app, words).exit_code == 0


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_a_decoders_card_says_what_to_add_and_that_the_router_stays(
    form: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    run = make("arliss", "llama", "data.max_length=120")
    done = CliRunner().invoke(app, ["export", str(run), "--to", form, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "short"
    card = (folder / "README.md").read_text(encoding="utf-8")
    offset = json.loads((folder / "moreward.json").read_text(encoding="utf-8"))["offset"]
    assert offset != 0
    assert f"The reward is the one logit plus {offset:.9g}" in card
    assert "The one logit is the reward" not in card
    assert "The router is not in this directory" in card


@pytest.mark.parametrize("form", ["merged", "hf"])
def test_the_lines_of_a_card_load_the_directory(form: str, run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(run), "--to", form, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" if form == "hf" else tmp_path / "out" / "short"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("The router is not in this directory" in card) is (form == "merged")
    told = json.loads((folder / "moreward.json").read_text(encoding="utf-8"))
    here: dict[str, Any] = {"folder": str(folder)}
    exec(card.split("```python")[1].split("```")[0], here)
    golden = told["golden"][0]
    inputs = here["tokenizer"](golden["prompt"], golden["response"], return_tensors="pt")
    with torch.no_grad():
        logit = float(here["model"](**inputs).logits[0, 0])
    assert abs(logit - golden["reward"]) <= 10 * told["tolerance"]
