"""On a CUDA device: the numbers are those of the CPU, of the plain computation, and of the run before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from moreward.nn import varlen
from moreward.nn.adapted import composed, with_adapters
from moreward.nn.attention import attend, plainly
from moreward.nn.backbone import Backbone
from moreward.nn.lora import LoRABank
from moreward.nn.packing import Group, pack
from moreward.scoring import Scorer, pick_device
from moreward.types import Conversation, Preference
from trained import given, trained, weights, write_pairs

pytestmark = pytest.mark.gpu

KINDS = ("bert", "deberta-v2", "llama", "qwen2", "qwen3")
RECIPES = (
    ("arliss", "bert"),
    ("arliss", "deberta-v2"),
    ("arliss", "qwen2"),
    ("arliss", "modernbert"),
    ("rodos", "bert"),
    ("base_lora", "llama"),
)
NUM_ADAPTERS = 4
WORDS = ("train.device=cuda", "data.max_length=128", "data.on_long=truncate")


@pytest.fixture(autouse=True)
def _plain_fp32() -> Iterator[None]:
    """TF32 off, and accelerate free to settle on the device again: it does so once in a process."""
    from accelerate.state import AcceleratorState

    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]
) -> Callable[[str, str], Path]:
    """`runs("arliss", "bert")`: trained on the GPU, so that loading it checks its golden rewards on the other."""
    return lambda recipe, kind: trained(tmp_path_factory.mktemp("runs"), tiny_backbone, pairs, recipe, kind, *WORDS)


def conversations(pairs: Sequence[Preference]) -> list[Conversation]:
    return [Conversation(prompt=p.prompt, response=r) for p in pairs for r in (p.chosen, p.rejected)]


def close(found: Tensor, wanted: Tensor, share: float = 1e-5) -> None:
    """Within a share of the largest number."""
    assert found.shape == wanted.shape
    error = float((found.cpu().double() - wanted.cpu().double()).abs().max())
    assert error <= share * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(("recipe", "kind"), RECIPES)
def test_rewards_and_routes_are_those_of_the_cpu(recipe, kind, runs, pairs):
    run = runs(recipe, kind)
    there, here = (Scorer.load(run, device=device) for device in ("cuda", "cpu"))
    items = conversations(pairs)
    found, wanted = there.score(items, explain=True), here.score(items, explain=True)
    assert [r.expert for r in found] == [r.expert for r in wanted]
    for mine, other in zip(found, wanted, strict=True):
        # The rounding of a raw reward, in units of the expert; relative, unless the reward is near zero.
        allowed = here.allowed(other.weights) / 10
        assert abs(mine.number - other.number) <= allowed * max(1.0, abs(other.number))
        assert mine.weights.keys() == other.weights.keys()
        for name, reward in other.expert_rewards.items():
            assert mine.expert_rewards[name] == pytest.approx(reward, rel=1e-5, abs=here.allowed([name]) / 10)


@pytest.mark.parametrize(("recipe", "kind"), RECIPES[:4])
def test_a_deterministic_reward_has_the_same_bits_in_any_company(recipe, kind, runs, pairs):
    scorer = Scorer.load(runs(recipe, kind), device="cuda", deterministic=True)
    items = conversations(pairs)[:12]
    together = [r.number for r in scorer.score(items)]
    assert together == [scorer.score([item])[0].number for item in items]
    assert together == [r.number for r in scorer.score(items[::-1])][::-1]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", ()),
        ("deberta-v2", ()),
        ("qwen2", ()),
        ("bert", ("train.dtype=bf16",)),
        ("qwen2", ("train.dtype=bf16",)),
        ("bert", ("train.dropout=true",)),
    ],
)
def test_training_repeats_to_the_bit(kind, words, tiny_backbone, pairs, tmp_path):
    from moreward.train.runner import train

    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    first, second = (
        weights(train(given("arliss", tiny_backbone(kind), data, tmp_path / name, *WORDS, *words)))
        for name in ("a", "b")
    )
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_trained_model_knows_where_it_was_trained(runs):
    from trained import card

    assert card(runs("arliss", "bert"))["machine"]["device"].startswith("cuda")


def test_a_device_by_number_is_taken_and_one_too_many_refused():
    from moreward.config import TrainConfig
    from moreward.errors import ConfigError
    from moreward.train.loop import make_accelerator

    assert pick_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"train\.device: 'cuda:64' is not there; use auto, cpu or cuda"):
        make_accelerator(TrainConfig(device="cuda:64"), "")
    assert make_accelerator(TrainConfig(device="cuda:0"), "").device.type == "cuda"
    with pytest.raises(ConfigError, match=r"train\.device: 'cpu' is asked for, but this process has trained on cuda"):
        make_accelerator(TrainConfig(device="cpu"), "")


@pytest.fixture(scope="module")
def backbones(tiny_backbone: Callable[[str], Path]) -> Callable[[str, str], Backbone]:
    return cache(lambda kind, pooling: adapted(tiny_backbone(kind), pooling))


def adapted(folder: Path, pooling: str) -> Backbone:
    """A backbone on the GPU with a bank of adapters that do something."""
    backbone = Backbone.load(str(folder), pooling=pooling).eval()
    bank = LoRABank(backbone, rank=3, alpha=6)
    torch.manual_seed(0)
    for a in range(NUM_ADAPTERS):
        for matrix in bank.add(f"a{a}").B.values():
            nn.init.normal_(matrix, std=0.1)
    return backbone.to("cuda")


def a_batch(more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of many lengths, some with one beginning, under all adapters and none."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length + more for length in (1, 2, 5, 17, 40, 40, 40, 63, 90, 90, 100, 100, 33, 64, 7, 8)]
    ids_NT = torch.randint(5, 200, (len(lengths), max(lengths)), generator=generator)
    ids_NT[4:12, :30] = ids_NT[4, :30]
    mask_NT = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    adapter_N = torch.arange(len(lengths)) % (NUM_ADAPTERS + 1) - 1
    return ids_NT.cuda(), mask_NT.cuda(), adapter_N.cuda()


def hidden_and_gradients(backbone: Backbone, *, packed: bool) -> dict[str, Tensor]:
    ids_NT, mask_NT, adapter_N = a_batch()
    family = backbone.family
    assert family is not None
    try:
        backbone.family = family if packed else None
        with torch.no_grad():
            told = {"without gradients": backbone(ids_NT, mask_NT, adapter_N)}
        backbone.zero_grad()
        hidden_ND = backbone(ids_NT, mask_NT, adapter_N)
        (hidden_ND * torch.linspace(-1, 1, hidden_ND.numel(), device="cuda").view_as(hidden_ND)).sum().backward()
    finally:
        backbone.family = family
    told["hidden"] = hidden_ND.detach()
    return told | {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["own", "mean"])
def test_packed_and_plain_agree_gradients_included(kind, pooling, backbones):
    if pooling == "own" and kind in ("llama", "qwen2", "qwen3"):
        pooling = "last"
    backbone = backbones(kind, pooling)
    found, wanted = (hidden_and_gradients(backbone, packed=packed) for packed in (True, False))
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) <= 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_fp32(kind, tiny_backbone):
    backbone = adapted(tiny_backbone(kind), "mean")
    with torch.no_grad():
        exact_ND = backbone(*a_batch())
        rough_ND = backbone.bfloat16()(*a_batch())
    close(rough_ND, exact_ND, 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_adapters_agree_with_the_plain_product_gradients_included(dtype):
    torch.manual_seed(0)
    groups = [Group(0, 0, 3), Group(2, 3, 90), Group(5, 100, 101), Group(7, 101, 230)]
    x, weight, bias = torch.randn(240, 48), torch.randn(64, 48) / 7, torch.randn(64)
    flat = [torch.randn(shape) / 5 for _ in groups for shape in ((4, 48), (64, 4))]

    def computed(how: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        parts = [t.detach().clone().to("cuda", dtype).requires_grad_() for t in (x, weight, bias, *flat)]
        pairs = list(zip(parts[3::2], parts[4::2], strict=True))
        y = how(parts[0], parts[0], parts[1], parts[2], 2.0, list(zip(groups, pairs, strict=True)))
        (y * torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y)).sum().backward()
        return [y.detach().float(), *(p.grad.float() for p in parts)]

    wanted = computed(composed, torch.float32)
    for mine, other in zip(computed(with_adapters, dtype), wanted, strict=True):
        close(mine, other, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 8), (3, 3, 64), (14, 2, 64), (2, 1, 128)])
def test_the_kernel_is_the_attention_of_each_text_and_repeats_to_the_bit(dtype, shares, causal, heads, key_heads, size):
    if shares and not causal:
        pytest.skip("only causal texts share")
    generator = torch.Generator().manual_seed(0)
    stem = tuple(range(200))
    texts = [
        stem[: 80 * (n % 3)] + tuple(torch.randint(300, 900, (length,), generator=generator).tolist())
        for n, length in enumerate([1, 3, 31, 32, 33, 64, 65, 127, 200, 300, 7, 7, 7])
    ]
    stream = pack(texts, [n % 2 for n in range(len(texts))], share_prefixes=shares, device="cuda")
    assert bool(stream.branches) == shares
    torch.manual_seed(0)
    shapes = [(stream.num_tokens, h, size) for h in (heads, key_heads, key_heads)]
    parts = [torch.randn(shape).to("cuda", dtype).requires_grad_() for shape in shapes]
    assert varlen.takes(parts[0], 0.0)
    slope = torch.linspace(-1, 1, stream.num_tokens * heads * size, device="cuda").view(stream.num_tokens, -1)

    def computed(how: Callable[..., Tensor], parts: list[Tensor]) -> list[Tensor]:
        out_TD = how(*parts)
        return [out_TD.detach(), *torch.autograd.grad((out_TD * slope).sum(), parts)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, stream, scale=0.2, causal=causal)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if causal:
            return plainly(q, k, v, stream, scale=0.2)
        starts = [*stream.starts, stream.num_tokens]
        spans = [slice(a, b) for a, b in pairwise(starts)]
        groups = heads // key_heads
        outs = []
        for here in spans:
            one_q, one_k, one_v = (x[here].transpose(0, 1) for x in (q, k, v))
            scores = one_q @ one_k.repeat_interleave(groups, 0).mT * 0.2
            outs.append((scores.softmax(-1) @ one_v.repeat_interleave(groups, 0)).transpose(0, 1))
        return torch.cat(outs).flatten(1)

    found = computed(ours, parts)
    wanted = computed(plain, [p.detach().double().requires_grad_() for p in parts])
    for mine, other in zip(found, wanted, strict=True):
        close(mine, other, 1e-5 if dtype == torch.float32 else 2e-2)
    for _ in range(3):
        again = computed(ours, parts)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def kernels(backbone: Backbone) -> list[str]:
    """The names of the kernels of one forward without gradients, of lengths not met before."""
    with torch.no_grad():
        backbone(*a_batch())
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            backbone(*a_batch(more=3))
            torch.cuda.synchronize()
    return [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("kind", ["bert", "qwen2"])
def test_bf16_takes_one_attention_kernel_a_layer_none_of_cudnn_and_no_more_kernels_than_fp32(kind, tiny_backbone):
    backbone = adapted(tiny_backbone(kind), "auto")
    whole = kernels(backbone)
    for parameter in backbone.parameters():
        parameter.data = parameter.data.bfloat16()
    half = kernels(backbone)
    assert backbone.family is not None
    for names in (whole, half):
        attention = [name for name in names if "fmha" in name or "attention" in name.lower()]
        assert len(attention) == backbone.family.num_layers, sorted(set(names))
        assert not [name for name in names if "cudnn" in name.lower()]
    assert len(half) <= len(whole) + 4  # results become fp32


def test_padded_architectures_compute_without_plans_of_cudnn_and_the_setting_is_as_before(tiny_backbone):
    backbone = Backbone.load(str(tiny_backbone("modernbert"))).eval().to("cuda").bfloat16()
    assert backbone.family is None
    before = torch.backends.cuda.cudnn_sdp_enabled()
    ids_NT, mask_NT, _ = a_batch()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as profiled:
        assert bool(torch.isfinite(backbone(ids_NT, mask_NT)).all())
        torch.cuda.synchronize()
    assert not [e.name for e in profiled.events() if "cudnn" in e.name.lower() and "sdpa" in e.name.lower()]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
