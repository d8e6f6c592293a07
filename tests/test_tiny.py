"""The tiny models are what they claim to be: loadable, of their family, small and reproducible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from moreward.types import Preference
from tiny import DECODERS, ENCODERS, KINDS, MAX_POSITIONS, make_backbone, make_tokenizer

TEXT = "What is the capital of France?"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_loads_as_a_pretrained_model(kind: str, tiny_backbone: Callable[[str], Path]) -> None:
    folder = tiny_backbone(kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] or kind in ("bert", "roberta"), loading  # these two add a pooler of their own
    assert all("pooler" in key for key in loading["missing_keys"])
    assert model.config.model_type == kind
    assert model.config.hidden_size == 32
    assert len(tokenizer) <= 300
    ids_NT = tokenizer(" ".join([TEXT] * 40), truncation=True, return_tensors="pt")
    assert ids_NT["input_ids"].shape == (1, MAX_POSITIONS)
    assert torch.isfinite(model(**ids_NT).last_hidden_state).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_language_model(kind: str, tiny_backbone: Callable[[str], Path]) -> None:
    auto = AutoModelForCausalLM if kind in DECODERS else AutoModelForMaskedLM
    _, loading = auto.from_pretrained(tiny_backbone(kind), output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives_the_tokenizer(kind: str, tiny_backbone: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone(kind))
    back = tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True)
    assert "".join(back.split()).lower() == "".join(TEXT.split()).lower()


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_frame_the_text_with_cls_and_sep(kind: str, tiny_backbone: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone(kind))
    ids = tokenizer(TEXT)["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.unk_token_id not in ids


def test_decoders_differ_in_how_they_pad_and_talk(tiny_backbone: Callable[[str], Path]) -> None:
    gpt2, llama, qwen2 = (AutoTokenizer.from_pretrained(tiny_backbone(kind)) for kind in ("gpt2", "llama", "qwen2"))
    assert gpt2.pad_token is None
    assert gpt2.eos_token == "<|endoftext|>"
    assert llama.pad_token_id == llama.eos_token_id
    assert llama(TEXT)["input_ids"][0] == llama.bos_token_id
    assert qwen2.pad_token_id != qwen2.eos_token_id
    assert qwen2.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "<|im_start|>user\nhi<|im_end|>\n"
    )
    assert gpt2.chat_template is None


def test_the_seed_decides_the_weights_and_leaves_the_global_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    folders = [make_backbone(tmp_path / name, "bert", seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, same, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == same
    assert first != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_pairs_disagree_between_domains(pairs: Sequence[Preference]) -> None:
    assert Counter(pair.domain for pair in pairs) == {"short": 20, "long": 20}
    assert set(Counter(pair.prompt for pair in pairs).values()) == {2}
    assert len({pair.id for pair in pairs}) == 40
    for pair in pairs:
        assert (len(pair.chosen) < len(pair.rejected)) == (pair.domain == "short")


def test_the_session_runs_on_one_thread() -> None:
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_the_same_each_time(kind: str) -> None:
    one, two = (make_tokenizer(kind).backend_tokenizer.to_str() for _ in range(2))
    assert one == two
