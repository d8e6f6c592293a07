"""Find a variant by its name: the file of that name in our package, then the entry points of other packages.

The file is the registration: there is no list to keep.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from moreward.errors import ConfigError

ENTRY_POINTS = "moreward.systems"


def near(name: str, known: Iterable[str]) -> str:
    """A suggestion for an unknown name, ready to be appended to a message."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."


def recipe_names() -> list[str]:
    """Every recipe: our files in `moreward/systems`, and entry points of the group `moreward.systems`."""
    package = import_module("moreward.systems")
    ours = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return sorted({*ours, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def find_recipe(name: str) -> type[Any]:
    """The System class of a recipe. Raises ConfigError with the known names."""
    if name not in recipe_names():
        raise ConfigError(f"recipe: unknown recipe {name!r}.{near(name, recipe_names())}")
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            found = point.load()
            return found.Recipe if isinstance(found, ModuleType) else found  # type: ignore[no-any-return]
    module = import_module(f"moreward.systems.{name}")
    return module.Recipe  # type: ignore[no-any-return]
