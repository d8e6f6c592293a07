"""pooling=spans: the response and the lower layers kept apart, in one vector of four and the length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moreward.config import RunConfig, resolve
from moreward.data.batches import Encoder, encode_pairs, pair_batch
from moreward.errors import BackboneError, ConfigError
from moreward.growth.change import extend
from moreward.nn.backbone import Backbone, last_span, load_tokenizer
from moreward.nn.features import FeatureScale
from moreward.runs import read_model
from moreward.systems.base_lora import Recipe
from moreward.train.merge import merge
from moreward.train.runner import read_pairs
from moreward.types import Conversation, Preference
from trained import card, trained, weights, write_pairs

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
    assert vector_ND.shape == (3, backbone.hidden_size) == (3, 4 * plain.hidden_size + 1)
    for n, num in enumerate(num_response):
        length = int(mask_NT[n].sum())
        alone = {"input_ids": ids_NT[n : n + 1, :length], "attention_mask": mask_NT[n : n + 1, :length]}
        states = plain.model(**alone, output_hidden_states=True).hidden_states
        response = slice(length - 1 - num, length - 1)
        means = [states[-1][0].mean(0), *(states[i][0, response].mean(0) for i in (-1, len(states) // 2, 0))]
        length_1 = torch.tensor([math.log(num)])
        torch.testing.assert_close(vector_ND[n], torch.cat([*means, length_1]), rtol=1e-4, atol=1e-5)


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


# ---- the scale


def scales(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in weights(run).items() if ".scale." in k}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny, pairs: Sequence[Preference]) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    return trained(folder, tiny_backbone, pairs, "arliss", "bert", "tune=frozen", "pooling=spans")


def test_heads_see_numbers_of_zero_mean_and_unit_variance_over_the_training_responses(run: Path) -> None:
    system, encoder, _ = read_model(run)
    backbone = system.backbones()[0]
    assert backbone.scale is not None
    learned = read_pairs(RunConfig.model_validate(card(run)["config"])).train
    batch = pair_batch(encode_pairs(encoder, learned, system.domains, on_long="error").pairs, encoder.pad_id)
    assert int(backbone.scale.num) == len(batch) == 2 * sum(card(run)["data"]["train_pairs"].values())
    with torch.no_grad():
        read_ND = backbone(batch.ids_NT, batch.mask_NT)
    torch.testing.assert_close(read_ND.mean(0), torch.zeros(backbone.hidden_size), atol=1e-3, rtol=0)
    torch.testing.assert_close(read_ND.std(0, correction=0), torch.ones(backbone.hidden_size), atol=1e-2, rtol=0)


def test_a_number_that_never_changes_keeps_its_unit() -> None:
    scale = FeatureScale(2)
    scale.fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert scale(torch.tensor([[2.0, 5.0], [3.0, 6.0]])).tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_an_extended_run_keeps_its_scale(run: Path, pairs: Sequence[Preference], tmp_path: Path) -> None:
    asking = [replace(p, prompt=f"A question! {p.prompt}", domain="asking", id=f"q-{i}") for i, p in enumerate(pairs)]
    data = write_pairs(tmp_path / "asking.jsonl", asking[:20])
    extension = extend(run, "asking", [str(data)], out=tmp_path / "extended")
    assert extension.golden_difference == 0
    old, new = scales(run), scales(extension.run)
    assert old
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_runs_scaled_by_other_pairs_are_not_averaged(
    run: Path, tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    other = trained(tmp_path, tiny_backbone, pairs[4:], "arliss", "bert", "tune=frozen", "pooling=spans", "seed=0")
    with pytest.raises(ConfigError, match="trained on other pairs"):
        merge([run, other], out=tmp_path / "merged")
