"""Pairs that judge one capability: other judgements than those of the whole, and for one recipe only."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from moreward.data.audit import audit, render
from moreward.data.load import assert_no_leak, load_preferences, without_capabilities
from moreward.data.split import split_by_group
from moreward.data.synthetic import CAPABILITIES, capability_pairs, generate
from moreward.errors import ConfigError, DataError
from moreward.types import Preference


def rows_of(num: int, **more: object) -> list[dict[str, object]]:
    return [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}", "domain": "a", **more} for i in range(num)]


def load(path: Path, rows: list[dict[str, object]], **options: object):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_preferences(path, max_bad_share=1, **options)


def test_the_same_texts_under_another_capability_are_another_judgement(tmp_path: Path) -> None:
    turned = {"prompt": "q0", "chosen": "no 0", "rejected": "yes 0", "domain": "a", "capability": "tone"}
    loaded = load(tmp_path / "a.jsonl", [*rows_of(2), *rows_of(2, capability="wit"), turned, turned])
    assert (len(loaded.preferences), loaded.duplicates, loaded.contradictions) == (5, 1, [])
    against = {**turned, "chosen": "yes 0", "rejected": "no 0"}
    loaded = load(tmp_path / "b.jsonl", [*rows_of(2), turned, against], contradiction_weight=0.5)
    assert [(a.capability, b.capability) for a, b in loaded.contradictions] == [("tone", "tone")]
    assert [p.weight for p in loaded.preferences] == [1, 1, 0.5, 0.5]


def test_a_margin_in_all_rows_of_the_whole_asks_for_none_in_those_of_capabilities(tmp_path: Path) -> None:
    loaded = load(tmp_path / "a.jsonl", [*rows_of(2, margin=1.0), *rows_of(2, capability="wit")])
    assert [p.margin for p in loaded.preferences] == [1.0, 1.0, None, None]
    with pytest.raises(DataError, match="have none"):
        load(tmp_path / "b.jsonl", [*rows_of(1, margin=1.0), *rows_of(2), *rows_of(2, capability="wit")])


def test_a_prompt_on_two_sides_is_a_leak_whatever_is_judged(tmp_path: Path) -> None:
    whole = load(tmp_path / "a.jsonl", rows_of(2)).preferences
    part = load(tmp_path / "b.jsonl", rows_of(1, capability="wit")).preferences
    with pytest.raises(DataError, match="has the prompt or group"):
        assert_no_leak(whole, part)


def test_a_split_keeps_a_prompts_judgements_together_and_each_kind_near_its_share() -> None:
    pairs = [
        Preference(prompt=f"q{i}", chosen="a", rejected="b", capability=capability)
        for i in range(200)
        for capability in ("", *(["wit"] * (i < 100) + ["tone"] * 3 * (i >= 100)))
    ]
    sides = split_by_group(pairs, {"train": 0.8, "val": 0.2}, seed=3)
    assert {p.prompt for p in sides["train"]}.isdisjoint(p.prompt for p in sides["val"])
    counts = Counter(p.capability for p in sides["val"])
    assert all(abs(counts[name] - share) <= 6 for name, share in (("", 40), ("wit", 20), ("tone", 60)))


def test_the_audit_tells_rows_and_pairs_of_each_capability(tmp_path: Path) -> None:
    answers = [{"rank": r, "completion": [{"role": "assistant", "content": f"a{r}"}]} for r in (1, 2, 3)]
    ranked = {
        "context": [{"role": "user", "content": "Q"}],
        "completions": answers,
        "capability": "tone",
        "domain": "a",
    }
    loaded = load(tmp_path / "a.jsonl", [*rows_of(3), *rows_of(2, capability="wit"), ranked])
    found = audit(loaded)
    told = found.to_json()["domains"]["a"]["capabilities"]
    assert told == {"tone": {"num_rows": 1, "num_pairs": 3}, "wit": {"num_rows": 2, "num_pairs": 2}}
    assert "a judges one capability in tone: 1 rows (3 pairs), wit: 2 rows (2 pairs)" in render(found)
    assert "judges one capability" not in render(audit(load(tmp_path / "b.jsonl", rows_of(3))))


def test_rows_of_capabilities_are_put_aside_once_each_with_their_place(tmp_path: Path) -> None:
    loaded = load(tmp_path / "a.jsonl", [*rows_of(3), *rows_of(2, capability="wit")])
    kept, aside = without_capabilities(loaded.preferences)
    assert [p.capability for p in kept] == ["", "", ""]
    assert [(row.line, row.reason, row.domain) for row in aside] == [(4, "capability", "a"), (5, "capability", "a")]


def test_generated_pairs_say_which_response_shows_more_of_a_capability() -> None:
    pairs = generate(30, seed=1)
    clean = capability_pairs(pairs)
    by_id = {p.id: p for p in pairs}
    assert set(Counter(p.capability for p in clean)) == set(CAPABILITIES)
    for p in clean:
        whole = by_id[p.id.rsplit("/", 1)[0]]
        sides = {whole.chosen: "chosen", whole.rejected: "rejected"}
        more, less = (whole.meta[f"capabilities_{sides[text]}"][p.capability] for text in (p.chosen, p.rejected))
        assert more > less
    noisy = capability_pairs(pairs, noise=0.15, seed=4)
    wrong = sum(a.chosen != b.chosen for a, b in zip(clean, noisy, strict=True))
    assert wrong == sum(p.meta["flipped"] for p in noisy)
    assert 0.1 < wrong / len(noisy) < 0.2
    assert noisy == capability_pairs(pairs, noise=0.15, seed=4)


def test_what_was_not_generated_has_no_levels() -> None:
    with pytest.raises(ConfigError) as told:
        capability_pairs([replace(generate(1)[0], meta={})], noise=2, capabilities=["charm"])
    assert len(told.value.faults) == 3
