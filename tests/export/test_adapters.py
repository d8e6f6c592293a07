"""An expert as an adapter directory: peft alone, on the stock pretrained weights, gives its rewards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moreward.checkpoint import verify_folder
from moreward.cli import app
from moreward.errors import ConfigError, RunError
from moreward.export import adapters
from moreward.export.adapters import export_peft
from moreward.scoring import Scorer, load
from moreward.types import Preference
from trained import trained

Get = Callable[[str], Path]
LONG = "data.max_length=120"
OWN = "pooling=own"
CASES = [("bert", OWN), ("deberta-v2", OWN, LONG), ("modernbert", OWN, LONG), ("roberta", OWN, LONG), ("llama", LONG)]
FRESH = """
import json, sys, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
told = []
for folder in sys.argv[1:]:
    import os; os.chdir(folder)  # the base's path is relative to the adapter
    tokenizer = AutoTokenizer.from_pretrained(".")
    model = AutoPeftModelForSequenceClassification.from_pretrained(".", num_labels=1).eval()
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    golden = json.load(open("moreward.json"))
    rows = tokenizer.pad({"input_ids": [g["ids"] for g in golden["golden"]]}, return_tensors="pt")
    with torch.no_grad():
        logits = model(**rows).logits[:, 0] + golden["offset"]
    told.append([(a - g["reward"]) for a, g in zip(logits.tolist(), golden["golden"])])
assert "moreward" not in sys.modules
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def scorer_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Get, pairs: Sequence[Preference]
) -> Callable[..., Scorer]:
    def get(kind: str, *words: str, recipe: str = "arliss") -> Scorer:
        return load(trained(tmp_path_factory.mktemp("peft"), tiny_backbone, pairs, recipe, kind, *words))

    return get


@pytest.fixture(scope="module")
def exported(scorer_of: Callable[..., Scorer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("adapters")
    return {case[0]: [one.folder for one in export_peft(scorer_of(*case), folder / case[0])] for case in CASES}


def test_peft_alone_gives_the_golden_rewards_in_a_fresh_process(exported: dict[str, list[Path]]) -> None:
    folders = [str(folder) for found in exported.values() for folder in found]
    told = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    for folder, differences in zip(folders, json.loads(told.stdout), strict=True):
        note = json.loads((Path(folder) / "moreward.json").read_text())
        rewards = [g["reward"] for g in note["golden"]]
        assert max(rewards) - min(rewards) > 10 * note["tolerance"]
        assert max(map(abs, differences)) <= note["tolerance"], folder


@pytest.mark.parametrize(("kind", "new"), [("bert", "pooler"), ("deberta-v2", "pooler.dense"), ("llama", "score")])
def test_what_is_new_at_load_is_named(exported: dict[str, list[Path]], kind: str, new: str) -> None:
    config = json.loads((exported[kind][0] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "SEQ_CLS", True)
    assert any(new in module for module in config["modules_to_save"])
    assert not Path(config["base_model_name_or_path"]).is_absolute()


def test_directories_are_sealed_and_say_what_they_are(exported: dict[str, list[Path]]) -> None:
    for folder in (folder for found in exported.values() for folder in found):
        assert verify_folder(folder, expected={"kind": "moreward-peft"}) == []
        told = json.loads((folder / "moreward.json").read_text())
        assert told["kind"] == "moreward-peft"
        assert len(told["base"]["sha256"]) == 64


def test_a_decoder_gets_a_pad_token_that_ends_no_text_and_that_the_base_knows(exported: dict[str, list[Path]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported["llama"][0])
    golden = json.loads((exported["llama"][0] / "moreward.json").read_text())["golden"]
    assert tokenizer.pad_token_id not in {tokenizer.eos_token_id, *(g["ids"][-1] for g in golden)}
    assert tokenizer.pad_token_id < 300


def test_runs_without_adapters_are_refused(scorer_of: Callable[..., Scorer], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        export_peft(scorer_of("bert", OWN, recipe="rodos"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_give_other_rewards_are_not_left_behind(
    scorer_of: Callable[..., Scorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = adapters.adapted_rewards
    monkeypatch.setattr(adapters, "adapted_rewards", lambda *given: real(*given) * 1.01)
    with pytest.raises(RunError, match="peft gives other rewards"):
        export_peft(scorer_of("bert", OWN), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(scorer_of: Callable[..., Scorer], tmp_path: Path) -> None:
    run = scorer_of("bert", OWN).folder
    told = CliRunner().invoke(app, ["export", str(run), "--to", "peft", "--out", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    assert "in peft" in told.output
