"""A run as one ONNX graph: onnxruntime gives the routed rewards, and each expert's, for any batch and length."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner

from moreward.cli import app
from moreward.errors import ConfigError, RunError
from moreward.export import onnx_graph
from moreward.export.onnx_graph import EXPERT, GRAPH, MIXTURE_OUTPUTS, ROUTED, export_onnx, opened_graph
from moreward.scoring import Scorer, load
from moreward.types import Conversation
from moreward.verify.exported import verify_exported

Make = Callable[..., Path]
OWN, LONG = "pooling=own", "data.max_length=120"
CASES = [
    ("arliss", "bert", OWN),
    ("arliss", "deberta-v2", OWN, LONG),
    ("arliss", "roberta", OWN, LONG),
    ("arliss", "modernbert", "pooling=mean", LONG),
    ("arliss", "bert", OWN, "system.top_k=2"),
    ("arliss", "bert", "tune=frozen", "pooling=mean"),
    ("rodos", "bert", OWN),
    ("rodos", "deberta-v2", OWN, LONG),
    ("baseline", "roberta", OWN, LONG),
    ("base_lora", "modernbert", OWN, LONG),
]
IDS = ["-".join(case) for case in CASES]
# onnxruntime and tokenizers, nothing else.
ALONE = """
import json, sys
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder = sys.argv[1]
told = json.load(open(folder + "/moreward.json"))
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.encode_special_tokens = True
session = onnxruntime.InferenceSession(folder + "/model.onnx")
names = [one.name for one in session.get_inputs()]
def padded(rows):
    width = max(map(len, rows))
    ids = np.full((len(rows), width), told["pad_token_id"], dtype=np.int64)
    for n, row in enumerate(rows):
        ids[n, :len(row)] = row
    return ids, np.array([[int(t < len(row)) for t in range(width)] for row in rows], dtype=np.int64)
golden = told["golden"]
texts = [tokenizer.encode(g["prompt"], g["response"]).ids for g in golden]
prompts = [tokenizer.encode(g["prompt"]).ids for g in golden]
assert texts == [g["ids"] for g in golden]
fed = dict(zip(("input_ids", "attention_mask"), padded(texts)))
if "prompt_input_ids" in names:
    assert prompts == [g["prompt_ids"] for g in golden]
    fed |= dict(zip(("prompt_input_ids", "prompt_attention_mask"), padded(prompts)))
if "expert" in names:
    fed["expert"] = np.full(len(texts), -1)
found = session.run(["logits"], fed)[0][:, 0]
assert not {"torch", "transformers", "moreward"} & sys.modules.keys()
print(json.dumps(max(abs(float(a) - g["reward"]) for a, g in zip(found, golden))))
"""


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def exported(
    request: pytest.FixtureRequest, make: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Scorer, Path, Path]:
    run = make(*request.param)
    scorer, out = load(run), tmp_path_factory.mktemp("onnx") / "graph"
    export_onnx(scorer, out)
    return scorer, out, run


def tokens(scorer: Scorer, out: Path) -> tuple[list[list[int]], list[list[int]], list[float]]:
    golden = json.loads((out / "moreward.json").read_text(encoding="utf-8"))["golden"]
    return [g["ids"] for g in golden], [g["prompt_ids"] for g in golden], [g["reward"] for g in golden]


@pytest.mark.parametrize("rows", [1, 2, 5, None])
def test_any_batch_gets_the_routed_reward(rows: int | None, exported: tuple[Scorer, Path, Path]) -> None:
    scorer, out, _ = exported
    texts, prompts, wanted = tokens(scorer, out)
    rewards = opened_graph(out)
    assert len({len(text) for text in texts}) > 1
    found = []
    for start in range(0, len(texts), rows or len(texts)):
        part = slice(start, start + (rows or len(texts)))
        found += rewards(texts[part], prompts[part]).tolist()
    assert max(wanted) - min(wanted) > 1e-2
    assert np.allclose(found, wanted, rtol=0, atol=1e-4 * max(1.0, *map(abs, wanted)))


def test_an_expert_that_is_named_judges_alone(exported: tuple[Scorer, Path, Path]) -> None:
    scorer, out, _ = exported
    texts, prompts, _ = tokens(scorer, out)
    for number, name in enumerate(scorer.experts):
        wanted = [one["experts"][name] for one in scorer.card["golden"]]
        found = opened_graph(out)(texts, prompts, number).tolist()
        assert np.allclose(found, wanted, rtol=0, atol=1e-4 * max(1.0, *map(abs, wanted)))


def test_lengths_that_no_trace_saw(exported: tuple[Scorer, Path, Path]) -> None:
    scorer, out, _ = exported
    rewards = opened_graph(out)
    prompt = "In the short style, tell me about tea."
    for response in ("No.", "It is good. " * 3, "It is new, and there is more to say. " * 2):
        one = scorer.score([(prompt, response)], on_long="truncate")[0]
        encoded = scorer.encoder.conversation(Conversation(prompt=prompt, response=response))
        found = float(rewards([list(encoded.ids)], [list(encoded.prompt_ids)])[0])
        assert abs(found - one.number) <= 1e-4 * max(1.0, abs(one.number))


def test_a_fresh_process_needs_onnxruntime_and_tokenizers_only(exported: tuple[Scorer, Path, Path]) -> None:
    scorer, out, _ = exported
    done = subprocess.run([sys.executable, "-c", ALONE, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = [one["reward"] for one in scorer.card["golden"]]
    assert json.loads(done.stdout) <= 1e-4 * max(1.0, *map(abs, wanted))


def test_verify_recomputes_the_graph(exported: tuple[Scorer, Path, Path]) -> None:
    _, out, run = exported
    found = verify_exported(out, against=run)
    assert found.holds, found.faults
    assert found.kind == "moreward-onnx"
    assert GRAPH in found.hashes
    assert any("by onnxruntime" in check.said for check in found.checks)


def test_the_graph_tells_where_rows_went(make: Make, tmp_path: Path) -> None:
    scorer = load(make("arliss", "bert", OWN, "system.top_k=2"))
    export_onnx(scorer, tmp_path / "graph")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph" / GRAPH))
    assert tuple(one.name for one in session.get_outputs()) == MIXTURE_OUTPUTS
    golden = json.loads((tmp_path / "graph" / "moreward.json").read_text(encoding="utf-8"))["golden"][0]
    fed = {}
    for name, key in (("input_ids", "ids"), ("prompt_input_ids", "prompt_ids")):
        fed[name] = np.array([golden[key]], dtype=np.int64)
        fed[name.replace("input_ids", "attention_mask")] = np.ones_like(fed[name])
    logits, rewards, experts, weights, _ = session.run(None, {**fed, EXPERT: np.array([ROUTED])})
    assert sorted(experts[0]) == [0, 1]
    assert abs(weights.sum() - 1) < 1e-6
    assert abs((rewards * weights).sum() - logits[0, 0]) < 1e-5
    for number in range(2):
        alone, _, chosen, share, _ = session.run(None, {**fed, EXPERT: np.array([number])})
        assert chosen[0, 0] == number
        assert share[0].tolist() == [1.0, 0.0]
        assert abs(alone[0, 0] - rewards[0, experts[0].tolist().index(number)]) < 1e-5


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (("arliss", "llama", LONG), "--to onnx writes encoders .*; this run's backbone is a llama"),
        (("base_lora", "gpt2", LONG), "--to onnx writes encoders .*; this run's backbone is a gpt2"),
        (("shared_expert", "bert"), "not that of single heads"),
        (("ensemble", "bert"), "export"),
        (
            ("arliss", "bert", OWN, "system.adapter_layers=1", "system.router_reads=trunk"),
            "--to onnx needs a router that reads the backbone",
        ),
    ],
)
def test_what_has_no_graph_is_refused_and_nothing_written(
    what: tuple[str, ...], message: str, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(load(make(*what)), tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_computes_something_else_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load(make("arliss", "bert", OWN))
    honest = onnx_graph.mixture_model

    def turned(*told: object, **more: object) -> torch.nn.Module:
        model = honest(*told, **more)  # type: ignore[arg-type]
        with torch.no_grad():
            model.heads[0][-1].weight.neg_()
        return model

    monkeypatch.setattr(onnx_graph, "mixture_model", turned)
    with pytest.raises(RunError, match="onnxruntime gives other rewards"):
        export_onnx(scorer, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_was_cut_is_told_by_verify(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "graph"
    export_onnx(load(make("baseline", "bert", OWN)), out)
    whole = (out / GRAPH).read_bytes()
    (out / GRAPH).write_bytes(whole[: len(whole) // 2])
    assert not verify_exported(out).holds
    with pytest.raises(RunError, match="onnxruntime cannot load it"):
        opened_graph(out)


def test_the_command_writes_a_card(make: Make, tmp_path: Path) -> None:
    run = make("arliss", "bert", OWN)
    done = CliRunner().invoke(app, ["export", str(run), "--to", "onnx", "--out", str(tmp_path / "graph")])
    assert done.exit_code == 0, done.output
    assert "in onnxruntime" in done.output
    assert "library_name: onnx" in (tmp_path / "graph" / "README.md").read_text(encoding="utf-8")
