"""States of the shared trunk: computed once, the same bits when they come back, bounded, and checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moreward.nn.backbone import Backbone
from moreward.nn.lora import LoRABank
from moreward.nn.trunk import TrunkStore


@pytest.fixture(params=["bert", "deberta-v2", "llama"])
def backbone(request, tiny_backbone) -> Backbone:
    backbone = Backbone.load(str(tiny_backbone(request.param)))
    bank = LoRABank(backbone, rank=3, alpha=6, top_layers=1)
    for a in range(3):
        for matrix in bank.add(f"a{a}").B.values():
            nn.init.normal_(matrix, std=0.1)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name.startswith("bank."))
    return backbone


def rows(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids_NT = torch.randint(5, 60, (6, 30), generator=generator)
    mask_NT = (torch.arange(30)[None] < torch.tensor([30, 4, 17, 17, 25, 9])[:, None]).long()
    return ids_NT, mask_NT, torch.tensor([0, 1, 2, 0, 1, 2])


def gradients(backbone: Backbone):
    backbone.zero_grad()
    hidden_ND = backbone(*rows())
    (hidden_ND * torch.linspace(-1, 1, hidden_ND.numel()).view_as(hidden_ND)).sum().backward()
    return hidden_ND.detach(), {k: p.grad.clone() for k, p in backbone.named_parameters() if p.grad is not None}


def test_kept_states_change_neither_vectors_nor_gradients(backbone, tmp_path):
    backbone.eval()
    wanted, wanted_grads = gradients(backbone)
    backbone.trunk_store = TrunkStore(tmp_path)
    first, _ = gradients(backbone)
    found, grads = gradients(backbone)
    assert backbone.trunk_store.num_computed == 6
    assert torch.equal(first, found)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5)


def test_states_come_back_from_disk_bit_for_bit(backbone, tmp_path):
    backbone.eval()
    store = backbone.trunk_store = TrunkStore(tmp_path)
    before = backbone(*rows())
    store.save()
    again = backbone.trunk_store = TrunkStore(tmp_path)
    assert torch.equal(backbone(*rows()), before)
    assert again.num_computed == 0
    assert again.num_bytes == store.num_bytes > 0


def test_a_damaged_file_is_dropped_and_computed_again(backbone, tmp_path):
    backbone.eval()
    store = backbone.trunk_store = TrunkStore(tmp_path)
    before = backbone(*rows())
    store.save()
    (path,) = tmp_path.glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(bytes(raw))
    again = backbone.trunk_store = TrunkStore(tmp_path)
    assert not path.exists()
    assert torch.equal(backbone(*rows()), before)
    assert again.num_computed == 6


def test_what_does_not_fit_is_computed_whenever_it_is_needed(backbone, tmp_path, caplog):
    backbone.eval()
    store = backbone.trunk_store = TrunkStore(tmp_path, max_bytes=20 * backbone.hidden_size * 4)
    before = backbone(*rows())
    assert store.num_bytes <= 20 * backbone.hidden_size * 4
    assert "computed in every epoch" in caplog.text
    assert torch.equal(backbone(*rows()), before)
    assert store.num_computed > 6


def test_the_trunk_has_no_dropout_in_training_when_it_is_kept(backbone, tmp_path):
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    backbone.train()
    store = backbone.trunk_store = TrunkStore(tmp_path)
    backbone(*rows())
    assert backbone.training
    kept = {k: p.states_TD[p.start : p.stop].clone() for k, p in store._places.items()}
    fresh = backbone.eval().trunk_store = TrunkStore(tmp_path / "other")
    backbone(*rows())
    assert kept.keys() == fresh._places.keys()
    assert all(torch.equal(v, fresh._places[k].states_TD[fresh._places[k].start :][: len(v)]) for k, v in kept.items())


def test_a_disk_that_cannot_be_written_keeps_states_in_memory(backbone, tmp_path, caplog):
    backbone.eval()
    (tmp_path / "file").write_text("not a folder")
    store = backbone.trunk_store = TrunkStore(tmp_path / "file")
    before = backbone(*rows())
    store.save()
    assert "stays in memory" in caplog.text
    assert torch.equal(backbone(*rows()), before)


def test_reading_the_trunk_equals_the_models_own_layer(backbone):
    backbone.eval()
    ids_NT, mask_NT, _ = rows()
    family = backbone.family
    with torch.no_grad():
        packed = backbone.read_trunk(ids_NT, mask_NT)
        backbone.family = None
        own = backbone.read_trunk(ids_NT, mask_NT)
        backbone.family = family
    torch.testing.assert_close(packed, own, rtol=1e-4, atol=1e-5)
