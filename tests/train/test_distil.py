"""A student says what its teacher says, from texts alone; a stop changes nothing; what is wrong is said at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from moreward.data.batches import side
from moreward.data.texts import divided_texts, load_texts
from moreward.errors import BackboneError, ConfigError, DataError
from moreward.nn.backbone import Backbone
from moreward.nn.depth import cut_backbone, depth_of, kept_layers
from moreward.scoring import load
from moreward.train.distil import Distilled, agreement_of, distil
from moreward.train.track import Silent
from moreward.types import Preference
from trained import card, digests, metrics, write_pairs

Make = Callable[..., Path]
Tiny = Callable[[str], Path]
SETTINGS: dict[str, Any] = {
    "train": {
        "learning_rate": 3e-3,
        "epochs": 20,
        "batch_size": 8,
        "patience": 0,
        "eval_every": 2,
        "checkpoint_every": 7,
    },
    "data": {"val_fraction": 0.2},
}


@pytest.fixture(scope="module")
def teacher(make: Make) -> Path:
    return make("arliss", "bert", "system.rank=2", "system.alpha=4", "system.top_k=2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, pairs: Sequence[Preference]) -> Path:
    """Unlabelled: the responses in an order that says nothing of which was chosen."""
    rows = [{"prompt": p.prompt, "responses": sorted([p.chosen, p.rejected]), "domain": p.domain} for p in pairs]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(teacher: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    out = tmp_path_factory.mktemp("whole") / "student"
    return distil(teacher, [str(texts)], out=out, layers=1, settings=SETTINGS)


# ---- the student


def test_a_student_of_one_layer_says_what_its_teacher_says(
    whole: Distilled, teacher: Path, pairs: Sequence[Preference]
) -> None:
    domains = [one.domain for one in whole.agreement]
    assert domains == ["long", "short", "all"]
    overall = whole.agreement[-1]
    assert overall.num_texts == 16
    assert overall.pearson is not None
    assert overall.pearson > 0.9
    assert overall.same_order is not None
    assert overall.same_order > 0.8
    items = [side(p, which) for p in pairs for which in ("chosen", "rejected")]
    said = [[r.number for r in load(run).score(items)] for run in (teacher, whole.run)]
    assert np.corrcoef(said)[0, 1] > 0.9
    assert np.mean(said[0]) == pytest.approx(np.mean(said[1]), abs=0.3), "in the teacher's zero and unit"


def test_a_student_is_an_ordinary_run_that_names_its_teacher(whole: Distilled, teacher: Path) -> None:
    told = card(whole.run)
    assert (told["recipe"], told["config"]["tune"]) == ("baseline", "full")
    assert [parent["run"] for parent in told["parents"]] == [str(teacher)]
    assert AutoConfig.from_pretrained(whole.run / "model" / "backbone").num_hidden_layers == 1
    assert whole.parameters[1] == told["parameters"]["stored"] < whole.parameters[0]
    assert len(told["golden"]) == 16
    (stage,) = told["stages"]
    assert (stage["pairs"], stage["rated"], stage["val_rated"]) == (0, 64, 16)
    assert told["distilled"]["agreement"][-1]["pearson"] == whole.agreement[-1].pearson
    losses = [line["eval/loss"] for line in metrics(whole.run) if "eval/loss" in line]
    assert losses[-1] < losses[0] / 2


class Stopping(Silent):
    """Stops the run before the report of a step of the student's training."""

    def __init__(self, at: int) -> None:
        self.at, self.stage = at, ""

    def start(self, name: str, total: int, done: int = 0) -> None:
        self.stage = name

    def step(self, done: int, text: str = "") -> None:
        if self.stage == "distil" and done >= self.at:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_ends_with_the_same_bits(
    whole: Distilled, teacher: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "student"
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, [str(texts)], out=out, layers=1, settings=SETTINGS, reporter=Stopping(60))
    kept = json.loads((out / "teacher.json").read_text())["rewards"]
    assert len(kept) == 80
    assert not (out / "model").exists()
    made = distil(teacher, [str(texts)], out=out, layers=1, settings=SETTINGS)
    assert card(out)["stages"][0]["resumed_from_step"] == 56
    name = "model.safetensors"
    assert digests(out / "model")[name] == digests(whole.run / "model")[name]
    assert made.agreement == whole.agreement
    assert card(out)["golden"] == card(whole.run)["golden"]


def test_a_student_on_a_backbone_of_its_own(teacher: Path, texts: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    once = {"train": {"epochs": 1, "batch_size": 32}}
    with pytest.raises(ConfigError, match="--other-tokenizer"):
        distil(teacher, [str(texts)], out=tmp_path / "s", student=str(tiny_backbone("qwen2")), settings=once)
    made = distil(
        teacher,
        [str(texts)],
        out=tmp_path / "s",
        student=str(tiny_backbone("qwen2")),
        other_tokenizer=True,
        settings=once,
    )
    assert card(made.run)["backbone"]["pooling"] == "last"
    assert load(made.run).score([("A prompt", "A response")])[0].reward is not None


def test_every_fault_is_named_at_once(
    teacher: Path, tmp_path: Path, tiny_backbone: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "p", "response": " "}\n')
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as refused:
        distil(
            teacher,
            [str(empty)],
            out=tmp_path / "s",
            student=str(tiny_backbone("qwen2")),
            layers=3,
            settings={"train": {"epochs": 0}, "recipe": "baseline"},
        )
    said = str(refused.value)
    for part in ("one process", "train.epochs", "has 2; keep 1 to 2 (got 3)", "--other-tokenizer", "empty_response 1"):
        assert part in said, part
    assert not (tmp_path / "s").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(DataError, match="0 conversations in 1 rows"):
        distil(teacher, [str(empty)], out=tmp_path / "s")
    with pytest.raises(ConfigError, match="tune: 'frozen' is not for a student"):
        distil(teacher, [str(write_pairs(tmp_path / "p.jsonl", []))], out=tmp_path / "s", settings={"tune": "frozen"})


def test_texts_that_are_too_long_for_the_teacher_are_counted_or_refused(
    teacher: Path, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    rows = [{"prompt": "word " * 200, "response": f"answer {i}"} for i in range(3)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="0 of 3 conversations fit"):
        distil(teacher, [str(path)], out=tmp_path / "s")


# ---- agreement


def test_agreement_is_that_of_known_numbers() -> None:
    teacher_N = np.array([0.0, 1.0, 2.0, 5.0])
    found = agreement_of("d", np.array([1.0, 0.0, 3.0, 4.0]), teacher_N, ["a", "a", "b", "b"])
    assert (found.num_pairs, found.same_order) == (2, 0.5)
    assert found.error == pytest.approx(1.0)
    assert found.spearman == pytest.approx(0.8)
    assert agreement_of("d", np.ones(4), teacher_N, ["a"] * 4).pearson is None


# ---- texts


def test_texts_of_every_layout_are_read_once_with_their_domain(tmp_path: Path) -> None:
    path = tmp_path / "code.train.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "response": "a"},
        {"prompt": "p", "responses": ["a", "b"], "domain": "chat"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "p"}], "response": [{"role": "assistant", "content": "c"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_texts(path)
    said = [(one.conversation.domain, one.conversation.response) for one in found.rows]
    assert said[:4] == [("code", "a"), ("chat", "b"), ("code", "a"), ("code", "b")]
    assert (len(said), found.num_rows, found.num_repeated) == (5, 4, 1)
    with path.open("a") as file:
        file.write('{"prompt": "p"}\n{"prompt": "", "response": "a"}\n{"prompt": "p", "responses": []}\n')
    with pytest.raises(DataError, match="3 of them bad"):
        load_texts(path)
    assert [row.line for row in load_texts(path, max_bad_share=1).quarantine] == [5, 6, 7]


def test_responses_to_one_prompt_stay_on_one_side(texts: Path) -> None:
    rows = load_texts(texts).rows
    train, val = divided_texts(rows, 0.2, seed=0)
    assert (len(train), len(val)) == (64, 16)
    assert not {r.conversation.prompt for r in train} & {r.conversation.prompt for r in val}


# ---- fewer layers


def test_the_layers_that_stay_are_evenly_spaced() -> None:
    assert kept_layers(6, 3) == [0, 2, 5]
    assert kept_layers(12, 4) == [0, 4, 7, 11]
    assert kept_layers(6, 1) == [0]
    assert kept_layers(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert", "gpt2", "qwen3"])
def test_a_backbone_that_was_cut_is_its_own_lower_part(kind: str, tiny_backbone: Tiny, tmp_path: Path) -> None:
    source = tiny_backbone(kind)
    assert depth_of(str(source)) == 2
    cut = Backbone.load(str(cut_backbone(str(source), 1, tmp_path / "cut")))
    assert depth_of(cut.name) == 1
    full = Backbone.load(str(source))
    kept = cut.model.state_dict()
    assert 0 < len(kept) < len(full.model.state_dict())
    for name, value in kept.items():
        assert torch.equal(value, full.model.state_dict()[name]), name
    with pytest.raises(BackboneError, match="keep 1 to 2"):
        cut_backbone(str(source), 3, tmp_path / "other")


def test_a_backbone_that_keeps_all_its_layers_says_the_same(tiny_backbone: Tiny, tmp_path: Path) -> None:
    source = tiny_backbone("bert")
    ids_NT = torch.arange(10, 22).view(2, 6)
    vectors = [
        Backbone.load(str(folder)).eval()(ids_NT, torch.ones_like(ids_NT))
        for folder in (source, cut_backbone(str(source), 2, tmp_path / "cut"))
    ]
    torch.testing.assert_close(vectors[0], vectors[1])
