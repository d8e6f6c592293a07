"""Capability points as files and mappings."""

from __future__ import annotations

from pathlib import Path

import pytest

from moreward.data.points import load_points, shipped_points
from moreward.errors import ConfigError


def test_the_shipped_points_are_the_five_tasks_and_27_points_each_with_a_sentence() -> None:
    points = load_points("dmoerm")
    assert {task: len(named) for task, named in points.items()} == {
        "role_play": 6,
        "chat": 5,
        "subjective_knowledge_qa": 5,
        "objective_knowledge_qa": 6,
        "text_creation": 5,
    }
    assert shipped_points() == ("dmoerm",)
    assert all(said.endswith(".") and len(said) > 20 for named in points.values() for said in named.values())


def test_a_file_a_mapping_and_their_short_forms_say_the_same(tmp_path: Path) -> None:
    said = {"chat": {"empathy": "Feels.", "wit": ""}}
    file = tmp_path / "mine.yaml"
    file.write_text("tasks:\n  chat:\n    points:\n      empathy: Feels.\n      wit:\n", encoding="utf-8")
    assert load_points(file) == load_points(str(file)) == said
    assert load_points({"chat": {"empathy": "Feels.", "wit": None}}) == said
    assert load_points({"tasks": {"chat": ["empathy", "wit"]}}) == {"chat": {"empathy": "", "wit": ""}}


def test_faults_are_all_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        load_points({"a": 3, "b": {"x": 1}, "c": ["x", "x"]})
    assert [fault.split(":")[1].strip() for fault in told.value.faults] == ["task a", "task b", "task c"]


@pytest.mark.parametrize("bad", [[], "nothing", {}])
def test_what_is_no_tree_of_tasks_is_refused(bad: object, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(str(bad), encoding="utf-8")
    with pytest.raises(ConfigError, match="expected tasks"):
        load_points(file)


def test_a_file_that_is_not_there_is_named_beside_the_shipped_sets() -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml .*dmoerm"):
        load_points("gone.yaml")
