"""Recipes are found by their file, and those of other packages by their entry point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moreward
from moreward.errors import ConfigError
from moreward.registry import find_recipe, near, recipe_names

SYSTEMS = Path(moreward.__file__).parent / "systems"
THIRD_PARTY = """
from moreward.systems.base_lora import Recipe as BaseLora

class Recipe(BaseLora):
    paper = "ours"
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another package, installed as pip would: its code and the folder that declares its entry point."""
    (tmp_path / "my_recipes.py").write_text(THIRD_PARTY)
    told = tmp_path / "my_recipes-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: my-recipes\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("[moreward.systems]\nmy_recipe = my_recipes:Recipe\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_file_is_a_recipe_under_its_name() -> None:
    files = {p.stem for p in SYSTEMS.glob("*.py") if not p.stem.startswith("_")}
    assert {"arliss", "rodos", "more", "baseline", "base_lora"} <= files <= set(recipe_names())
    for name in files:
        assert find_recipe(name).__module__ == f"moreward.systems.{name}"
    assert recipe_names() == sorted(recipe_names())


def test_an_unknown_recipe_is_told_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown recipe 'roddos'\. Did you mean 'rodos'\? Known: .*arliss, .*rodos, "
    ):
        find_recipe("roddos")


@pytest.mark.parametrize("name", ["_base", "", "..", "moreward.cli", "os"])
def test_what_is_no_recipe_is_not_imported(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown recipe"):
        find_recipe(name)


def test_a_recipe_of_another_package_is_found(third_party: Path) -> None:
    assert "my_recipe" in recipe_names()
    assert find_recipe("my_recipe").paper == "ours"
    assert find_recipe("arliss").__module__ == "moreward.systems.arliss"


def test_a_recipe_without_a_docstring_is_listed(third_party: Path) -> None:
    environment = {"PYTHONPATH": f"{third_party}:{SYSTEMS.parents[1]}"}
    done = subprocess.run(
        [sys.executable, "-m", "moreward", "list"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "recipe=my_recipe" in done.stdout


def test_near_suggests_only_what_is_close() -> None:
    assert near("rank", ["rank_", "alpha"]) == " Did you mean 'rank_'? Known: alpha, rank_."
    assert near("zzz", ["rank", "alpha"]) == " Known: alpha, rank."
