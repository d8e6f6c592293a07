"""A judge fills the cache with what is missing, once each, and reads its verdicts from there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from moreward.data.judge.cache import Cache
from moreward.data.judge.endpoint import QuestionError
from moreward.data.judge.judges import ByQuestions, ByRewards
from moreward.data.judge.labels import labels_of
from moreward.data.judge.pairs import Pair
from moreward.data.judge.prompts import Templates
from moreward.data.judge.verdicts import Verdict
from moreward.errors import JudgeError

POINTS = {"chat": {"logic": "", "empathy": ""}, "tales": {"logic": ""}}
PAIRS = [
    Pair(prompt=f"P{n}", first="one", second="two", domain=domain, id=f"{domain}{n}")
    for domain in ("chat", "tales")
    for n in range(3)
]


def nothing(done: int, total: int) -> None:
    pass


def test_a_question_that_two_tasks_share_is_asked_once(tmp_path: Path) -> None:
    asked: list[str] = []
    judge = ByQuestions("j", lambda question: asked.append(question) or "Better: 1")  # type: ignore[func-returns-value]
    told: list[tuple[int, int]] = []
    with Cache(tmp_path / "c") as cache:
        estimate = judge.estimate(PAIRS, POINTS, cache)
        assert (estimate.calls, estimate.to_send) == (18, 12)  # logic of P0..P2 is the same question in both tasks
        assert judge.fill(PAIRS, POINTS, cache, lambda done, total: told.append((done, total))) == 12
        assert len(asked) == len(set(asked)) == 12
        assert told[-1] == (12, 12)
        assert judge.fill(PAIRS, POINTS, cache, nothing) == 0
    assert sum(len(question) for question in asked) // 4 == estimate.tokens_in


@pytest.mark.parametrize(("share", "fails"), [(0.0, 2), (0.1, 3), (0.5, 7)])
def test_the_budget_of_failures_is_a_share_of_what_is_asked_and_one_at_least(
    tmp_path: Path, share: float, fails: int
) -> None:
    lock, left = threading.Lock(), [fails]

    def ask(question: str) -> str:
        with lock:
            left[0] -= 1
            if left[0] >= 0:
                raise QuestionError("HTTP 400")
        return "Better: 1"

    stopped: list[bool] = []
    judge = ByQuestions("j", ask, lambda: stopped.append(True), max_failed_share=share)
    with Cache(tmp_path / "c") as cache, pytest.raises(JudgeError, match="--max-failed"):
        judge.fill(PAIRS, POINTS, cache, nothing)
    left[0] = fails - 1
    with Cache(tmp_path / "d") as cache:
        judge.fill(PAIRS, POINTS, cache, nothing)
        assert len(cache) == 12 - (fails - 1)
    assert stopped == [True]


def test_a_bug_in_a_thread_ends_the_job_and_is_not_hidden(tmp_path: Path) -> None:
    def ask(question: str) -> str:
        raise ZeroDivisionError

    with Cache(tmp_path / "c") as cache, pytest.raises(ZeroDivisionError):
        ByQuestions("j", ask).fill(PAIRS, POINTS, cache, nothing)


def test_another_template_or_judge_asks_anew(tmp_path: Path) -> None:
    own = Templates("{point} {conversation} {reply_1} {reply_2}")
    judges = [ByQuestions("j", lambda q: "1"), ByQuestions("k", lambda q: "1"), ByQuestions("j", lambda q: "1")]
    judges[2].templates = own
    with Cache(tmp_path / "c") as cache:
        assert [judge.fill(PAIRS, POINTS, cache, nothing) for judge in judges] == [12, 12, 12]
        assert all(judge.estimate(PAIRS, POINTS, cache).to_send == 0 for judge in judges)


def test_rewards_are_computed_once_a_text_and_ties_are_no_label(tmp_path: Path) -> None:
    seen: list[str] = []

    def rewards(items: list[object], point: str) -> list[float]:
        seen.extend(f"{item.prompt} {item.response} {point}" for item in items)  # type: ignore[attr-defined]
        return [0 if item.prompt == "P0" else len(item.prompt + item.response) for item in items]  # type: ignore[attr-defined]

    judge = ByRewards("r", rewards)  # type: ignore[arg-type]
    pairs = [
        Pair(prompt="P0", first="a", second="bb", domain="chat", id="tied"),
        Pair(prompt="P1", first="a", second="bb", domain="chat", id="12"),
        Pair(prompt="P1", first="ccc", second="bb", domain="chat", id="32"),
    ]
    with Cache(tmp_path / "c") as cache:
        assert judge.estimate(pairs, POINTS, cache).calls == 5
        assert judge.fill(pairs, POINTS, cache, nothing) == len(seen) == len(set(seen)) == 5
        rows, tallies = labels_of(judge, pairs, POINTS, cache)
        assert judge.verdicts(pairs[0], "logic", "", cache) == (Verdict.NEITHER, Verdict.NEITHER)
    assert [(row["id"], row["chosen"]) for row in rows] == [
        ("12/logic", "bb"), ("12/empathy", "bb"), ("32/logic", "ccc"), ("32/empathy", "ccc"),
    ]  # fmt: skip
    assert tallies["chat"]["logic"].outcomes == {"undecided": 1, "kept": 2}
    by_point = ByRewards("r", rewards, by_point=True)  # type: ignore[arg-type]
    with Cache(tmp_path / "d") as cache:
        assert by_point.fill(pairs, POINTS, cache, nothing) == 10
