"""A mixture as one directory of transformers: it routes and rewards as the run does, with and without our package."""

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
from moreward.export import mixture
from moreward.export.mixture import PROMPT_END, export_hf
from moreward.scoring import Scorer, load
from moreward.types import Preference
from trained import trained

Get = Callable[[str], Path]
OWN, LONG = "pooling=own", "data.max_length=120"
CASES = [
    ("arliss", "bert", OWN),
    ("rodos", "bert", OWN),
    ("arliss", "llama", LONG),
    ("rodos", "gpt2", LONG),
]
IDS = ["-".join(case[:2]) for case in CASES]
READ = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
out = []
for folder in sys.argv[1:]:
    told = json.load(open(folder + "/moreward.json"))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **HOW).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **HOW)
    def rows(key, side):
        tokenizer.padding_side = side
        return tokenizer.pad({"input_ids": [g[key] for g in told["golden"]]}, return_tensors="pt")
    worst = 0.0
    for side in ("left", "right"):
        x, p = rows("ids", side), rows("prompt_ids", side)
        with torch.no_grad():
            y = model(**x, prompt_input_ids=p["input_ids"], prompt_attention_mask=p["attention_mask"], unknown=1)
        assert y.logits.shape == (len(told["golden"]), 1)
        worst = max(worst, max(abs(a - g["reward"]) for a, g in zip(y.logits[:, 0].tolist(), told["golden"])))
    out.append(worst)
"""
PLAIN = "HOW = {'trust_remote_code': True}\n" + READ + "assert 'moreward' not in sys.modules\nprint(json.dumps(out))"
OURS = "import moreward\nHOW = {}\n" + READ + "print(json.dumps(out))"


@pytest.fixture(scope="module")
def scorer_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Get, pairs: Sequence[Preference]
) -> Callable[..., Scorer]:
    def get(recipe: str, kind: str, *words: str) -> Scorer:
        return load(trained(tmp_path_factory.mktemp("hf"), tiny_backbone, pairs, recipe, kind, *words))

    return get


@pytest.fixture(scope="module")
def exported(scorer_of: Callable[..., Scorer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {
        name: export_hf(scorer_of(*case), folder / name, with_code=True)[0].folder
        for name, case in zip(IDS, CASES, strict=True)
    }


@pytest.mark.parametrize("code", [PLAIN, OURS], ids=["remote-code", "import-moreward"])
def test_a_fresh_process_gives_the_golden_rewards(code: str, exported: dict[str, Path]) -> None:
    folders = [str(folder) for folder in exported.values()]
    told = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    for folder, difference in zip(folders, json.loads(told.stdout.splitlines()[-1]), strict=True):
        assert difference <= json.loads((Path(folder) / "moreward.json").read_text())["tolerance"], folder


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_rows_go_where_the_run_sends_them(
    case: tuple[str, ...], scorer_of: Callable[..., Scorer], exported: dict[str, Path], pairs: Sequence[Preference]
) -> None:
    scorer, folder = scorer_of(*case), exported["-".join(case[:2])]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    items = [(str(p.prompt), str(p.chosen)) for p in pairs[::5]]
    if tokenizer.sep_token_id is None:
        ends = tokenizer.eos_token
        bos = scorer.encoder._prefix
        rows = tokenizer([f"{a}{PROMPT_END}{b}{ends}" for a, b in items], add_special_tokens=False)["input_ids"]
        batch = tokenizer.pad({"input_ids": [[*bos, *row] for row in rows]}, return_tensors="pt")
    else:
        batch = tokenizer([a for a, _ in items], [b for _, b in items], padding=True, return_tensors="pt")
    with torch.no_grad():
        # A router of a second's training may send all prompts one way: centred on these, it divides them.
        middle_E = model(**batch).gating_output.mean(0)
        for gate in (model.gate, scorer.system.routed.router.router.gate):
            gate.bias -= middle_E
        told = model(**batch)
    wanted = scorer.score(items)
    names = [model.config.experts[e] for e in told.experts[:, 0].tolist()]
    assert names == [reward.expert for reward in wanted]
    assert len({*names}) > 1
    tolerance = json.loads((folder / "moreward.json").read_text())["tolerance"]
    assert told.logits[:, 0].tolist() == pytest.approx([r.reward for r in wanted], abs=10 * tolerance)


def test_the_pipeline_returns_rewards_of_pairs(scorer_of: Callable[..., Scorer], exported: dict[str, Path]) -> None:
    classify = pipeline("text-classification", model=str(exported["arliss-bert"]), device="cpu")
    texts = [("How long is it?", "It is calm."), ("Say more.", "People come back to it year after year.")]
    told = classify([{"text": a, "text_pair": b} for a, b in texts])
    wanted = [r.reward for r in scorer_of(*CASES[0]).score(texts)]
    assert [t["score"] for t in told] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_saved_again_it_is_the_same_to_the_bit(exported: dict[str, Path], tmp_path: Path) -> None:
    first = AutoModelForSequenceClassification.from_pretrained(exported["arliss-bert"])
    first.save_pretrained(tmp_path)
    second = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {k: v.tolist() for k, v in first.state_dict().items()} == {
        k: v.tolist() for k, v in second.state_dict().items()
    }


def test_what_others_read_in_the_configuration(exported: dict[str, Path]) -> None:
    for folder in exported.values():
        config = json.loads((folder / "config.json").read_text())
        assert config["problem_type"] == "regression"
        assert config["id2label"] == {"0": "REWARD"}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert verify_folder(folder, expected={"kind": "moreward-hf"}) == []


def test_rows_that_cannot_be_routed_or_are_too_long_are_named(exported: dict[str, Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(exported["arliss-llama"])
    with pytest.raises(ValueError, match="row 0: no token"):
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="row 0: 130 tokens, the limit is 120"):
        model(torch.full((1, 130), 5), prompt_input_ids=torch.tensor([[5]]))


def test_other_recipes_are_refused(scorer_of: Callable[..., Scorer], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="arliss and rodos"):
        export_hf(scorer_of("baseline", "bert", OWN), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_that_gives_other_rewards_is_not_left_behind(
    scorer_of: Callable[..., Scorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mixture.mixture_rewards
    monkeypatch.setattr(mixture, "mixture_rewards", lambda *given: real(*given) * 1.01)
    with pytest.raises(RunError, match="nothing was exported"):
        export_hf(scorer_of(*CASES[0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(scorer_of: Callable[..., Scorer], tmp_path: Path) -> None:
    run = scorer_of(*CASES[0]).folder
    told = CliRunner().invoke(app, ["export", str(run), "--to", "hf", "--out", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    assert not (tmp_path / "out" / "modeling_moreward.py").exists()
    wrong = CliRunner().invoke(app, ["export", str(run), "--with-code", "--out", str(tmp_path / "more")])
    assert isinstance(wrong.exception, ConfigError)
