"""Kept features: the same bits whatever was computed together, before, or in another run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from moreward.data.batches import Encoded, conversation_batch
from moreward.nn.backbone import Backbone
from moreward.nn.features import ROWS, STEP, FeatureStore, cache_folder

Text = list[int]


def texts_of(num: int, longest: int = 70, seed: int = 0) -> list[Text]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 90) for _ in range(rng.randint(1, longest))] for _ in range(num)]


TEXTS = texts_of(45)


@pytest.fixture(scope="module", params=["bert", "llama", "roberta"])
def backbone(request: pytest.FixtureRequest, tiny_backbone: Callable[[str], Path]) -> Backbone:
    return Backbone.load(str(tiny_backbone(request.param)), pooling="mean").eval()


def vectors(store: FeatureStore, backbone: Backbone, texts: list[Text]) -> torch.Tensor:
    batch = conversation_batch([Encoded(tuple(t), (1,)) for t in texts], [0] * len(texts), pad_id=0)
    return store.hidden(backbone, batch.ids_NT, batch.mask_NT)


@pytest.fixture(scope="module")
def alone(backbone: Backbone) -> dict[tuple[int, ...], torch.Tensor]:
    """Each text in a store of its own."""
    return {tuple(t): vectors(FeatureStore(), backbone, [t])[0] for t in TEXTS[:15]}


@settings(max_examples=8)
@given(batches=st.lists(st.lists(st.integers(0, 14), min_size=1, max_size=15), min_size=1, max_size=3))
def test_the_bits_do_not_depend_on_batch_mates_order_or_what_came_before(
    backbone: Backbone, alone: dict[tuple[int, ...], torch.Tensor], batches: list[list[int]]
) -> None:
    store = FeatureStore()
    for rows in batches:
        found = vectors(store, backbone, [TEXTS[r] for r in rows])
        assert all(torch.equal(found[i], alone[tuple(TEXTS[r])]) for i, r in enumerate(rows))


@torch.no_grad()
def test_they_are_what_the_backbone_says(backbone: Backbone) -> None:
    batch = conversation_batch([Encoded(tuple(t), (1,)) for t in TEXTS], [0] * len(TEXTS), pad_id=0)
    found = FeatureStore().hidden(backbone, batch.ids_NT, batch.mask_NT)
    torch.testing.assert_close(found, backbone.encode(batch.ids_NT, batch.mask_NT), rtol=1e-5, atol=1e-5)


def test_a_text_is_computed_once_alone_or_in_forwards_of_fixed_shapes(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    encode = backbone.encode
    monkeypatch.setattr(
        backbone, "encode", lambda ids_NT, mask_NT: shapes.append(ids_NT.shape) or encode(ids_NT, mask_NT)
    )
    store, progress = FeatureStore(), []
    texts = [*TEXTS, *texts_of(40, longest=STEP, seed=1)]
    num_new = len({tuple(t) for t in texts})
    assert store.compute(backbone, [*texts, *texts], progress=lambda *p: progress.append(p)) == num_new == len(store)
    assert progress[-1] == (num_new, num_new)
    if backbone.family is not None:
        assert sorted(shapes) == sorted((1, len(t)) for t in {tuple(t) for t in texts})
    else:
        assert {(n, t % STEP) for n, t in shapes} == {(ROWS, 0)}
    num_forwards = len(shapes)
    assert store.compute(backbone, TEXTS) == 0
    assert len(shapes) == num_forwards


def test_the_backbone_keeps_its_mode_and_dropout_stays_out(backbone: Backbone) -> None:
    backbone.train()
    store = FeatureStore()
    in_training = vectors(store, backbone, TEXTS[:3])
    assert backbone.training
    assert not in_training.requires_grad
    backbone.eval()
    assert torch.equal(in_training, vectors(FeatureStore(), backbone, TEXTS[:3]))
    assert not backbone.training


def test_saved_features_come_back_bit_for_bit_without_being_computed(backbone: Backbone, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "kept")
    first = vectors(store, backbone, TEXTS[:20])
    store.save()
    more = vectors(store, backbone, TEXTS[20:])
    store.save()
    store.save()
    assert len(list((tmp_path / "kept").iterdir())) == 2
    again = FeatureStore(tmp_path / "kept")
    assert again.compute(backbone, TEXTS) == 0
    assert torch.equal(vectors(again, backbone, TEXTS), torch.cat([first, more]))


@pytest.mark.parametrize("damage", ["cut", "flipped header", "flipped bit", "empty", "not ours"])
def test_a_damaged_cache_file_is_computed_again(backbone: Backbone, tmp_path: Path, damage: str) -> None:
    store = FeatureStore(tmp_path)
    wanted = vectors(store, backbone, TEXTS[:5])
    store.save()
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    damaged = {
        "cut": raw[: len(raw) // 2],
        "flipped header": b"\xff" * 16 + raw[16:],
        "flipped bit": raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:],
        "empty": b"",
        "not ours": safetensors_bytes({"something": torch.zeros(2)}),
    }
    path.write_bytes(damaged[damage])
    again = FeatureStore(tmp_path)
    assert len(again) == 0
    assert torch.equal(vectors(again, backbone, TEXTS[:5]), wanted)
    again.save()
    assert FeatureStore(tmp_path).compute(backbone, TEXTS[:5]) == 0


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOREWARD_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("MOREWARD_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "moreward"


def test_a_backbone_with_a_store_answers_from_it(tiny_backbone: Callable[[str], Path]) -> None:
    backbone = Backbone.load(str(tiny_backbone("bert")), pooling="mean").eval()
    backbone.store = FeatureStore()
    ids_NT = torch.tensor([TEXTS[0]])
    first = backbone(ids_NT, torch.ones_like(ids_NT))
    assert len(backbone.store) == 1
    assert torch.equal(first, backbone.store.hidden(backbone, ids_NT, torch.ones_like(ids_NT)))
