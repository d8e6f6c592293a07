"""From how many rows on merged weights are used, and that it is measured, kept, and only a matter of speed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moreward.nn import merging
from moreward.nn.merging import GRID, MergeFrom, decide, merge_from

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_measurements(monkeypatch, tmp_path):
    monkeypatch.setenv("MOREWARD_CACHE", str(tmp_path))


@given(
    slowness=st.lists(st.floats(1, 9), min_size=4, max_size=4),
    delta=st.floats(0.01, 2),
    merge=st.floats(0, 5000),
)
def test_from_the_number_decided_on_no_merged_product_is_slower(slowness, delta, merge):
    """Against the plain sums: unmerged, a row costs 1 + delta; merged, `slowness` times a row's product."""
    own = {rows: rows * slow for rows, slow in zip(GRID, slowness, strict=False)}
    found = decide(own, 1.0, delta, merge)
    for rows, alone in own.items():
        if rows >= found.kept:
            assert alone <= rows * (1 + delta)
    below = [rows for rows in own if rows < found.kept]
    assert not below or own[max(below)] > max(below) * (1 + delta)
    assert found.anew >= found.kept
    assert found.anew * delta >= merge or found.anew == found.kept


def test_it_is_measured_once_and_read_back_by_every_later_process(monkeypatch):
    asked = []
    monkeypatch.setattr(merging, "_measured", lambda *key: asked.append(key) or MergeFrom(32, 300))
    assert merge_from({(8, 4), (4, 8)}, 2, CPU) == {(8, 4): MergeFrom(32, 300), (4, 8): MergeFrom(32, 300)}
    assert sorted(asked) == [(4, 8, 2), (8, 4, 2)]
    assert merge_from({(8, 4)}, 2, CPU) == {(8, 4): MergeFrom(32, 300)}
    merge_from({(8, 4)}, 3, CPU)
    assert asked[2:] == [(8, 4, 3)]


def test_a_real_measurement_is_of_the_grid():
    (found,) = merge_from({(64, 48)}, 4, CPU).values()
    assert found.kept in GRID
    assert found.anew >= found.kept


def test_without_a_cpu_to_measure_the_operations_are_counted(monkeypatch):
    monkeypatch.setattr(merging, "_measured", lambda *key: pytest.fail("measured"))
    counted = {(384, 1536): MergeFrom(64, 614)}
    assert merge_from({(384, 1536)}, 12, torch.device("cuda")) == counted
    monkeypatch.setenv("MOREWARD_LINEAR", "plain")
    assert merge_from({(384, 1536)}, 12, CPU) == counted
