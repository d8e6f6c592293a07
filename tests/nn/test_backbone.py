"""A backbone against the stock Hugging Face classes: its weights, its poolings, its indifference to padding."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, BartConfig, T5Config
from transformers import BartForConditionalGeneration as Bart
from transformers import T5ForConditionalGeneration as T5

from moreward.errors import BackboneError
from moreward.nn.backbone import (
    Backbone,
    align_left,
    directory_sha256,
    last_linear_name,
    load_tokenizer,
    resolve_backbone,
)
from tiny import DECODERS, ENCODERS, KINDS, MAX_POSITIONS

LENGTHS = (3, 17, 9, 1)
Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def load_backbone(tiny_backbone: Get) -> Callable[..., Backbone]:
    """A backbone in evaluation mode, loaded once. Do not change it."""
    made: dict[tuple[str, str], Backbone] = {}

    def get(kind: str, pooling: str = "auto") -> Backbone:
        if (kind, pooling) not in made:
            made[kind, pooling] = Backbone.load(str(tiny_backbone(kind)), pooling=pooling).eval()
        return made[kind, pooling]

    return get


def texts_of(num_special: int = 6, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(num_special, 90, (n,), generator=generator).tolist() for n in lengths]


def padded(texts: Sequence[Sequence[int]], pad_id: int, side: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts)) + extra
    ids_NT = torch.full((len(texts), longest), pad_id)
    mask_NT = torch.zeros_like(ids_NT)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if side == "left" else slice(0, len(text))
        ids_NT[row, place] = torch.tensor(text)
        mask_NT[row, place] = 1
    return ids_NT, mask_NT


def one_by_one(backbone: Backbone, texts: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([backbone(*padded([text], 0, "right")) for text in texts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["own", "mean"])
def test_every_pretrained_tensor_is_the_one_in_the_file(
    kind: str, pooling: str, tiny_backbone: Get, load_backbone: Callable[..., Backbone]
) -> None:
    backbone = load_backbone(kind, pooling)
    stored = load_file(tiny_backbone(kind) / "model.safetensors")
    inside = backbone.base_prefix + "."
    own = backbone.model.state_dict()
    assert backbone.pretrained <= own.keys()
    for name in backbone.pretrained:
        assert torch.equal(own[name], stored[name] if name in stored else stored[inside + name]), name
    new = own.keys() - backbone.pretrained
    assert all("pooler" in n or "classifier" in n or "head" in n for n in new)
    fingerprint = backbone.fingerprint()
    name = fingerprint["tensor"]
    raw = (stored[name] if name in stored else stored[inside + name]).numpy().tobytes()
    assert hashlib.sha256(raw).hexdigest() == fingerprint["sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_without_weights_is_refused(kind: str, tiny_backbone: Get, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_backbone(kind), tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"empty' cannot be loaded.*model\.safetensors"):
        Backbone.load(str(folder))


def test_weights_that_end_too_early_are_refused(tiny_backbone: Get, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_backbone("bert"), tmp_path / "cut")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size // 2)
    with pytest.raises(BackboneError, match="cut' cannot be loaded"):
        Backbone.load(str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_another_models_configuration_is_refused(kind: str, tiny_backbone: Get, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_backbone(kind), tmp_path / "other")
    other = "bert" if kind in DECODERS else "llama"
    shutil.copy(tiny_backbone(other) / "config.json", folder / "config.json")
    with pytest.raises(BackboneError, match="other"):
        Backbone.load(str(folder))


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 3}, {"hidden_size": 64}, {"vocab_size": 999}], ids=lambda c: next(iter(c))
)
@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "llama"])
def test_weights_of_another_shape_are_refused(
    kind: str, change: dict[str, int], tiny_backbone: Get, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_backbone(kind), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "num_hidden_layers" in change:
        config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(BackboneError, match="other"):
        Backbone.load(str(folder))


def test_a_classifier_of_other_labels_loads_without_its_head(tiny_backbone: Get, tmp_path: Path) -> None:
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_backbone("bert"), num_labels=3)
    stock.save_pretrained(tmp_path / "three")
    backbone = Backbone.load(str(tmp_path / "three"), pooling="own")
    assert backbone.pretrained == backbone.model.state_dict().keys()
    assert torch.equal(backbone.model.bert.pooler.dense.weight, stock.bert.pooler.dense.weight)


@pytest.mark.parametrize(("config", "model"), [(T5Config, T5), (BartConfig, Bart)])
def test_an_encoder_decoder_is_refused_clearly(config: Any, model: Any, tiny_backbone: Get, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 60}
    if config is BartConfig:
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60}
    model(config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "both")
    with pytest.raises(BackboneError, match=r"both.*encoder-decoder"):
        Backbone.load(str(tmp_path / "both"))


def test_a_name_that_is_nowhere_and_a_pooling_that_does_not_exist_are_refused(tiny_backbone: Get) -> None:
    with pytest.raises(BackboneError, match="nowhere/at-all"):
        Backbone.load("nowhere/at-all")
    with pytest.raises(BackboneError, match="no tokenizer"):
        load_tokenizer("nowhere/at-all")
    with pytest.raises(BackboneError, match=r"'max'\. Known: auto, own, mean, first, last"):
        Backbone.load(str(tiny_backbone("bert")), pooling="max")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_new_at_load_is_the_same_in_two_loads_and_leaves_the_random_state_alone(
    kind: str, tiny_backbone: Get
) -> None:
    folder = str(tiny_backbone(kind))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = Backbone.load(folder, pooling="own").state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = Backbone.load(folder, pooling="own").state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["own", "mean", "first", "last"])
def test_padding_changes_nothing_whatever_its_side_and_token(
    kind: str, pooling: str, tiny_backbone: Get, load_backbone: Callable[..., Backbone]
) -> None:
    """With the pad token inside the texts too, and the text ending in eos, which some tokenizers pad with."""
    backbone = load_backbone(kind, pooling)
    tokenizer = load_tokenizer(str(tiny_backbone(kind)))
    pad = tokenizer.pad_token_id
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    texts = [[*text[:2], pad, *text[2:], end] for text in texts_of()]
    alone = one_by_one(backbone, texts)
    for token in (pad, end, 7):
        for side in ("left", "right"):
            for extra in (0, 5):
                found = backbone(*padded(texts, token, side, extra))
                torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_aligning_keeps_the_order_of_the_tokens_and_leaves_aligned_rows_alone() -> None:
    ids_NT = torch.tensor([[9, 1, 2, 3], [9, 9, 4, 5], [6, 7, 8, 1]])
    mask_NT = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    ids, mask = align_left(ids_NT, mask_NT)
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == [[1, 2, 3], [4, 5], [6, 7, 8, 1]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    again = align_left(ids, mask)
    assert again[0] is ids
    assert again[1] is mask


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_own_is_what_the_stock_classifier_feeds_to_its_last_layer(
    kind: str, tiny_backbone: Get, load_backbone: Callable[..., Backbone]
) -> None:
    torch.manual_seed(0)  # the stock class draws its new layers from the global generator
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_backbone(kind), num_labels=1).eval()
    seen: list[Tensor] = []
    stock.get_submodule(last_linear_name(stock)).register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    texts = texts_of()
    for text in texts:
        stock(input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long))
    wanted = torch.stack([x[0, -1] if x.dim() == 3 else x[0] for x in seen])
    torch.testing.assert_close(one_by_one(load_backbone(kind, "own"), texts), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_the_other_poolings_read_the_stock_hidden_states(
    kind: str, pooling: str, tiny_backbone: Get, load_backbone: Callable[..., Backbone]
) -> None:
    stock = AutoModel.from_pretrained(tiny_backbone(kind)).eval()
    take = {"mean": lambda h_TD: h_TD.mean(0), "first": lambda h_TD: h_TD[0], "last": lambda h_TD: h_TD[-1]}[pooling]
    texts = texts_of()
    wanted = torch.stack([take(stock(input_ids=torch.tensor([text])).last_hidden_state[0]) for text in texts])
    found = load_backbone(kind, pooling)(*padded(texts, 7, "left", 2))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_last_for_decoders_and_own_for_encoders(kind: str, load_backbone: Callable[..., Backbone]) -> None:
    backbone = load_backbone(kind)
    assert backbone.is_decoder == (kind in DECODERS)
    assert backbone.pooling == ("own" if kind in ENCODERS else "last")
    assert backbone.hidden_size == 32


def test_auto_is_mean_where_the_directory_is_a_sentence_transformer_that_says_so(
    tiny_backbone: Get, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_backbone("bert"), tmp_path / "st")
    (folder / "1_Pooling").mkdir()
    told = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
    assert Backbone.load(str(folder)).pooling == "mean"
    told = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
    assert Backbone.load(str(folder)).pooling == "own"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_tokens_fit_as_it_says(kind: str, load_backbone: Callable[..., Backbone]) -> None:
    backbone = load_backbone(kind)
    limit = backbone.max_positions
    assert limit == (None if kind == "deberta-v2" else MAX_POSITIONS)
    assert torch.isfinite(one_by_one(backbone, texts_of(lengths=[limit or MAX_POSITIONS + 50]))).all()
    if kind in ("bert", "roberta", "gpt2"):  # these have a table of positions; the others compute them
        with pytest.raises((IndexError, RuntimeError)):
            one_by_one(backbone, texts_of(lengths=[MAX_POSITIONS + 1]))


def test_the_hash_of_a_directory_tells_weights_tokenizer_and_configuration_apart(
    tiny_backbone: Get, tmp_path: Path
) -> None:
    original = directory_sha256(str(tiny_backbone("bert")))
    assert directory_sha256("owner/name-on-the-hub") == ""
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        folder = shutil.copytree(tiny_backbone("bert"), tmp_path / name)
        assert directory_sha256(str(folder)) == original
        with (folder / name).open("ab") as file:
            file.write(b" ")
        assert directory_sha256(str(folder)) != original


def test_directories_and_hub_names_stand_for_themselves() -> None:
    assert resolve_backbone("owner/name") == "owner/name"


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_without_a_tokenizer_is_refused(kind: str, tiny_backbone: Get, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_backbone(kind), tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BackboneError, match=r"bare': no tokenizer in the directory\. .* one of tokenizer\.json"):
        load_tokenizer(str(folder))


def test_a_vocabulary_without_a_word_is_refused(tiny_backbone: Get, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_backbone("bert"), tmp_path / "wordless")
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = whole["model"]["vocab"]
    whole["model"]["vocab"] = {token["content"]: vocab[token["content"]] for token in whole["added_tokens"]}
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(BackboneError, match=r"the tokenizer has 5 tokens, all of them special"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_always_has_a_token(kind: str, tiny_backbone: Get) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone(kind)))
    assert isinstance(tokenizer.pad_token_id, int)
