"""Capability points: for each task (domain), the names of what is judged apart and a sentence on each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from moreward.errors import ConfigError

Points: TypeAlias = dict[str, dict[str, str]]
"""Task → point → the sentence that tells a judge what it means. Order as in the file."""

FORM = "tasks: {chat: {points: {empathy: 'what it means, in a sentence'}}}"
_FOLDER = Path(__file__).parent


def shipped_points() -> tuple[str, ...]:
    """The names under which sets of points ship with the package."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.yaml")))


def load_points(source: str | Path | Mapping[str, Any]) -> Points:
    """The points in a YAML file, under the name of a shipped set (`dmoerm`), or given as a mapping of the same form.

    The top key `tasks` may be left out, a task may be its points, and points may be a list of names (no sentences).
    Raises ConfigError with every fault.
    """
    where = "points" if isinstance(source, Mapping) else str(source)
    tree = source if isinstance(source, Mapping) else _read(source)
    tasks = tree.get("tasks", tree) if isinstance(tree, Mapping) else tree
    if not isinstance(tasks, Mapping) or not tasks:
        raise ConfigError(f"{where}: expected {FORM}, got {type(tasks).__name__}{'' if tasks else ', empty'}")
    faults: list[str] = []
    points = {str(task): _points_of(f"{where}: task {task}", given, faults) for task, given in tasks.items()}
    if faults:
        raise ConfigError(faults)
    return points


def _read(source: str | Path) -> Any:
    path = _FOLDER / f"{source}.yaml" if str(source) in shipped_points() else Path(source)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        known = ", ".join(shipped_points())
        raise ConfigError(f"points: {source} is no shipped set ({known}) and no readable YAML: {error}") from error


def _points_of(where: str, given: Any, faults: list[str]) -> dict[str, str]:
    points = given.get("points", given) if isinstance(given, Mapping) else given
    if isinstance(points, list | tuple) and len(set(map(str, points))) == len(points):
        points = dict.fromkeys(points, "")
    if not isinstance(points, Mapping):
        faults.append(f"{where}: expected a mapping of points or a list of different names (got {points!r})")
        return {}
    said = {str(name): "" if text is None else text for name, text in points.items()}
    faults += [f"{where}: a point has no name" for name in said if not name.strip()]
    faults += [
        f"{where}: point {name}: expected a sentence (got {text!r})"
        for name, text in said.items()
        if not isinstance(text, str)
    ]
    return said
