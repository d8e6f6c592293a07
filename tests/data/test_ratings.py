"""Ratings of the known layouts; every row kept or told; a fifth held out by prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moreward.data.ratings import divided, load_ratings, rated_in
from moreward.data.rows import RawRow
from moreward.data.values import RowError
from moreward.errors import DataError
from moreward.types import Preference

HELPSTEER = {"prompt": "p", "response": "r", "helpfulness": 4, "correctness": 0, "coherence": 2, "complexity": None}
ULTRAFEEDBACK = {
    "instruction": "p",
    "source": "evol",
    "completions": [
        {
            "response": "one",
            "overall_score": 10.0,
            "annotations": {"honesty": {"Rating": "5"}, "truthfulness": {"Rating": "N/A", "Rationale": "?"}},
        },
        {"response": "two", "annotations": {"helpfulness": {"Rating": "2"}}},
    ],
}
OWN = {"prompt": "p", "response": "r", "ratings": {"safe": 1, "fun": None, "depth": 0.25}}


def of(row: dict[str, Any]) -> list[dict[str, float]]:
    return [dict(rated.ratings) for rated in rated_in(RawRow("f", 1, row))]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_each_layout_becomes_numbers_from_zero_to_one() -> None:
    assert of(HELPSTEER) == [
        {
            "helpsteer-helpfulness": pytest.approx(0.9),
            "helpsteer-correctness": pytest.approx(0.1),
            "helpsteer-coherence": 0.5,
        }
    ]
    assert of(ULTRAFEEDBACK) == [
        {"ultrafeedback-overall_score": 1.0, "ultrafeedback-honesty": 1.0},
        {"ultrafeedback-helpfulness": 0.25},
    ]
    assert of(OWN) == [{"safe": 1.0, "depth": 0.25}]
    assert of({**OWN, "ratings": {"a": 7}, "scale": [5, 9]}) == [{"a": 0.5}]


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ({**HELPSTEER, "helpfulness": 5}, "bad_rating", "helpfulness"),
        ({**OWN, "ratings": {"safe": 2}}, "bad_rating", "safe"),
        ({**OWN, "ratings": {"safe": "much"}}, "bad_rating", "safe"),
        ({**OWN, "ratings": {"safe": None}}, "bad_rating", ""),
        ({**OWN, "scale": [1, 1]}, "bad_rating", "scale"),
        ({**OWN, "ratings": 3}, "wrong_type", "ratings"),
        ({**OWN, "response": " "}, "empty_response", "response"),
        ({"prompt": "p", "response": "r"}, "unknown_shape", ""),
        ({**ULTRAFEEDBACK, "completions": "x"}, "wrong_type", "completions"),
        ({"response": "r", "ratings": {"a": 1}}, "missing_field", "prompt"),
    ],
)
def test_what_is_no_rating_is_named(row: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(RowError) as told:
        of(row)
    assert (told.value.code, told.value.field) == (code, field)


def test_every_row_is_kept_or_in_the_quarantine_and_the_report_adds_up(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [HELPSTEER, OWN, OWN, "{", {**OWN, "ratings": {"safe": -1}}, ULTRAFEEDBACK])
    loaded = load_ratings(path, max_bad_share=0.5)
    assert [(q.line, q.reason) for q in loaded.quarantine] == [(4, "bad_json"), (5, "bad_rating")]
    told = loaded.report()
    assert (told["rows"], told["conversations"], told["duplicates"]) == (6, 4, 1)
    assert told["not_used"] == {"bad_json": 1, "bad_rating": 1}
    assert told["objectives"]["safe"] == {"rated": 1, "missing": 3, "least": 1.0, "mean": 1.0, "most": 1.0}
    with pytest.raises(DataError, match=r"2 of 6 rows are bad"):
        load_ratings(path)


def test_a_fifth_of_the_prompts_is_held_out_and_what_held_out_pairs_ask(tmp_path: Path) -> None:
    rows = [{**OWN, "prompt": f"p{i // 2}", "response": f"r{i}"} for i in range(200)]
    loaded = load_ratings(write(tmp_path / "r.jsonl", rows))
    sides = divided(loaded)
    prompts = [{r.conversation.prompt for r in side} for side in (sides.train, sides.val)]
    assert (len(sides.train), len(sides.val)) == (160, 40)
    assert not prompts[0] & prompts[1]
    assert divided(loaded).val == sides.val, "the same every time"
    asked = sorted(prompts[0])[0]
    pair = Preference(prompt=({"role": "user", "content": asked},), chosen="a", rejected="b")
    again = divided(loaded, [pair])
    assert again.num_moved == 2
    assert asked not in {r.conversation.prompt for r in again.train}
    assert len(again.train) + len(again.val) == 200
