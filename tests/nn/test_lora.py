"""A bank of adapters against one adapter at a time, and against plain PEFT on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from moreward.errors import ConfigError
from moreward.nn.backbone import Backbone, linear_names
from moreward.nn.lora import LoRABank, parameter_key

KINDS = ("bert", "deberta-v2", "gpt2", "llama")
NAMES = ("a", "b", "c")
Get = Callable[[str], Path]
MakeBank = Callable[..., Backbone]

# peft asks transformers for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def make_bank(tiny_backbone: Get) -> MakeBank:
    """A backbone in evaluation mode with adapters whose B is not zero."""

    def make(
        kind: str, names: Sequence[str] = NAMES, *, seed: int = 0, filled: bool = True, **options: object
    ) -> Backbone:
        backbone = Backbone.load(str(tiny_backbone(kind)), pooling=str(options.pop("pooling", "auto")))
        told = {"rank": 4, "alpha": 8.0, "seed": seed, **options}
        bank = LoRABank(backbone, **told)  # type: ignore[arg-type]
        for name in names:
            bank.add(name)
            if filled:
                fill(bank, name)
        return backbone.eval()

    return make


@pytest.fixture(scope="module")
def banks(make_bank: MakeBank) -> dict[str, Backbone]:
    return {kind: make_bank(kind) for kind in KINDS}


@torch.no_grad()
def fill(bank: LoRABank, name: str, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for B in bank.adapters[name].B.values():
        B.copy_(torch.randn(B.shape, generator=generator) * size)


def tokens(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_NT = torch.randint(6, 90, (num_rows, 12), generator=generator)
    mask_NT = torch.ones_like(ids_NT)
    for row in range(num_rows):
        mask_NT[row, 12 - row % 5 :] = 0
    return ids_NT, mask_NT


def gradients(bank: LoRABank) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in bank.named_parameters()}
    bank.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(assigned=st.lists(st.integers(0, 2), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_mixed_rows_equal_one_adapter_at_a_time_gradients_included(
    kind: str, banks: dict[str, Backbone], assigned: list[int], seed: int
) -> None:
    backbone = banks[kind]
    bank = backbone.bank
    assert bank is not None
    adapter_N = torch.tensor(assigned)
    ids_NT, mask_NT = tokens(len(assigned), seed)
    direction_ND = torch.randn(len(assigned), 32, generator=torch.Generator().manual_seed(seed))
    together_ND = backbone(ids_NT, mask_NT, adapter_N)
    (together_ND * direction_ND).sum().backward()
    found = gradients(bank)
    alone = [backbone(ids_NT[n : n + 1], mask_NT[n : n + 1], adapter_N[n : n + 1]) for n in range(len(assigned))]
    (torch.cat(alone) * direction_ND).sum().backward()
    wanted = gradients(bank)
    torch.testing.assert_close(together_ND, torch.cat(alone), rtol=1e-5, atol=1e-5)
    for name in wanted:
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=name)
        assert bool(scale) == (int(name.split(".")[1] in [NAMES[a] for a in assigned]) == 1), name


def test_only_deberta_needs_rows_in_groups(banks: dict[str, Backbone]) -> None:
    assert {k: b.bank.mixes_rows for k, b in banks.items() if b.bank} == {k: k != "deberta-v2" for k in KINDS}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_equals_plain_peft_with_the_same_weights(kind: str, tiny_backbone: Get, make_bank: MakeBank) -> None:
    backbone = make_bank(kind, pooling="mean")
    bank = backbone.bank
    assert bank is not None
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_backbone(kind), num_labels=1).base_model
    if getattr(stock, "pooler", None) is not None:
        stock.pooler = None
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=linear_names(stock), fan_in_fan_out=kind == "gpt2", bias="none"
    )
    peft = get_peft_model(stock, config).eval()
    ids_NT, mask_NT = tokens(5)
    mask_NT[:] = 1
    outputs = []
    for index, name in enumerate(NAMES):
        for module in bank.shapes:
            layer = peft.base_model.model.get_submodule(module)
            layer.lora_A.default.weight.copy_(bank.adapters[name].A[parameter_key(module)])
            layer.lora_B.default.weight.copy_(bank.adapters[name].B[parameter_key(module)])
        outputs.append(peft(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state.mean(1))
        found = backbone(ids_NT, mask_NT, torch.full((5,), index))
        torch.testing.assert_close(found, outputs[-1], rtol=1e-5, atol=2e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01, "adapters that do nothing would agree too"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_is_the_base_model_to_the_bit(kind: str, make_bank: MakeBank) -> None:
    backbone = make_bank(kind, filled=False, dropout=0.5)
    ids_NT, mask_NT = tokens(4)
    assert torch.equal(backbone(ids_NT, mask_NT, torch.tensor([1, 1, 1, 1])), backbone(ids_NT, mask_NT))
    mixed = backbone(ids_NT, mask_NT, torch.tensor([0, 2, 1, 0]))
    torch.testing.assert_close(mixed, backbone(ids_NT, mask_NT), rtol=1e-6, atol=1e-6)


def test_names_and_start_values_do_not_depend_on_the_order_of_creation(make_bank: MakeBank) -> None:
    first = make_bank("bert", ("a", "b", "c"), filled=False).bank
    other = make_bank("bert", ("c", "a"), filled=False).bank
    assert first is not None
    assert other is not None
    one, two = first.state_dict(), other.state_dict()
    assert two.keys() == {k for k in one if not k.startswith("adapters.b.")}
    assert all(torch.equal(one[k], two[k]) for k in two)
    keys = [k for k in one if ".A." in k and k.startswith("adapters.a.")]
    assert not any(torch.equal(one[k], one[k.replace("adapters.a.", "adapters.b.")]) for k in keys)
    seeded = make_bank("bert", ("a",), seed=1, filled=False).bank
    assert seeded is not None
    assert not any(torch.equal(one[k], seeded.state_dict()[k]) for k in keys)


def test_a_name_stands_for_one_adapter_only(make_bank: MakeBank) -> None:
    bank = make_bank("bert", ("a",)).bank
    assert bank is not None
    with pytest.raises(ConfigError, match="'a' exists already"):
        bank.add("a")


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_training_one_adapter_leaves_the_others_and_the_backbone_bit_identical(kind: str, make_bank: MakeBank) -> None:
    """With an optimiser that holds everything, in batches that hold every adapter."""
    backbone = make_bank(kind).train()
    bank = backbone.bank
    assert bank is not None
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name.startswith("bank.adapters.b."))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
    for step in range(3):
        ids_NT, mask_NT = tokens(6, seed=step)
        backbone(ids_NT, mask_NT, torch.tensor([0, 1, 2, 1, 0, 1])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith("bank.adapters.b.")}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_then_b_then_a_gives_the_same_bits(kind: str, banks: dict[str, Backbone]) -> None:
    ids_NT, mask_NT = tokens(3)
    outputs = [banks[kind](ids_NT, mask_NT, torch.full((3,), e)) for e in (0, 1, 0)]
    base = banks[kind](ids_NT, mask_NT)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[0], base, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_no_adapter_is_left_on_after_a_batch_that_failed(kind: str, make_bank: MakeBank) -> None:
    """PEFT keeps its hooks after an exception in a mixed batch, and every later forward fails."""
    backbone = make_bank(kind)
    ids_NT, mask_NT = tokens(3)
    base, mixed = backbone(ids_NT, mask_NT), backbone(ids_NT, mask_NT, torch.tensor([0, 1, 2]))
    with pytest.raises(IndexError):
        backbone(ids_NT + 10_000, mask_NT, torch.tensor([0, 1, 2]))
    assert torch.equal(backbone(ids_NT, mask_NT), base)
    assert torch.equal(backbone(ids_NT, mask_NT, torch.tensor([0, 1, 2])), mixed)


@torch.no_grad()
def test_adapters_are_on_inside_their_context_only(make_bank: MakeBank) -> None:
    backbone = make_bank("roberta")
    ids_NT, mask_NT = tokens(3)
    base = backbone(ids_NT, mask_NT)
    bank = backbone.bank
    assert bank is not None
    with bank.using(torch.tensor([0, 0, 0]), torch.ones(3, 1)):
        outer = backbone(ids_NT, mask_NT)
        with pytest.raises(KeyError), bank.using(torch.tensor([1, 1, 1]), torch.ones(3, 1)):
            raise KeyError
        assert torch.equal(backbone(ids_NT, mask_NT), outer)
    assert torch.equal(backbone(ids_NT, mask_NT), base)
    assert not torch.equal(outer, base)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_adding_the_merged_product_to_the_weights_gives_the_same_output(kind: str, make_bank: MakeBank) -> None:
    backbone = make_bank(kind)
    bank = backbone.bank
    assert bank is not None
    ids_NT, mask_NT = tokens(4)
    wanted = backbone(ids_NT, mask_NT, torch.full((4,), 1))
    for name, (num_in, num_out) in bank.shapes.items():
        delta_OI = bank.merged_delta("b", name)
        assert delta_OI.shape == (num_out, num_in)
        weight = backbone.model.get_submodule(name).weight
        weight += delta_OI.T if backbone.writes_conv1d else delta_OI
    torch.testing.assert_close(backbone(ids_NT, mask_NT), wanted, rtol=1e-4, atol=1e-5)


def test_without_targets_every_linear_layer_has_an_adapter(banks: dict[str, Backbone]) -> None:
    for backbone in banks.values():
        assert backbone.bank is not None
        names = [n for n, m in backbone.model.named_modules() if isinstance(m, nn.Linear) or "Conv1D" in str(type(m))]
        assert list(backbone.bank.shapes) == names


def test_targets_are_suffixes_of_whole_names(make_bank: MakeBank) -> None:
    bank = make_bank("bert", targets=("query", "output.dense")).bank
    assert bank is not None
    ends = {n.split("encoder.layer.")[1] for n in bank.shapes}
    inside = ("attention.self.query", "attention.output.dense", "output.dense")
    assert ends == {f"{layer}.{name}" for layer in (0, 1) for name in inside}


@pytest.mark.parametrize("kind", KINDS)
def test_top_layers_keeps_the_upper_ones_and_stops_gradients_below(kind: str, make_bank: MakeBank) -> None:
    backbone = make_bank(kind, top_layers=1)
    backbone.family = None  # its own code, whose layers can be watched
    bank = backbone.bank
    assert bank is not None
    everything = make_bank(kind).bank
    assert everything is not None
    below = {n for n in everything.shapes if ".0." in n}
    assert below
    assert bank.shapes.keys() == everything.shapes.keys() - below
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name.startswith("bank."))
    with_graph: dict[str, bool] = {}
    for name in linear_names(backbone.model):
        backbone.model.get_submodule(name).register_forward_hook(
            lambda _m, _x, y, name=name: with_graph.update({name: y.requires_grad})
        )
    backbone(*tokens(2), torch.tensor([0, 1]))
    assert not any(with_graph[n] for n in below)
    assert any(with_graph[n] for n in bank.shapes)


def test_targets_and_layers_that_do_not_exist_are_refused_with_those_that_do(make_bank: MakeBank) -> None:
    with pytest.raises(ConfigError, match=r"\['q_proj', 'uery'\] match no linear layer.*dense, key, query, value"):
        make_bank("bert", targets=("query", "q_proj", "uery"))
    with pytest.raises(ConfigError, match=r"has 2 layers \(got 3\)"):
        make_bank("bert", top_layers=3)


def test_dropout_works_in_training_only(make_bank: MakeBank) -> None:
    backbone = make_bank("llama", dropout=0.5)
    rows = (*tokens(3), torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(backbone(*rows), backbone(*rows))
        backbone.train()
        assert not torch.equal(backbone(*rows), backbone(*rows))
