"""pooling=spans: the response and the lower layers kept apart, in one vector of four."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moreward.config import resolve
from moreward.data.batches import Encoder
from moreward.errors import BackboneError, ConfigError
from moreward.nn.backbone import Backbone, last_span, load_tokenizer
from moreward.systems.base_lora import Recipe
from moreward.types import Conversation

Tiny = Callable[[str], Path]


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ((2, 7, 8, 3, 9, 10, 3), (9, 10)),  # [CLS] prompt [SEP] response [SEP]
        ((2, 7, 8, 3), (7, 8)),  # a prompt alone
        ((0, 7, 2, 2, 9, 2), (9,)),  # RoBERTa's two separators
        ((2, 7, 3, 3), (3,)),  # an empty response is its ending
        ((5,), (5,)),
    ],
)
def test_the_last_span_is_what_stands_between_the_last_two_endings(
    tokens: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    assert tokens[last_span(tokens)] == kept


def rows(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Three pairs of texts, padded, and how many tokens each response has."""
    encoder = Encoder(load_tokenizer(str(folder)), 96)
    texts = [("What is the sea?", "It is calm."), ("A short one", "A longer answer that takes its time."), ("x", "No.")]
    encoded = [encoder.conversation(Conversation(prompt=p, response=r)).ids for p, r in texts]
    longest = max(map(len, encoded))
    ids_NT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in encoded])
    mask_NT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded])
    return ids_NT, mask_NT, [len(encoder.tokenizer(r, add_special_tokens=False)["input_ids"]) for _, r in texts]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_four_means_are_those_of_the_models_own_hidden_states(kind: str, tiny_backbone: Tiny) -> None:
    backbone = Backbone.load(str(tiny_backbone(kind)), pooling="spans").eval()
    plain = Backbone.load(str(tiny_backbone(kind)), pooling="mean").eval()
    ids_NT, mask_NT, num_response = rows(tiny_backbone(kind))
    vector_ND = backbone(ids_NT, mask_NT)
    assert vector_ND.shape == (3, backbone.hidden_size) == (3, 4 * plain.hidden_size)
    for n, num in enumerate(num_response):
        length = int(mask_NT[n].sum())
        alone = {"input_ids": ids_NT[n : n + 1, :length], "attention_mask": mask_NT[n : n + 1, :length]}
        states = plain.model(**alone, output_hidden_states=True).hidden_states
        response = slice(length - 1 - num, length - 1)
        means = [states[-1][0].mean(0), *(states[i][0, response].mean(0) for i in (-1, len(states) // 2, 0))]
        torch.testing.assert_close(vector_ND[n], torch.cat(means), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_and_padded_agree(tiny_backbone: Tiny) -> None:
    backbone = Backbone.load(str(tiny_backbone("bert")), pooling="spans").eval()
    ids_NT, mask_NT, _ = rows(tiny_backbone("bert"))
    packed_ND = backbone(ids_NT, mask_NT)
    backbone.family = None
    torch.testing.assert_close(packed_ND, backbone(ids_NT, mask_NT), rtol=1e-4, atol=1e-5)


def test_it_is_refused_where_it_has_no_meaning(tiny_backbone: Tiny) -> None:
    with pytest.raises(BackboneError, match="'spans' is for encoders"):
        Backbone.load(str(tiny_backbone("llama")), pooling="spans")
    config = resolve({"recipe": "base_lora", "backbone": "x", "out": "y", "pooling": "spans", "tune": "lora"})
    backbone = Backbone.load(str(tiny_backbone("bert")), pooling=config.pooling)
    with pytest.raises(ConfigError, match="read from a frozen backbone"):
        Recipe(Recipe.Config(**config.system), backbone, ["a"])
