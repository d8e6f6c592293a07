"""S15: bad adapters are refused with the old expert serving on, and good ones take their expert's place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moreward.checkpoint import write_manifest
from moreward.cli import app
from moreward.data.batches import side
from moreward.errors import ConfigError, RunError
from moreward.export.adapters import export_peft
from moreward.growth.adopt import adopt
from moreward.nn.peft_format import WEIGHTS
from moreward.scoring import load
from moreward.types import Preference
from test_bad_adapters import TWELVE, marker_of
from trained import card, digests

Make = Callable[..., Path]
OTHER = ("train.learning_rate=0.01", "seed=1", "system.rank=4", "system.alpha=8", "pooling=own")
OURS = ("system.rank=4", "system.alpha=8", "pooling=own")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    return make("arliss", "bert", *OURS)


@pytest.fixture(scope="module")
def other(make: Make) -> Path:
    """Another training of the same shape: where the adapters come from."""
    return make("arliss", "bert", *OTHER)


def test_an_adapter_takes_its_experts_place_and_nothing_else_moves(
    run: Path, other: Path, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    shutil.copytree(other / "model" / "experts" / "short", shelf / "short")
    before = digests(run)
    made = adopt(run, shelf, out=tmp_path / "new")
    assert (made.experts, dict(made.refused)) == (("short",), {})
    assert digests(run) == before
    items = [side(p, which) for p in pairs[:6] for which in ("chosen", "rejected")]
    old, new, theirs = load(run), load(made.run), load(other)
    moved = []
    for was, now, wanted in zip(old.golden(items), new.golden(items), theirs.golden(items), strict=True):
        assert now["experts"]["long"] == was["experts"]["long"]
        assert abs(now["experts"]["short"] - wanted["experts"]["short"]) <= 1e-4
        moved.append(abs(now["experts"]["short"] - was["experts"]["short"]))
    assert max(moved) > 1e-2
    assert [r.weights for r in new.score(items)] == [r.weights for r in old.score(items)]
    assert card(made.run)["adopted"] == [{"from": str(shelf), "experts": ["short"]}]


def test_the_twelve_bad_are_refused_and_the_good_one_is_taken(run: Path, other: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    good = shutil.copytree(other / "model" / "experts" / "short", shelf / "short")
    for name, _, damage, _ in TWELVE:
        folder = shutil.copytree(good, shelf / name)
        for one in damage:
            one(folder)
    done = CliRunner().invoke(app, ["adopt", str(run), str(shelf), "--out", str(tmp_path / "new")])
    assert done.exit_code == 1, done.output
    assert "adopted: short;" in done.output
    for name, wording, _, said in TWELVE:
        assert f"refused: {name}" in done.output
        missed = [one for one in said if one not in done.output]
        assert not missed, wording
    assert not any(marker_of(shelf / name).exists() for name, *_ in TWELVE)
    load(tmp_path / "new")


@pytest.mark.parametrize(("name", "wording", "damage", "said"), TWELVE, ids=[wording for _, wording, *_ in TWELVE])
def test_each_bad_adapter_alone_writes_nothing(
    name: str,
    wording: str,
    damage: Sequence[Callable[[Path], object]],
    said: Sequence[str],
    run: Path,
    other: Path,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(other / "model" / "experts" / "short", tmp_path / "shelf" / "short")
    for one in damage:
        one(folder)
    with pytest.raises(RunError, match="nothing was written"):
        adopt(run, tmp_path / "shelf", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_name_that_no_expert_has_is_refused(run: Path, other: Path, tmp_path: Path) -> None:
    shutil.copytree(other / "model" / "experts" / "short", tmp_path / "shelf" / "poems")
    with pytest.raises(RunError, match=r"no expert of this run has the name 'poems'. It has: \w+, \w+"):
        adopt(run, tmp_path / "shelf", out=tmp_path / "new")


def test_golden_rewards_of_an_export_are_computed_again(run: Path, other: Path, tmp_path: Path) -> None:
    export_peft(load(other), tmp_path / "shelf")
    assert set(adopt(run, tmp_path / "shelf", out=tmp_path / "new").experts) == {"short", "long"}
    changed = tmp_path / "shelf" / "short"
    tensors = load_file(changed / WEIGHTS)
    tensors = {k: v + 0.5 if "classifier" in k else v for k, v in tensors.items()}
    save_file(tensors, changed / WEIGHTS)
    with pytest.raises(RunError, match=WEIGHTS):  # the hash alone tells
        adopt(run, changed_only(changed, tmp_path / "one"), out=tmp_path / "x")
    write_manifest(changed, kind="moreward-peft")
    with pytest.raises(RunError, match=r"golden text 0 gets .* here, not"):
        adopt(run, changed_only(changed, tmp_path / "two"), out=tmp_path / "x")


def changed_only(folder: Path, shelf: Path) -> Path:
    shutil.copytree(folder, shelf / folder.name)
    return shelf


def test_a_run_without_adapters_cannot_adopt(make: Make, tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    with pytest.raises(ConfigError, match="its experts are no adapters"):
        adopt(make("arliss", "bert", "tune=frozen"), tmp_path / "shelf", out=tmp_path / "new")
