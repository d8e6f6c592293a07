"""Model cards of exports: the evaluation with its intervals, or that there was none."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moreward.checkpoint import verify_folder
from moreward.cli import app
from moreward.errors import ConfigError
from moreward.types import Preference
from trained import trained, write_pairs


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]
) -> Path:
    return trained(tmp_path_factory.mktemp("card"), tiny_backbone, pairs, "arliss", "bert", "pooling=own")


@pytest.mark.parametrize("form", ["merged", "peft", "hf"])
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
    folder = tmp_path / "out" if form == "hf" else tmp_path / "out" / "short"
    card = (folder / "README.md").read_text(encoding="utf-8")
    macro = json.loads(printed.stdout)["evaluation"]["macro"]
    low, high = (f"{100 * macro['interval'][end]:.1f}" for end in ("low", "high"))
    assert f"| {100 * macro['accuracy']:.1f} | {low} to {high} |" in card
    assert ("not of this expert alone" in card) is (form != "hf")
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
