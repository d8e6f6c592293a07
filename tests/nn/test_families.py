"""Packed computation against each architecture's own code: hidden vectors and every gradient."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DebertaV2Config, LlamaConfig, MistralConfig, Qwen2Config

from moreward.errors import ConfigError
from moreward.nn import adapted, attention
from moreward.nn.adapted import Kept
from moreward.nn.backbone import Backbone
from moreward.nn.families import deberta_v2
from moreward.nn.lora import LoRABank

PACKED = ("bert", "deberta-v2", "llama", "qwen2", "qwen3")
NUM_ADAPTERS = 3
cases = st.lists(st.tuples(st.integers(1, 50), st.integers(0, NUM_ADAPTERS - 1), st.booleans()), min_size=1, max_size=8)


def make(folder, pooling: str, top_layers: int | None = None, active_tokens: int | None = None) -> Backbone:
    """A backbone with a bank of adapters that do something."""
    backbone = Backbone.load(str(folder), pooling=pooling).eval()
    bank = LoRABank(backbone, rank=3, alpha=6, top_layers=top_layers, active_tokens=active_tokens)
    for a in range(NUM_ADAPTERS):
        for matrix in bank.add(f"a{a}").B.values():
            nn.init.normal_(matrix, std=0.1)
    return backbone


@pytest.fixture(scope="module")
def backbones(tiny_backbone):
    """Each family under each pooling, made once; its weights stay as they are."""
    return cache(lambda kind, *told: make(tiny_backbone(kind), *told))


def batch_of(cases, vocab: int, seed: int):
    """Rows of the drawn lengths; those whose flag is set begin alike."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(length for length, _, _ in cases)
    ids_NT = torch.randint(5, vocab, (len(cases), longest), generator=generator)
    stem_T = torch.randint(5, vocab, (longest,), generator=generator)
    mask_NT = torch.zeros_like(ids_NT)
    for n, (length, _, alike) in enumerate(cases):
        mask_NT[n, :length] = 1
        if alike:
            ids_NT[n, : length * 3 // 4] = stem_T[: length * 3 // 4]
    return ids_NT, mask_NT, torch.tensor([adapter for _, adapter, _ in cases])


def run(backbone: Backbone, ids_NT, mask_NT, adapter_N, *, packed: bool):
    """Hidden vectors without gradients, with gradients, and the gradient of every parameter."""
    family = backbone.family
    assert family is not None
    try:
        if not packed:
            backbone.family = None
        with torch.no_grad():
            plain_ND = backbone(ids_NT, mask_NT, adapter_N)
        backbone.zero_grad()
        hidden_ND = backbone(ids_NT, mask_NT, adapter_N)
        weights = torch.linspace(-1, 1, hidden_ND.numel()).view_as(hidden_ND)
        (hidden_ND * weights).sum().backward()
    finally:
        backbone.family = family
    grads = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    return plain_ND, hidden_ND.detach(), grads


def assert_equal(ours, theirs):
    for mine, wanted in zip(ours[:2], theirs[:2], strict=True):
        assert float((mine - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    largest = max(float(g.abs().max()) for g in theirs[2].values())
    assert ours[2].keys() == theirs[2].keys()
    for name, wanted in theirs[2].items():
        assert float((ours[2][name] - wanted).abs().max()) <= 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize("pooling", ["own", "mean", "first", "last"])
@pytest.mark.parametrize("kind", PACKED)
@settings(max_examples=6)
@given(cases=cases, seed=st.integers(0, 99), adapted=st.booleans())
def test_packed_equals_the_models_own_code_gradients_included(backbones, kind, pooling, cases, seed, adapted):
    backbone = backbones(kind, pooling)
    ids_NT, mask_NT, adapter_N = batch_of(cases, backbone.config.vocab_size, seed)
    told = (ids_NT, mask_NT, adapter_N if adapted else None)
    assert_equal(run(backbone, *told, packed=True), run(backbone, *told, packed=False))


@settings(max_examples=20)
@given(cases=cases, seed=st.integers(0, 99), adapted=st.booleans())
def test_debertas_segments_padded_for_a_gpu_equal_its_own_code_gradients_included(backbones, cases, seed, adapted):
    backbone = backbones("deberta-v2", "own")
    ids_NT, mask_NT, adapter_N = batch_of(cases, backbone.config.vocab_size, seed)
    told = (ids_NT, mask_NT, adapter_N if adapted else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deberta_v2, "pads", lambda q_THd: True)
        patch.setitem(deberta_v2.BLOCK, "cpu", 512)
        padded = run(backbone, *told, packed=True)
    assert_equal(padded, run(backbone, *told, packed=False))


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "qwen2"])
@pytest.mark.parametrize("columns", [6, 128])
@settings(max_examples=8)
@given(cases=cases, seed=st.integers(0, 99), bare=st.booleans())
def test_adapters_stacked_for_a_gpu_equal_adapters_one_by_one(backbones, kind, columns, cases, seed, bare):
    backbone = backbones(kind, "own")
    ids_NT, mask_NT, adapter_N = batch_of(cases, backbone.config.vocab_size, seed)
    adapter_N[0] = -1 if bare else adapter_N[0]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        alone_ND = backbone(ids_NT, mask_NT, adapter_N)
        patch.setattr(adapted, "stacks", lambda x: True)
        patch.setattr(adapted, "STACKED", columns)
        stacked_ND = backbone(ids_NT, mask_NT, adapter_N)
    torch.testing.assert_close(stacked_ND, alone_ND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PACKED)
@settings(max_examples=8)
@given(cases=cases, seed=st.integers(0, 99))
def test_a_shared_trunk_changes_nothing(backbones, kind, cases, seed):
    backbone = backbones(kind, "own", 1)
    ids_NT, mask_NT, adapter_N = batch_of(cases, backbone.config.vocab_size, seed)
    # Every text under every adapter: the case that the trunk is for.
    ids_NT, mask_NT = ids_NT.repeat(2, 1), mask_NT.repeat(2, 1)
    adapter_N = torch.cat([adapter_N, (adapter_N + 1) % NUM_ADAPTERS])
    told = (ids_NT, mask_NT, adapter_N)
    assert_equal(run(backbone, *told, packed=True), run(backbone, *told, packed=False))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("active", [1, 7, 60])
@settings(max_examples=6)
@given(cases=cases, seed=st.integers(0, 99))
def test_activated_adapters_equal_adapters_that_are_masked_before_the_last_tokens(backbones, kind, active, cases, seed):
    backbone = backbones(kind, "own", None, active)
    ids_NT, mask_NT, adapter_N = batch_of(cases, backbone.config.vocab_size, seed)
    told = (ids_NT.repeat(2, 1), mask_NT.repeat(2, 1), torch.cat([adapter_N, (adapter_N + 1) % NUM_ADAPTERS]))
    assert_equal(run(backbone, *told, packed=True), run(backbone, *told, packed=False))


def test_what_stands_before_the_active_tokens_is_computed_once_for_all_adapters(backbones, monkeypatch):
    backbone = backbones("llama", "own", None, 5)
    sizes: list[int] = []
    layer = backbone.family.layer
    monkeypatch.setattr(
        backbone.family, "layer", lambda i, x_TD, *rest: sizes.append(len(x_TD)) or layer(i, x_TD, *rest)
    )
    ids_NT = torch.randint(5, 60, (1, 40)).repeat(3, 1)
    with torch.no_grad():
        backbone(ids_NT, torch.ones_like(ids_NT), torch.arange(3))
    assert set(sizes) == {35 + 3 * 5}


def test_activated_adapters_need_a_decoder(tiny_backbone):
    with pytest.raises(ConfigError, match="needs a decoder"):
        make(tiny_backbone("bert"), "own", None, 5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@settings(max_examples=6)
@given(cases=cases, seed=st.integers(0, 99), active=st.sampled_from([None, 9]))
def test_shared_prefixes_equal_attention_written_plainly(backbones, kind, cases, seed, active):
    """The plain form is what runs on other devices and with dropout."""
    backbone = backbones(kind, "own", None, active)
    ids_NT, mask_NT, adapter_N = batch_of(cases, backbone.config.vocab_size, seed)
    fast = run(backbone, ids_NT, mask_NT, adapter_N, packed=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention._Tree, "apply", lambda q, k, v, stream, scale: attention.plainly(
            q, k, v, stream, scale=scale).unflatten(1, q.shape[1:]))  # fmt: skip
        assert_equal(fast, run(backbone, ids_NT, mask_NT, adapter_N, packed=True))


@pytest.mark.parametrize("kind", PACKED)
def test_the_trunk_is_computed_once_for_each_text(backbones, kind, monkeypatch):
    backbone = backbones(kind, "own", 1)
    seen: list[tuple[int, int]] = []
    layer = backbone.family.layer

    def counted(i, x_TD, *rest):
        seen.append((i, len(x_TD)))
        return layer(i, x_TD, *rest)

    monkeypatch.setattr(backbone.family, "layer", counted)
    ids_NT = torch.randint(5, 40, (1, 12)).repeat(3, 1)
    with torch.no_grad():
        backbone(ids_NT, torch.ones_like(ids_NT), torch.arange(3))
    last = backbone.family.num_layers - 1
    assert dict(seen) == {**dict.fromkeys(range(last), 12), last: 36}


@pytest.mark.parametrize("kind", PACKED)
def test_merged_weights_give_what_unmerged_adapters_give(backbones, kind, monkeypatch):
    backbone = backbones(kind, "own")
    ids_NT, mask_NT, adapter_N = batch_of([(40, a % 3, False) for a in range(9)], backbone.config.vocab_size, 1)
    with torch.no_grad():
        monkeypatch.setattr(backbone.bank, "merge_from", lambda num_bytes: dict.fromkeys(backbone.bank.shapes, 1))
        merged = backbone(ids_NT, mask_NT, adapter_N)
        monkeypatch.setattr(backbone.bank, "merge_from", lambda num_bytes: dict.fromkeys(backbone.bank.shapes, 10**9))
        unmerged = backbone(ids_NT, mask_NT, adapter_N)
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_kept_is_computed_anew_when_weights_change(tiny_backbone, kind, monkeypatch):
    """Merged weights and position tables outlive a forward, but not a step of training."""
    backbone = make(tiny_backbone(kind), "own")
    monkeypatch.setattr(backbone.bank, "merge_from", lambda num_bytes: dict.fromkeys(backbone.bank.shapes, 1))
    ids_NT, mask_NT, adapter_N = batch_of([(30, a % 3, False) for a in range(6)], backbone.config.vocab_size, 2)
    with torch.no_grad():
        before = backbone(ids_NT, mask_NT, adapter_N)
        for parameter in backbone.parameters():
            parameter.mul_(1.05)
        after = backbone(ids_NT, mask_NT, adapter_N)
        backbone.kept = Kept()
        fresh = backbone(ids_NT, mask_NT, adapter_N)
    assert torch.equal(after, fresh)
    assert not torch.allclose(before, after, atol=1e-4)


def test_kept_tensors_stay_within_their_memory_and_the_oldest_go_first():
    kept = Kept(num_bytes=3 * 40)
    made: list[str] = []

    def make(name):
        return lambda: made.append(name) or torch.zeros(10)

    for name in ("a", "b", "c", "a", "d", "a", "b"):
        kept.get(name, [], make(name))
    assert made == ["a", "b", "c", "d", "b"]
    assert kept.used == 3 * 40


@pytest.mark.parametrize("kind", PACKED)
def test_dropout_is_drawn_and_off_again_in_evaluation(tiny_backbone, kind):
    backbone = Backbone.load(str(tiny_backbone(kind)))
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    ids_NT = torch.randint(5, 40, (2, 12))
    mask_NT = torch.ones_like(ids_NT)
    backbone.train()
    assert not torch.equal(backbone(ids_NT, mask_NT), backbone(ids_NT, mask_NT))
    backbone.eval()
    assert torch.equal(backbone(ids_NT, mask_NT), backbone(ids_NT, mask_NT))


@pytest.mark.parametrize(
    ("buckets", "most", "length"), [(16, 64, 90), (-1, 24, 40), (8, -1, 70), (256, -1, 12)], ids=str
)
def test_debertas_distances_equal_its_own_beyond_every_bucket(buckets, most, length):
    config = DebertaV2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=buckets,
        max_relative_positions=most, norm_rel_ebd="layer_norm", position_biased_input=False,
        max_position_embeddings=512, type_vocab_size=0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = Backbone.from_config(config, device="cpu").eval()
    ids_NT = torch.randint(5, 50, (2, length))
    mask_NT = torch.ones_like(ids_NT)
    mask_NT[1, length // 2 :] = 0
    told = (ids_NT, mask_NT, None)
    assert_equal(run(backbone, *told, packed=True), run(backbone, *told, packed=False))


def test_what_a_family_leaves_out_runs_on_the_models_own_code():
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 16, "pad_token_id": 0}  # fmt: skip
    odd = [
        MistralConfig(**small, num_key_value_heads=2, sliding_window=8),
        Qwen2Config(**small, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        LlamaConfig(**small, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        DebertaV2Config(**small, relative_attention=True, pos_att_type=["c2p"], share_att_key=True),
        DebertaV2Config(**small, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
                        conv_kernel_size=3),
        DebertaV2Config(**small, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=False),
    ]  # fmt: skip
    assert all(Backbone.from_config(config, device="cpu").family is None for config in odd)


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "modernbert"])
def test_other_architectures_run_on_their_own_code(tiny_backbone, kind):
    assert Backbone.load(str(tiny_backbone(kind))).family is None
