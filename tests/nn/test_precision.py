"""What one precision or mode leaves behind must not be found by the next."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DebertaV2Config

from moreward.nn.backbone import Backbone
from moreward.nn.lora import LoRABank
from moreward.nn.merging import MergeFrom
from moreward.nn.trunk import TrunkStore

KINDS = ("bert", "deberta-v2", "qwen2")


def with_bank(backbone: Backbone, **options) -> Backbone:
    bank = LoRABank(backbone, rank=3, alpha=6, **options)
    for a in range(3):
        for matrix in bank.add(f"a{a}").B.values():
            nn.init.normal_(matrix, std=0.1)
    return backbone.eval()


def rows(length: int = 40):
    ids_NT = torch.randint(5, 40, (6, length), generator=torch.Generator().manual_seed(0))
    mask_NT = (torch.arange(length)[None] < torch.tensor([length, 4, 17, 17, 25, 9])[:, None]).long()
    return ids_NT, mask_NT, torch.tensor([0, 1, 2, 0, 1, 2])


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_run_under_autocast_with_and_without_gradients(kind, tiny_backbone):
    backbone = with_bank(Backbone.load(str(tiny_backbone(kind))))
    with torch.no_grad():
        wanted = backbone(*rows())
        with half():
            found = backbone(*rows())
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1)
    with half():
        backbone(*rows()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_what_autocast_computes_first_is_kept_in_full_precision(kind, tiny_backbone, tmp_path):
    backbone = with_bank(Backbone.load(str(tiny_backbone(kind))), top_layers=1)
    with torch.no_grad():
        wanted = backbone(*rows())
    other = with_bank(Backbone.load(str(tiny_backbone(kind))), top_layers=1)
    other.load_state_dict(backbone.state_dict())
    other.trunk_store = TrunkStore(tmp_path)
    with half():
        other(*rows()).sum().backward()
    with torch.no_grad(), half():
        other(*rows())
    with torch.no_grad():
        torch.testing.assert_close(other(*rows()), wanted, rtol=1e-5, atol=1e-5)
        other.trunk_store = None
        torch.testing.assert_close(other(*rows()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_in_training_mode_leaves_no_dropped_out_tables(kind, tiny_backbone):
    backbone = with_bank(Backbone.load(str(tiny_backbone(kind))), dropout=0.5)
    with torch.no_grad():
        wanted = backbone(*rows())
        backbone.kept = type(backbone.kept)()
        backbone.train()(*rows())
        torch.testing.assert_close(backbone.eval()(*rows()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "roberta"])
def test_minus_one_is_no_adapter(kind, tiny_backbone):
    backbone = with_bank(Backbone.load(str(tiny_backbone(kind))))
    ids_NT, mask_NT, _ = rows()
    with torch.no_grad():
        mixed = backbone(ids_NT, mask_NT, torch.tensor([-1, 0, -1, 1, -1, 2]))
        bare = backbone(ids_NT, mask_NT)
    torch.testing.assert_close(mixed[::2], bare[::2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[1::2], bare[1::2], atol=1e-3)


def test_a_projection_of_embeddings_is_below_all_layers():
    config = DebertaV2Config(
        vocab_size=50, hidden_size=16, embedding_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
    )  # fmt: skip
    backbone = with_bank(Backbone.from_config(config, device="cpu"), top_layers=1)
    assert not any("embed" in name for name in backbone.bank.shapes)
    assert any("pooler" in name for name in backbone.bank.shapes)


def test_one_more_adapter_changes_no_bit_of_the_others(tiny_backbone, monkeypatch):
    """The rows from which weights are merged must not follow the number of adapters: `extend` adds one."""
    backbone = with_bank(Backbone.load(str(tiny_backbone("bert"))))
    monkeypatch.setattr("moreward.nn.lora.merge_from", lambda sizes, *_: dict.fromkeys(sizes, MergeFrom(64, 100)))
    whole = sum(4 * i * o for i, o in backbone.bank.shapes.values())
    ids_NT, mask_NT, _ = rows(128)
    for memory in (whole * 3, whole * 50):
        backbone.kept.num_bytes = int(memory)
        with torch.no_grad():
            before = backbone(ids_NT, mask_NT, torch.tensor([0, 1, 2, 0, 1, 2]))
            backbone.bank.add(f"new at {memory}")
            assert torch.equal(backbone(ids_NT, mask_NT, torch.tensor([0, 1, 2, 0, 1, 2])), before)


class Casts(TorchDispatchMode):
    """Counts the numbers that change their type."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype and args[0].is_floating_point():
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("kind", [*KINDS, "llama"])
def test_a_forward_in_bf16_casts_no_weight(kind, tiny_backbone):
    backbone = with_bank(Backbone.load(str(tiny_backbone(kind))))
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with torch.no_grad():
        backbone(*rows())
        with Casts() as casts:
            hidden_ND = backbone(*rows())
    few = [size for size in casts.sizes if size > hidden_ND.numel()]
    # What is left: the RMS norms of decoders, which work in fp32 and belong to transformers, and rotary angles.
    assert len(few) <= (5 * 2 + 2 if kind in ("qwen2", "llama") else 0), casts.sizes
