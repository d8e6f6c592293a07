"""Imported reward models say what plain transformers says of them, and a router learns which of them is right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from typer.testing import CliRunner

from moreward.cli import app
from moreward.errors import ConfigError, DataError
from moreward.evals.run import evaluate_run
from moreward.export.merged import export_merged
from moreward.nn.foreign import examine, examine_all
from moreward.nn.losses import CorrectnessLoss, Verdict
from moreward.scoring import GOLDEN_TOLERANCE, RAW_TOLERANCE, Scorer, load
from moreward.train.strangers import Imported, import_models, look_at
from moreward.types import Batch, Conversation, Preference
from moreward.verify.run import verify_run
from serving import serving
from tiny import make_tokenizer
from trained import write_pairs

QUICK = {"data": {"max_length": 96, "val_fraction": 0.25}, "train": {"epochs": 1, "batch_size": 8}}
TEXTS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How do I write a function?", "def add(a, b): return a + b, and a longer answer that explains every step."),
    ("Please explain why the sky is blue.", "I am sorry, but I cannot help you with that request."),
]
TURNS = [
    ([{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}]) for prompt, response in TEXTS
]
Backbones = Callable[[str], Path]


# ---- directories as others leave them --------------------------------------------------------------------------------


def classifier(folder: Path, backbone: Path, *, seed: int = 0) -> Path:
    """A stock classifier of one label with a head that tells texts apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


def told_of_types(folder: Path) -> Path:
    """With a tokenizer that numbers the texts of a pair, as that of BERT on the hub."""
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    told["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps(told), encoding="utf-8")
    return folder


def by_trl(folder: Path, backbone: Path, pairs: Sequence[Preference]) -> Path:
    """What `RewardTrainer` leaves behind after a few steps on conversations."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    def turns(text: Any, role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": str(text)}]

    rows = [
        {
            "prompt": turns(p.prompt, "user"),
            "chosen": turns(p.chosen, "assistant"),
            "rejected": turns(p.rejected, "assistant"),
        }
        for p in pairs[:8]
    ]
    with warnings.catch_warnings():  # of its own use of transformers
        warnings.simplefilter("ignore")
        arguments = RewardConfig(
            output_dir=str(folder / "work"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
            use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1, dtype=torch.float32)
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(backbone),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(str(folder / "model"))
    return folder / "model"


def with_value_head(folder: Path, backbone: Path) -> Path:
    """As LLaMA-Factory: a causal model, and its head in a file of its own."""
    shutil.copytree(backbone, folder)
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(3)
    head = {
        "v_head.summary.weight": torch.randn(1, size, generator=generator),
        "v_head.summary.bias": torch.tensor([0.7]),
    }
    save_file(head, folder / "value_head.safetensors", metadata={"format": "pt"})
    return folder


def by_openrlhf(folder: Path, backbone: Path, *, prefix: str = "score", **told: Any) -> Path:
    """As OpenRLHF: the transformer under `model.`, a bias-free head under its prefix, mean and std in config.json."""
    shutil.copytree(backbone, folder)
    tensors = {f"model.{k}": v.clone() for k, v in AutoModel.from_pretrained(backbone).state_dict().items()}
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    tensors[f"{prefix}.weight"] = torch.randn(1, size, generator=torch.Generator().manual_seed(4))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, architectures=["RewardModel"], **told)
    return folder


def planted(folder: Path, sign: float) -> Path:
    """A GPT-2 whose reward rises (or falls) with the length of the conversation, and depends on nothing else."""
    tokenizer = make_tokenizer("gpt2")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=128, num_labels=1)
    model = GPT2ForSequenceClassification(config)
    angle_T = torch.linspace(0, 1.5, 128)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.zero_()
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[:, 0], model.transformer.wpe.weight[:, 1] = angle_T.cos(), -angle_T.cos()
        model.transformer.wpe.weight[:, 2], model.transformer.wpe.weight[:, 3] = angle_T.sin(), -angle_T.sin()
        model.score.weight.zero_()
        model.score.weight[0, 2] = sign
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **change: Any) -> None:
    file = folder / "config.json"
    told = json.loads(file.read_text(encoding="utf-8")) | change
    file.write_text(json.dumps({k: v for k, v in told.items() if v is not None}), encoding="utf-8")


# ---- what plain transformers says -----------------------------------------------------------------------------------


def tokens(folder: Path, prompt: Any, response: Any) -> Mapping[str, Tensor]:
    """One conversation by the directory's own tokenizer: turns by its template where it has one; else text, as a pair
    for tokenizers that join pairs, and joined and ended for others, as TRL does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(prompt, str):
        if tokenizer.chat_template:
            told: Any = tokenizer.apply_chat_template([*prompt, *response], return_dict=True, return_tensors="pt")
            return dict(told)
        prompt, response = prompt[0]["content"], response[0]["content"]
    if tokenizer.cls_token is not None and tokenizer.sep_token is not None:
        return dict(tokenizer(prompt, response, return_tensors="pt"))
    text = prompt + response
    ends = tokenizer(text)["input_ids"][-1] == tokenizer.eos_token_id
    return dict(tokenizer(text + ("" if ends else tokenizer.eos_token), return_tensors="pt"))


@torch.no_grad()
def plain(folder: Path, prompt: Any, response: Any) -> float:
    inputs = dict(tokens(folder, prompt, response))
    config = json.loads((folder / "config.json").read_text())
    if (folder / "value_head.safetensors").exists():
        inputs.pop("token_type_ids", None)
        states = AutoModelForCausalLM.from_pretrained(folder).eval()(**inputs, output_hidden_states=True).hidden_states
        head = load_file(folder / "value_head.safetensors")
        return float(states[-1][0, -1] @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"])
    if config["architectures"] == ["RewardModel"]:
        inputs.pop("token_type_ids", None)
        prefix = config.get("value_head_prefix", "score")
        states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
        reward = float(states[0, -1] @ load_file(folder / "model.safetensors")[f"{prefix}.weight"][0])
        return (reward - config.get("mean", 0.0)) / config.get("std", 1.0)
    return float(AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits[0, 0])


def raw(scorer: Scorer, items: Sequence[Any]) -> list[dict[str, float]]:
    """What each expert says in its own unit."""
    units: Any = scorer.system
    found = []
    for reward in scorer.score(items, explain=True):
        by_label = zip(reward.expert_rewards.items(), units.expert_names, strict=True)
        found.append(
            {
                label: value * float(units.standardizer(name).std) + float(units.standardizer(name).mean)
                for (label, value), name in by_label
            }
        )
    return found


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_backbone: Backbones,
    make: Callable[..., Path],
    pairs: tuple[Preference, ...],
) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("others")
    exported = export_merged(load(make("rodos")), at / "ours")
    return {
        "trl": by_trl(at / "trl", tiny_backbone("qwen2"), pairs),
        "ours": exported[0].folder,
        "types": told_of_types(classifier(at / "types", tiny_backbone("bert"), seed=1)),
        "roberta": classifier(at / "roberta", tiny_backbone("roberta"), seed=2),
        "pad-is-eos": classifier(at / "pad", tiny_backbone("llama"), seed=5),
        "deberta": classifier(at / "deberta", tiny_backbone("deberta-v2"), seed=6),
        "modern": classifier(at / "modern", tiny_backbone("modernbert"), seed=7),
        "factory": with_value_head(at / "factory", tiny_backbone("llama")),
        "rlhf": by_openrlhf(at / "rlhf", tiny_backbone("qwen3"), mean=0.25, std=3.0),
        "other-prefix": by_openrlhf(
            at / "prefix", tiny_backbone("llama"), prefix="value_head", value_head_prefix="value_head"
        ),
        "no.pad": planted(at / "planted", 1.0),
    }


@pytest.fixture(scope="module")
def imported(
    folders: dict[str, Path],
    pairs: tuple[Preference, ...],
    tiny_backbone: Backbones,
    tmp_path_factory: pytest.TempPathFactory,
) -> Imported:
    at = tmp_path_factory.mktemp("imported")
    data = write_pairs(at / "pairs.jsonl", pairs)
    return import_models(folders, str(data), out=at / "run", router=str(tiny_backbone("bert")), settings=QUICK)


@pytest.mark.parametrize("kind", ["texts", "turns"])
def test_every_expert_says_what_plain_transformers_says(
    imported: Imported, folders: dict[str, Path], kind: str
) -> None:
    """Whatever family, tokenizer, template, head or pad token it has, and all in one batch of various lengths."""
    items = TEXTS if kind == "texts" else TURNS
    for (prompt, response), said in zip(items, raw(load(imported.run), items), strict=True):
        wanted = {name: plain(folder, prompt, response) for name, folder in folders.items()}
        assert said == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_the_kinds_under_test_are_those_that_are_easily_read_wrongly(folders: dict[str, Path]) -> None:
    """Else a fixture that changed could make the comparison above an easy one."""
    padding = json.loads((folders["pad-is-eos"] / "config.json").read_text())
    assert padding["pad_token_id"] == padding["eos_token_id"]
    assert int(tokens(folders["pad-is-eos"], *TEXTS[0])["input_ids"][0, -1]) == padding["pad_token_id"]
    assert json.loads((folders["no.pad"] / "config.json").read_text()).get("pad_token_id") is None
    assert bool(tokens(folders["types"], *TEXTS[0])["token_type_ids"].any())
    assert AutoTokenizer.from_pretrained(folders["trl"]).chat_template


def test_the_rewards_under_test_differ(imported: Imported) -> None:
    """Else the comparison above could not fail."""
    rows = raw(load(imported.run), TURNS)
    for name in rows[0]:
        assert len({round(row[name], 4) for row in rows}) == len(rows), name


def test_a_reward_is_that_of_the_chosen_expert_in_its_unit(imported: Imported) -> None:
    for reward in load(imported.run).score(TEXTS, explain=True):
        assert reward.reward == pytest.approx(reward.expert_rewards[reward.expert], abs=1e-6)
        assert reward.expert in {expert.name for expert in imported.experts}


def test_units_are_those_of_the_training_pairs(
    imported: Imported, folders: dict[str, Path], pairs: tuple[Preference, ...]
) -> None:
    """By hand, from plain transformers, for the expert whose rewards are cheapest."""
    scorer = load(imported.run)
    held_out = scorer.card["data"]["val_pairs"]
    assert sum(held_out.values()) == imported.num_held_out > 0
    by_name = {expert.name: expert for expert in imported.experts}
    every = [plain(folders["no.pad"], p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)]
    assert min(every) < by_name["no.pad"].mean < max(every)
    assert 0 < by_name["no.pad"].std < max(every) - min(every)


def test_a_large_bias_is_allowed_the_rounding_that_it_causes(imported: Imported) -> None:
    """An export of an expert whose rewards hardly differ has one, into which its zero and unit were folded."""
    scorer = load(imported.run)
    system: Any = scorer.system
    before = scorer.allowed(["types"])
    system.expert("types").foreign.model.classifier.bias.data.fill_(-1500.0)
    assert scorer.allowed(["types"]) == pytest.approx(1500 * RAW_TOLERANCE / float(system.standardizer("types").std))
    assert scorer.allowed(["types"]) > 10 * before


def test_one_expert_can_be_asked_alone(imported: Imported) -> None:
    scorer = load(imported.run)
    asked = scorer.score(TEXTS, expert="rlhf")
    told = scorer.score(TEXTS, explain=True)
    assert [one.reward for one in asked] == pytest.approx([one.expert_rewards["rlhf"] for one in told], abs=1e-5)


def test_a_reward_does_not_depend_on_its_batch_mates(imported: Imported) -> None:
    scorer = load(imported.run)
    together = raw(scorer, [*TEXTS, *TURNS])
    alone = [raw(scorer, [item])[0] for item in [*TEXTS, *TURNS]]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_conversations_that_the_router_cannot_tell_apart_are_two(imported: Imported, folders: dict[str, Path]) -> None:
    """The router's tokenizer knows neither sign; the experts' do."""
    items = [("Which?", "Ω"), ("Which?", "Ж")]
    first, second = raw(load(imported.run), items)
    assert first["factory"] != second["factory"]
    assert second["factory"] == pytest.approx(plain(folders["factory"], *items[1]), rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_the_run_opens_elsewhere_without_the_directories(
    imported: Imported, folders: dict[str, Path], tmp_path: Path
) -> None:
    """In a process of its own, from a copy, its sources out of sight, without a network."""
    shutil.copytree(imported.run, tmp_path / "copy")
    hidden = [(folder, folder.with_name(f"{folder.name}-hidden")) for folder in folders.values()]
    for folder, away in hidden:
        folder.rename(away)
    code = (
        "import json, sys, moreward; "
        "r = moreward.load(sys.argv[1]).score(json.loads(sys.argv[2]), explain=True); "
        "print(json.dumps([[x.reward, x.expert_rewards] for x in r]))"
    )
    try:
        items = [{"prompt": prompt, "response": response} for prompt, response in TURNS]
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "copy"), json.dumps(items)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        for folder, away in hidden:
            away.rename(folder)
    here = load(imported.run).score(TURNS, explain=True)
    for (reward, experts), one in zip(json.loads(done.stdout), here, strict=True):
        assert reward == pytest.approx(one.reward, abs=1e-6)
        assert experts == pytest.approx(one.expert_rewards, abs=1e-6)


@pytest.mark.slow
def test_every_command_takes_the_run(
    imported: Imported, make: Callable[..., Path], pairs: tuple[Preference, ...], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "test.jsonl", pairs[::5])
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in TEXTS), encoding="utf-8")
    run = str(imported.run)
    said = {}
    for words in (
        ["score", run, str(answers), "--out", str(tmp_path / "scored.jsonl"), "--explain"],
        ["eval", run, "--data", str(data), "--json"],
        ["compare", run, str(make("rodos")), "--data", str(data)],
        ["verify", run],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output, result.exception)
        said[words[0]] = result.output
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert set(scored[0]["expert_rewards"]) == {expert.name for expert in imported.experts}


def test_verify_finds_an_experts_tokenizer_that_was_changed(imported: Imported, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(imported.run, copy)
    assert verify_run(copy).holds
    tokenizer = next((copy / "model" / "strangers" / "factory").glob("tokenizer.json"))
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert not verify_run(copy).holds


def test_too_long_for_one_expert_is_told_with_its_name(imported: Imported) -> None:
    with pytest.raises(DataError, match=r"tokens too many for an expert \(.*no\.pad reads 128"):
        load(imported.run).score([("Why?", "because " * 200)])
    cut = load(imported.run).score([("Why?", "because " * 200)], on_long="truncate")[0]
    assert cut.truncated


def test_what_cannot_be_done_with_strangers_says_what_can(
    imported: Imported, pairs: tuple[Preference, ...], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", [replace(p, domain="new") for p in pairs])
    changed = CliRunner().invoke(app, ["extend", str(imported.run), "--domain", "new", "--data", str(data)])
    assert "moreward import" in str(changed.exception)
    with pytest.raises(ConfigError, match="single heads"):
        export_merged(load(imported.run), tmp_path / "out")
    trained = CliRunner().invoke(app, ["train", "recipe=strangers", f"data.train={data}", f"out={tmp_path / 'a'}"])
    assert "moreward import" in str(trained.exception)


# ---- the router ------------------------------------------------------------------------------------------------------


def wishes(subjects: Sequence[str]) -> list[Preference]:
    """Half of the prompts want a short answer and half a long one; no domain says which."""
    short, long = "It is {}.", "It is {}, and here is a longer answer that takes its time and explains every step."
    made = []
    for subject in subjects:
        for wish, better, worse in (("in a few words", short, long), ("every step with care", long, short)):
            made.append(
                Preference(
                    prompt=f"Please explain {wish}: {subject}.", chosen=better.format(subject),
                    rejected=worse.format(subject), id=f"{wish[:2]}-{subject}",
                )
            )  # fmt: skip
    return made


def test_the_router_learns_which_of_two_experts_is_right(tiny_backbone: Backbones, tmp_path: Path) -> None:
    """One loves long answers, one short ones; prompts say which is wanted, and no label does. On prompts that were
    never seen each alone is right about half of the pairs, by construction."""
    things = [f"{word} {thing}" for word in ("the", "a quick", "a short", "the longer") for thing in
              ("sky", "fox", "dog", "function", "answer", "capital", "request", "step", "user", "number")]  # fmt: skip
    made = import_models(
        {"long": planted(tmp_path / "long", 1.0), "short": planted(tmp_path / "short", -1.0)},
        str(write_pairs(tmp_path / "pairs.jsonl", wishes(things[:30]))),
        out=tmp_path / "run",
        router=str(tiny_backbone("bert")),
        settings={
            "data": {"max_length": 96},
            "train": {"epochs": 40, "batch_size": 16, "learning_rate": 0.05, "patience": 0},
            "pooling": "mean",
        },
    )
    long, short = made.experts
    assert long.accuracy + short.accuracy == pytest.approx(1.0)
    unseen = wishes(things[30:])
    scorer = load(made.run)
    evaluation = evaluate_run(scorer, unseen).evaluation
    assert evaluation.micro.num_pairs == 20
    assert evaluation.micro.accuracy >= 0.9
    for name in ("long", "short"):
        alone = scorer.score([(p.prompt, text) for p in unseen for text in (p.chosen, p.rejected)], expert=name)
        assert sum(c.number > j.number for c, j in zip(alone[::2], alone[1::2], strict=True)) == 10
    assert made.routed is not None
    assert made.routed > max(long.val_accuracy or 0.0, short.val_accuracy or 0.0)


@pytest.mark.slow
def test_a_server_gives_the_runs_rewards(imported: Imported, tmp_path: Path) -> None:
    with serving(imported.run, tmp_path / "log") as live, live.client() as client:
        items = [{"messages": [*prompt, *response]} for prompt, response in TURNS]
        reply = client.post("/v1/rewards", json={"items": items, "explain": True})
        alone = client.post("/v1/rewards", json={"items": items, "expert": "rlhf"})
    assert reply.status_code == alone.status_code == 200, reply.text
    here = load(imported.run).score(TURNS, explain=True)
    for told, by_one, one in zip(reply.json()["data"], alone.json()["data"], here, strict=True):
        assert told["score"] == pytest.approx(one.reward, abs=GOLDEN_TOLERANCE)
        assert told["expert_scores"] == pytest.approx(one.expert_rewards, abs=GOLDEN_TOLERANCE)
        assert by_one["score"] == pytest.approx(one.expert_rewards["rlhf"], abs=GOLDEN_TOLERANCE)


def verdict_loss(logits: list[list[float]], right: list[list[bool]]) -> Any:
    num = len(logits)
    batch = Batch(
        ids_NT=torch.zeros(2 * num, 1), mask_NT=torch.ones(2 * num, 1), prompt_ids_PT=torch.zeros(1, 1),
        prompt_mask_PT=torch.ones(1, 1), prompt_of_N=torch.zeros(2 * num), domain_N=torch.zeros(2 * num),
    )  # fmt: skip
    return CorrectnessLoss()(Verdict(logits_BE=torch.tensor(logits), right_BE=torch.tensor(right)), batch)


@given(st.lists(st.tuples(st.floats(-30, 30), st.booleans()), min_size=2, max_size=5))
def test_the_loss_is_the_log_of_the_right_experts_share(experts: list[tuple[float, bool]]) -> None:
    logits, right = [x for x, _ in experts], [r for _, r in experts]
    found = verdict_loss([logits], [right])
    share = torch.tensor(logits, dtype=torch.float64).softmax(0)[torch.tensor(right)].sum()
    wanted = 0.0 if all(right) or not any(right) else float(-share.log())
    assert float(found.loss_B) == pytest.approx(wanted, abs=1e-4, rel=1e-4)
    assert bool(found.right_B) == right[int(torch.tensor(logits).argmax())]


def test_pairs_that_tell_nothing_move_nothing() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    right = torch.tensor([[True, True, True], [False, False, False]])
    found = verdict_loss([[0.0] * 3] * 2, right.tolist())
    assert found.loss_B.tolist() == [0.0, 0.0]
    batch = Batch(
        ids_NT=torch.zeros(4, 1), mask_NT=torch.ones(4, 1), prompt_ids_PT=torch.zeros(1, 1),
        prompt_mask_PT=torch.ones(1, 1), prompt_of_N=torch.zeros(4), domain_N=torch.zeros(4),
    )  # fmt: skip
    CorrectnessLoss()(Verdict(logits_BE=logits, right_BE=right), batch).loss_B.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) == 0.0


# ---- what is refused -------------------------------------------------------------------------------------------------


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _two_labels(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = torch.cat([tensors["classifier.weight"]] * 2)
    tensors["classifier.bias"] = torch.cat([tensors["classifier.bias"]] * 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})


def _without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in names}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _no_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)


def _code(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n", encoding="utf-8")


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (_pickled, "no weights as safetensors: pytorch_model.bin may hold a pickle and is not opened"),
    "two-labels": (_two_labels, "has 2 labels (bad, good); a reward model has one"),
    "no-head": (
        _without("classifier.weight", "classifier.bias"),
        "lack classifier.bias, classifier.weight, which would",
    ),
    "no-pooler": (_without("bert.pooler.dense.weight"), "lack bert.pooler.dense.weight, which would be random"),
    "nan": (_nan, "weights are not finite: bert.encoder.layer.1.output.dense.weight"),
    "no-tokenizer": (_no_tokenizer, "no tokenizer in the directory"),
    "code": (_code, "asks for code of its own (auto_map), which is never run"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter alone; merge it"),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "x"}), "its weights are quantised"),
    "language-model": (lambda f: edit_config(f, architectures=["BertForMaskedLM"]), "has no reward head"),
    "empty": (lambda f: [file.unlink() for file in f.iterdir()], "no config.json"),
    "gone": (shutil.rmtree, "there is no such directory"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"x"), "cannot be loaded"),
    "unknown": (lambda f: edit_config(f, model_type="nobody-knows"), "no architecture that transformers has"),
}


@pytest.fixture
def good(tiny_backbone: Backbones, tmp_path: Path) -> Path:
    return classifier(tmp_path / "good", tiny_backbone("bert"))


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_directory_is_refused_with_its_fault(fault: str, good: Path) -> None:
    assert examine("good", good).kind == "classifier"
    spoil, said = BAD[fault]
    spoil(good)
    with pytest.raises(ConfigError) as caught:
        examine("spoilt", good)
    assert said in str(caught.value)
    assert all(line.startswith(f"spoilt: {good}: ") for line in caught.value.faults)
    assert not (good / "ran").exists()


def test_the_faults_of_all_directories_are_told_at_once(good: Path, tmp_path: Path) -> None:
    for name in ("nan", "no-tokenizer", "no-head"):
        shutil.copytree(good, tmp_path / name)
        BAD[name][0](tmp_path / name)
    folders = {name: tmp_path / name for name in ("good", "nan", "no-tokenizer", "no-head", "absent")}
    with pytest.raises(ConfigError) as caught:
        examine_all(folders)
    assert [line.split(":")[0] for line in caught.value.faults] == ["nan", "no-tokenizer", "no-head", "absent"]


def test_a_tokenizer_of_another_model_is_refused(good: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(good)
    tokenizer.add_tokens([f"word{i}" for i in range(50)])
    tokenizer.save_pretrained(good)
    with pytest.raises(ConfigError, match=r"token ids up to .* of another model"):
        examine("good", good)


def test_openrlhf_heads_that_cannot_be(tiny_backbone: Backbones, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"std in config\.json must be a positive number"):
        examine("x", by_openrlhf(tmp_path / "a", tiny_backbone("qwen3"), std=0.0))
    with pytest.raises(ConfigError, match=r"value_head\.weight"):
        examine("x", by_openrlhf(tmp_path / "b", tiny_backbone("qwen3"), value_head_prefix="value_head"))
    folder = with_value_head(tmp_path / "c", tiny_backbone("llama"))
    save_file({"v_head.summary.weight": torch.zeros(1, 7)}, folder / "value_head.safetensors")
    with pytest.raises(ConfigError, match=r"shape \(1, 7\)"):
        examine("x", folder)


def test_nothing_is_written_where_a_directory_is_bad(good: Path, pairs: tuple[Preference, ...], tmp_path: Path) -> None:
    _nan(good)
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    result = CliRunner().invoke(app, ["import", f"x={good}", "--pairs", str(data), "--out", str(tmp_path / "run")])
    assert "not finite" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_each_directory_is(folders: dict[str, Path]) -> None:
    words = [f"{name}={folder}" for name, folder in folders.items()]
    result = CliRunner().invoke(app, ["import", *words, "--dry-run"])
    assert result.exit_code == 0, result.exception
    for told in (
        "Qwen2ForSequenceClassification, classifier of one label",
        "LLaMA-Factory value head",
        "OpenRLHF reward model, head score",
        "OpenRLHF reward model, head value_head",
        "normalised by its makers: mean 0.25, standard deviation 3",
        "no pad token in its configuration: a safe one is used",
        "turns by its own chat template",
        "prompt and response as a pair of texts",
    ):
        assert told in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "'nothing' is not NAME=DIR"),
        (["a=x", "a=y", "--dry-run"], "'a' names two directories"),
        (["a=x"], "--pairs: is required"),
    ],
)
def test_the_command_line_is_checked(words: list[str], said: str) -> None:
    assert said in str(CliRunner().invoke(app, ["import", *words]).exception)


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="'Bad Name'"):
        look_at({"Bad Name": "x"})


def test_token_ids_mean_nothing_to_a_pool(imported: Imported) -> None:
    from moreward.types import Rendered

    scorer = load(imported.run)
    with pytest.raises(DataError, match="token ids mean other tokens"):
        scorer.encoder.conversation(Rendered(text=(1, 2, 3)))
    assert scorer.encoder.conversation(Conversation(prompt="a", response="b")).own_ids_E
