"""The paper's models have the paper's sizes: exact counts on the meta device, and the printed figures (arXiv
2407.17546, tables 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from transformers import DebertaV2Config

from moreward.config import deviations, resolve
from moreward.nn.backbone import Backbone
from moreward.registry import find_recipe
from moreward.systems._base import System

DOMAINS = ("anthropic", "shp", "hellaswag", "dahoas", "oasst")
SHAPES = {"base": (768, 12, 12, 3072), "small": (768, 6, 12, 3072), "xsmall": (384, 12, 6, 1536)}
"""Hidden size, layers, heads, width of the feed-forward layer of DeBERTaV3."""

COUNTS = {
    "baseline": (184_422_913, 141_895_681, 70_830_337),
    "base_lora": (186_432_001, 142_909_441, 71_834_881),
    "more": (207_455_233, 164_928_001, 76_595_713),
    "rodos": (1_106_540_554, 851_377_162, 424_983_562),
    "arliss": (196_484_362, 147_985_162, 76_861_066),
}
PRINTED_MILLIONS = {
    "baseline": (185, 141, 70),
    "base_lora": (187, None, None),
    "more": (207, 164, 77),
    "rodos": (1110, 846, 420),
    "arliss": (197, 147, 76),
}
ONE_ADAPTER = {"base": (73, 2_009_088), "small": (37, 1_013_760), "xsmall": (73, 1_004_544)}
CASES = [(name, size) for name in COUNTS for size in SHAPES]


def deberta_v3(size: str) -> DebertaV2Config:
    hidden, layers, heads, width = SHAPES[size]
    return DebertaV2Config(
        vocab_size=128_100,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=width,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )


def paper_system(name: str, size: str, domains: Sequence[str] = DOMAINS) -> System:
    """A recipe as its paper preset sets it, without weights."""
    config = resolve({"recipe": name, "preset": "paper"})
    backbone = Backbone.from_config(deberta_v3(size), pooling=config.pooling)
    recipe = find_recipe(name)
    return recipe(recipe.Config.model_validate(config.system), backbone, domains)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_each_system_has_exactly_the_parameters_of_its_formula(name: str, size: str) -> None:
    assert paper_system(name, size).num_parameters() == COUNTS[name][list(SHAPES).index(size)]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_each_size_is_within_a_little_over_one_percent_of_the_printed_one(name: str, size: str) -> None:
    printed = PRINTED_MILLIONS[name][list(SHAPES).index(size)]
    if printed is None:
        pytest.skip("not printed in the paper")
    counted = COUNTS[name][list(SHAPES).index(size)] / 1e6
    assert abs(counted - printed) / printed <= 0.012


@pytest.mark.parametrize("size", SHAPES)
def test_one_adapter_has_the_parameters_that_its_modules_add_up_to(size: str) -> None:
    bank = paper_system("arliss", size).backbones()[0].bank
    assert bank is not None
    num_modules, num_parameters = ONE_ADAPTER[size]
    assert len(bank.shapes) == num_modules
    for adapter in bank.adapters.values():
        assert sum(p.numel() for p in adapter.parameters()) == num_parameters
    assert len(bank.adapters) == len(DOMAINS) + 1


@pytest.mark.parametrize("size", SHAPES)
def test_one_conversation_meets_one_expert_and_the_router(size: str) -> None:
    baseline = COUNTS["baseline"][list(SHAPES).index(size)]
    hidden, (_, adapter) = SHAPES[size][0], ONE_ADAPTER[size]
    router_head = 5 * (hidden + 1)
    assert paper_system("baseline", size).num_active_parameters() == baseline
    assert paper_system("rodos", size).num_active_parameters() == 2 * baseline - (hidden + 1) + router_head
    assert paper_system("arliss", size).num_active_parameters() == baseline + 2 * adapter + router_head
    unused = 3 * (8 * hidden * hidden + 5 * hidden)
    more = COUNTS["more"][list(SHAPES).index(size)]
    assert paper_system("more", size).num_active_parameters() == more - unused


@pytest.mark.parametrize("name", COUNTS)
def test_the_paper_preset_holds_what_the_paper_states(name: str) -> None:
    config = resolve({"recipe": name, "preset": "paper"})
    assert (config.train.learning_rate, config.train.batch_size, config.train.epochs) == (5.0e-6, 32, 3)
    assert config.data.max_length == 512
    assert deviations(config) == []
    if config.tune == "lora":
        assert (config.system["rank"], config.system["alpha"], config.system["dropout"]) == (12, 768.0, 0.1)


@pytest.mark.parametrize("name", COUNTS)
def test_what_differs_from_the_paper_is_named(name: str) -> None:
    config = resolve({"recipe": name, "preset": "paper", "train": {"learning_rate": 1e-4}, "pooling": "last"})
    paper_pooling: Any = find_recipe(name).presets["paper"]["pooling"]
    assert deviations(config) == [
        {"key": "pooling", "paper": paper_pooling, "used": "last"},
        {"key": "train.learning_rate", "paper": 5.0e-6, "used": 1e-4},
    ]
