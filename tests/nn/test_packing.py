"""Streams: every token stands where its text says, once; prefixes are shared only where texts begin alike."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moreward.nn.packing import MIN_SHARED, pack

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)
stems = st.sampled_from([(), (7,) * MIN_SHARED, (8,) * 40, (8,) * 40 + (9,) * 30])
texts = st.tuples(stems, tokens).map(lambda pair: pair[0] + pair[1])
rows = st.lists(st.tuples(texts, st.integers(-1, 2)), min_size=1, max_size=12)


@given(rows, st.booleans(), st.sampled_from([None, 1, 4, 60]))
def test_every_row_reads_its_own_text_under_its_own_adapter(rows, share, active):
    texts, adapters = zip(*rows, strict=True)
    stream = pack(texts, adapters, share_prefixes=share, active_tokens=active)
    adapter_T = [segment.adapter for segment in stream.segments for _ in segment.tokens]
    for (text, adapter), leaf in zip(rows, stream.leaf_of_N, strict=True):
        segment = stream.leaf_segments[leaf]
        place = stream.places(segment)
        assert tuple(stream.ids_T[place].tolist()) == text == stream.text_of(segment)
        assert stream.position_T[place].tolist() == list(range(len(text)))
        num_active = len(text) if active is None else min(active, len(text))
        met = [adapter_T[t] for t in place]
        assert met == [-1] * (len(text) - num_active) + [adapter] * num_active
        assert place[-1] == stream.last_L[leaf]


@given(rows, st.booleans())
def test_an_adapters_tokens_and_leaves_are_one_slice_and_runs_cover_the_stream(rows, share):
    texts, adapters = zip(*rows, strict=True)
    stream = pack(texts, adapters, share_prefixes=share)
    assert [g.adapter for g in stream.groups] == sorted(set(adapters)) == [g.adapter for g in stream.leaf_groups]
    assert stream.groups[-1].stop == stream.num_tokens == len(stream.ids_T)
    assert stream.leaf_groups[-1].stop == len(stream.leaf_segments)
    for runs in (stream.runs, [run for group in stream.runs_of_groups for run in group]):
        assert runs[0].start == 0
        assert all(a.stop == b.start for a, b in zip(runs, [*runs[1:]], strict=False))
        assert runs[-1].stop == stream.num_tokens


@given(rows)
def test_without_sharing_there_is_one_segment_for_each_distinct_row(rows):
    texts, adapters = zip(*rows, strict=True)
    stream = pack(texts, adapters)
    assert len(stream.segments) == len(set(rows))
    assert not stream.branches


@given(rows, st.booleans(), st.booleans(), st.sampled_from([None, 1, 4, 60]))
def test_without_adapters_each_token_points_at_itself(rows, share, share_below, active):
    texts, adapters = zip(*rows, strict=True)
    stream = pack(texts, adapters, share_prefixes=share, active_tokens=active)
    lower, place_T = stream.without_adapters(share_prefixes=share_below)
    assert torch.equal(lower.ids_T[place_T], stream.ids_T)
    assert torch.equal(lower.position_T[place_T], stream.position_T)
    assert lower.num_tokens <= sum(len(text) for text in set(texts))


def test_a_prompt_stands_once_for_all_its_responses():
    prompt = tuple(range(100, 300))
    rows = [(*prompt, n, n + 1) for n in range(8)]
    stream = pack(rows, [0] * 8, share_prefixes=True)
    assert stream.num_tokens == len(prompt) + 16
    (branch,) = stream.branches
    assert (branch.prefix_stop - branch.prefix_start, branch.stop - branch.start) == (200, 16)


def test_a_template_that_all_prompts_begin_with_does_not_break_up_their_families():
    template = tuple(range(20))
    first, second = template + tuple(range(100, 200)), template + tuple(range(300, 400))
    rows = [p + (n,) * 3 for p in (first, second) for n in range(3)]
    stream = pack(rows, [0] * 6, share_prefixes=True)
    assert len(stream.branches) == 2
    assert stream.num_tokens == 2 * 120 + 6 * 3


def test_a_text_that_is_the_beginning_of_another_keeps_a_token_of_its_own():
    text = tuple(range(50))
    stream = pack([text, (*text, 1, 2)], [0, 0], share_prefixes=True)
    assert [len(s.tokens) for s in stream.segments] == [49, 1, 3]


def test_short_common_beginnings_and_other_adapters_are_not_shared():
    short = tuple(range(MIN_SHARED - 1))
    assert not pack([(*short, 1), (*short, 2)], [0, 0], share_prefixes=True).branches
    long = tuple(range(50))
    assert not pack([(*long, 1), (*long, 2)], [0, 1], share_prefixes=True).branches
