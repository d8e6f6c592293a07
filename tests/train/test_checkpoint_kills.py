"""A process that dies while it saves loses nothing that was saved."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import saving
from checkpoints import assert_holds
from killing import Forks


@pytest.fixture(scope="module")
def savers() -> Iterator[Forks]:
    with Forks("from saving import work") as savers:
        yield savers


def step_after_a_death(folder: Path) -> int:
    """Resume as a run would. The step found, which is no older than the last save that returned."""
    store = saving.store_in(folder)
    store.clean()
    assert not list(folder.glob("tmp-*"))
    saved = [int(line) for line in Path(f"{folder}.saved").read_text().split()]
    found = store.newest()
    if found is None:
        assert not saved
        return 0
    assert_holds(found, found.step, saving.content(found.step), {"step": found.step})
    assert found.step >= max(saved, default=0)
    return found.step


def test_ten_kills_at_random_instants_lose_nothing_that_was_saved(savers: Forks, tmp_path: Path) -> None:
    folder, step, delays = tmp_path / "checkpoints", 0, random.Random(7)
    inside = 0
    for _ in range(10):
        assert savers.run(folder, step + 1, kill_after=delays.uniform(0.02, 0.25)) == -9
        inside += any(folder.glob("tmp-*"))
        reached = step_after_a_death(folder)
        assert reached >= step
        step = reached
    assert step >= 5, "the saver must get somewhere between two kills"
    assert inside >= 3, "some kills must fall inside a save"


@pytest.mark.parametrize("again", [False, True], ids=["new steps", "a step saved again"])
def test_a_death_at_any_change_to_the_disk_leaves_a_good_checkpoint(savers: Forks, tmp_path: Path, again: bool) -> None:
    """Every call that changes the disk in two saves, one after the other; the second also prunes or replaces."""
    ready = tmp_path / "ready"
    store = saving.store_in(ready)
    for step in (1, 2):
        store.save(step, saving.content(step), {"step": step})
    found = set()
    for crash_at in range(1, 42):
        folder = tmp_path / f"crash-{crash_at}"
        shutil.copytree(ready, folder)
        Path(f"{folder}.saved").write_text("2\n")
        assert savers.run(folder, 2 if again else 3, crash_at=crash_at) == 9
        found.add(step_after_a_death(folder))
    assert found >= ({2, 3} if again else {2, 3, 4})
