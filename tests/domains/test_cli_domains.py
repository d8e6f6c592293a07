"""`moreward data domains`, from files to what is printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moreward.cli import app
from moreward.data.load import load_preferences
from moreward.errors import ConfigError, DataError
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


def test_what_is_discovered_is_shown_and_written_as_rows(data: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "named.jsonl"
    words = ["--data", data, "--backbone", tiny_backbone("bert"), "--discover", 2, "--max-pairs", 40, "--write", out]
    said = typed(*words)
    assert "With the data's own labels, which were hidden:" in " ".join(said.stdout.split())
    assert "cluster-0, to look at:" in said.stdout
    named = load_preferences(out).preferences
    assert len(named) == 80
    assert {p.domain for p in named} == {"cluster-0", "cluster-1"}
    with pytest.raises(ConfigError, match="is there already"):
        typed(*words)


def test_all_faults_of_the_options_are_told_at_once(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        typed("--data", data, "--write", tmp_path / "x.jsonl", "--by", "mood")
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["--by", "--write"]


def test_the_page_stands_alone_and_texts_in_it_are_no_markup(data: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    nasty = data / "nasty.jsonl"
    rows = [
        {"prompt": f"<script>{n}</script>", "chosen": f"yes {n}", "rejected": "no", "domain": "<b>x"} for n in range(12)
    ]
    nasty.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--data", data / "short.jsonl", "--data", nasty, "--backbone", tiny_backbone("bert"), "--max-pairs", 30]
    typed(*words, "--out", tmp_path / "named")
    typed(*words, "--out", tmp_path / "found", "--discover", 2)
    nasty.unlink()
    for folder in ("named", "found"):
        page = (tmp_path / folder / "domains.html").read_text(encoding="utf-8")
        assert "<script" not in page
        assert "<b>x" not in page
        assert not re.findall(r'(?:src|href)="http', page)
        assert "prefers-color-scheme: dark" in page
        assert json.loads((tmp_path / folder / "domains.json").read_text())
    assert (tmp_path / "named" / "domains.html").read_text(encoding="utf-8").count("<svg") == 3
