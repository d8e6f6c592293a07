"""A merged expert is a plain classifier: transformers and its pipeline get the expert's reward from the folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from moreward.checkpoint import verify_folder
from moreward.cli import app
from moreward.errors import ConfigError, RunError
from moreward.export import merged
from moreward.export.merged import export_merged
from moreward.export.parts import parts_of
from moreward.scoring import Scorer, load
from moreward.types import Preference
from trained import trained

Get = Callable[[str], Path]
CASES = [
    ("arliss", "bert", "pooling=own"),
    ("arliss", "gpt2", "data.max_length=120"),
    ("rodos", "llama", "data.max_length=120"),
    ("baseline", "deberta-v2", "pooling=own", "data.max_length=120"),
    ("base_lora", "roberta", "pooling=own", "data.max_length=120"),
    ("arliss", "modernbert", "pooling=own", "data.max_length=120"),
]


@pytest.fixture(scope="session")
def scorer_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Get, pairs: Sequence[Preference]
) -> Callable[..., Scorer]:
    def get(recipe: str, kind: str, *words: str) -> Scorer:
        return load(trained(tmp_path_factory.mktemp("export"), tiny_backbone, pairs, recipe, kind, *words))

    return get


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:2]))
def test_transformers_gives_each_experts_reward(
    case: tuple[str, ...], scorer_of: Callable[..., Scorer], tmp_path: Path, pairs: Sequence[Preference]
) -> None:
    scorer = scorer_of(*case)
    done = export_merged(scorer, tmp_path / "out")
    assert [one.expert for one in done] == list(scorer.experts or ("",))
    items = [(str(p.prompt), str(p.chosen)) for p in pairs[::7]]
    ids = [list(scorer.encoder.conversation(p).ids) for p in map(_conversation, items)]
    for one in done:
        wanted = torch.tensor([r.reward for r in scorer.score(items, expert=one.expert)])
        found = merged.plain_rewards(one.folder, ids) + one.offset
        assert wanted.std() > 1e-3
        # An expert that was hardly trained has a tiny unit, which makes as much of rounding.
        part = next(p for p in parts_of(scorer.system) if p.expert == one.expert)
        unit, zero = float(part.standardize.std), float(part.standardize.mean)
        raw_found, raw_wanted = found * unit + zero, wanted * unit + zero
        torch.testing.assert_close(raw_found, raw_wanted, rtol=1e-5, atol=1e-5 * max(1.0, abs(zero)))
        assert verify_folder(one.folder) == []


def _conversation(item: tuple[str, str]) -> object:
    from moreward.types import Conversation

    return Conversation(prompt=item[0], response=item[1])


def test_the_pipeline_reads_pairs_and_squashes_nothing(scorer_of: Callable[..., Scorer], tmp_path: Path) -> None:
    scorer = scorer_of("arliss", "bert", "pooling=own")
    one = export_merged(scorer, tmp_path / "out")[1]
    classify = pipeline("text-classification", model=str(one.folder), device="cpu")
    texts = [("How long is it?", "It is calm."), ("Say more.", "People come back to it year after year.")]
    told = classify([{"text": a, "text_pair": b} for a, b in texts])
    wanted = [r.reward for r in scorer.score(texts, expert=one.expert)]
    assert [t["score"] for t in told] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert {t["label"] for t in told} == {"REWARD"}


def test_token_types_of_other_engines_change_nothing(scorer_of: Callable[..., Scorer], tmp_path: Path) -> None:
    folder = export_merged(scorer_of("arliss", "bert", "pooling=own"), tmp_path / "out")[0].folder
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.arange(6, 16)[None]
    with torch.no_grad():
        zeros, ones = (model(ids, token_type_ids=torch.full_like(ids, kind)).logits for kind in (0, 1))
    assert torch.equal(zeros, ones)


@pytest.mark.parametrize("case", CASES[1:3], ids=lambda case: case[1])
def test_the_pad_token_is_not_the_end_token(
    case: tuple[str, ...], scorer_of: Callable[..., Scorer], tmp_path: Path
) -> None:
    folder = export_merged(scorer_of(*case), tmp_path / "out")[0].folder
    tokenizer, config = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert config["pad_token_id"] == tokenizer.pad_token_id


FRESH = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    told = [model(torch.tensor([ids])).logits.item() for ids in json.load(sys.stdin)]
assert "moreward" not in sys.modules
print(json.dumps(told))
"""


def test_a_fresh_process_without_this_package(scorer_of: Callable[..., Scorer], tmp_path: Path) -> None:
    one = export_merged(scorer_of("rodos", "llama", "data.max_length=120"), tmp_path / "out")[0]
    golden = json.loads((one.folder / "moreward.json").read_text(encoding="utf-8"))["golden"]
    told = subprocess.run(
        [sys.executable, "-c", FRESH, str(one.folder)],
        input=json.dumps([g["ids"] for g in golden]),
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = [g["reward"] - one.offset for g in golden]
    assert json.loads(told.stdout) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [(("pooling=mean",), "pooling 'mean'"), (("pooling=own", "system.head=mlp"), "one linear layer")],
)
def test_what_a_plain_class_does_not_compute_is_refused(
    words: tuple[str, ...], told: str, scorer_of: Callable[..., Scorer], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        export_merged(scorer_of("arliss", "bert", *words), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_gives_other_rewards_leaves_nothing(
    scorer_of: Callable[..., Scorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merged.folded
    monkeypatch.setattr(merged, "folded", lambda *given: (real(*given)[0] * 1.01, real(*given)[1]))
    with pytest.raises(RunError, match="nothing was exported"):
        export_merged(scorer_of("arliss", "bert", "pooling=own"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_once_and_refuses_a_folder_that_is_there(
    scorer_of: Callable[..., Scorer], tmp_path: Path
) -> None:
    run = scorer_of("arliss", "bert", "pooling=own").folder
    words = ["export", str(run), "--to", "merged", "--out", str(tmp_path / "out")]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0
    assert "golden rewards differ by at most" in first.output
    second = CliRunner().invoke(app, words)
    assert isinstance(second.exception, ConfigError)
    assert "exists already" in str(second.exception)
