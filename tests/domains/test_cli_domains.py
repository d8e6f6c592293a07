"""`moreward data domains`, from files to what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moreward.cli import app
from moreward.errors import DataError
from moreward.types import Preference

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def data(pairs: Sequence[Preference], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefs")
    for domain in ("short", "long"):
        rows = [
            {"prompt": f"{p.prompt} {n}", "chosen": p.chosen, "rejected": p.rejected}
            for n in range(4)
            for p in pairs
            if p.domain == domain
        ]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def typed(*words: object) -> object:
    return CliRunner().invoke(app, ["data", "domains", *map(str, words)], catch_exceptions=False)


def test_opposite_domains_conflict_and_their_own_probes_win(data: Path, tiny_backbone: Tiny) -> None:
    said = typed("--data", data, "--backbone", tiny_backbone("bert"), "--null", 1, "--json")
    assert said.exit_code == 0
    told = json.loads(said.stdout)
    for one in told["advice"]:
        assert one["own"]["value"] == 1.0
        assert one["over_pooled"]["interval"]["low"] > 0
        assert one["word"] == ("split" if one["p_split"] < 0.05 else "cannot tell")
    assert [c["word"] for c in told["conflicts"]] == ["conflict"]
    assert told["error_rates"]["rates"]["halves"]["num_draws"] == 1
    assert told["rule"]["margin"] == 0.02


def test_the_tables_fit_the_terminal(data: Path, tiny_backbone: Tiny) -> None:
    said = typed("--data", data, "--backbone", tiny_backbone("bert"), "--max-pairs", 30)
    assert "long: " in said.stdout
    assert "left out by --max-pairs: long 50, short 50" in said.stderr
    assert max(map(len, said.stdout.splitlines())) <= 100


def test_one_domain_is_refused_before_anything_is_loaded(data: Path) -> None:
    with pytest.raises(DataError, match="All pairs are of domain long"):
        typed("--data", data / "long.jsonl", "--backbone", "nowhere")
