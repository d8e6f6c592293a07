"""Attention of a whole stream in one call, with the kernel's place taken by what it is to compute; the kernel itself
stands in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moreward.nn import varlen
from moreward.nn.attention import attend, plainly
from moreward.nn.packing import MIN_SHARED, pack

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)
stems = st.sampled_from([(), (7,) * MIN_SHARED, (8,) * 40, (8,) * 40 + (9,) * 30])
texts = st.tuples(stems, tokens).map(lambda pair: pair[0] + pair[1])
rows = st.lists(st.tuples(texts, st.integers(-1, 2)), min_size=1, max_size=8)
HEADS, KEY_HEADS, SIZE, SCALE = 4, 2, 8, 0.3


def kernel(q, k, v, bias, cuts_q, cuts_k, max_q, max_k, dropout, sees, needs_lse, *, scale):
    """PyTorch's memory-efficient kernel, a segment at a time."""
    assert bias is None
    assert not dropout
    assert max_q == int(cuts_q.diff().max())
    assert max_k == int(cuts_k.diff().max())
    assert cuts_q.dtype == cuts_k.dtype == torch.int32
    outs = []
    for start, stop, begin, end in zip(cuts_q[:-1], cuts_q[1:], cuts_k[:-1], cuts_k[1:], strict=True):
        one_q, one_k, one_v = (x.transpose(1, 2) for x in (q[:, start:stop], k[:, begin:end], v[:, begin:end]))
        scores = one_q @ one_k.mT * scale
        if sees == varlen.CAUSAL:
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + (end - begin) - (stop - start))
            scores = scores.masked_fill(unseen, -torch.inf)
        outs.append((scores.softmax(-1) @ one_v).transpose(1, 2))
    none = torch.zeros(0)
    return torch.cat(outs, 1), none, none, none, max_q, max_k


def kernel_backward(
    dout, q, k, v, bias, out, cuts_q, cuts_k, max_q, max_k, lse, dropout, seed, offset, sees, _, **more
):
    assert more.pop("num_splits_key") == 1
    with torch.enable_grad():
        parts = [x.detach().requires_grad_() for x in (q, k, v)]
        found = kernel(*parts, bias, cuts_q, cuts_k, max_q, max_k, dropout, sees, True, **more)[0]
    return (*torch.autograd.grad(found, parts, dout), None)


@pytest.fixture(scope="module", autouse=True)
def _stand_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "FORWARD", kernel)
        patch.setattr(varlen, "BACKWARD", kernel_backward)
        yield


def inputs(stream):
    torch.manual_seed(0)
    shapes = [(stream.num_tokens, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def outputs(compute, stream):
    parts = inputs(stream)
    out_TD = compute(*parts)
    (out_TD * torch.linspace(-1, 1, out_TD.numel()).view_as(out_TD)).sum().backward()
    return [out_TD.detach(), *(part.grad for part in parts)]


@given(rows, st.booleans(), st.booleans(), st.sampled_from([None, 4]))
def test_it_is_the_attention_of_each_text_gradients_included(rows, causal, share, active):
    told, adapters = zip(*rows, strict=True)
    if not causal:
        share, active = False, None
    stream = pack(told, adapters, share_prefixes=share, active_tokens=active)
    found = outputs(lambda *x: varlen.attend_whole(*x, stream, scale=SCALE, causal=causal), stream)

    def plain(q, k, v):
        if stream.branches:
            return plainly(q, k, v, stream, scale=SCALE)
        return attend(q, k, v, stream, scale=SCALE, causal=causal)

    for mine, wanted in zip(found, outputs(plain, stream), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_under_autocast_all_three_have_its_precision():
    stream = pack([(5, 6, 7), (5, 6)], [-1, -1])
    q, k, v = inputs(stream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_TD = varlen.attend_whole(q, k.bfloat16(), v, stream, scale=SCALE, causal=False)
    assert out_TD.dtype == torch.bfloat16
    torch.testing.assert_close(out_TD.float(), attend(q, k, v, stream, scale=SCALE, causal=False), rtol=0.02, atol=0.02)


def test_the_cpu_keeps_its_own_kernels():
    assert not varlen.takes(torch.zeros(2, HEADS, SIZE), 0.0)


def test_plans_are_switched_off_for_cuda_only_and_back_on():
    if not torch.backends.cuda.cudnn_sdp_enabled():
        pytest.skip("cuDNN's attention is off already")
    with varlen.without_plans(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled()

    def broken():
        with varlen.without_plans(torch.device("cuda")):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert torch.backends.cuda.cudnn_sdp_enabled()
