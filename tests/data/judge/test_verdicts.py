"""A judge's answers, plain and chatty: what they say is read, and what they do not say is not made up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moreward.data.judge.verdicts import Verdict, parse_verdict

FIRST, SECOND, NEITHER, UNPARSED = Verdict.FIRST, Verdict.SECOND, Verdict.NEITHER, Verdict.UNPARSED

ANSWERS = [
    ("Better: 1", FIRST),
    ("Better: 2", SECOND),
    ("Better: none", NEITHER),
    ("better: 2.", SECOND),
    ("**Better: 2**", SECOND),
    ("Better: **Reply 1**", FIRST),
    ("Better\uff1a 2", SECOND),
    ("2", SECOND),
    ("[[2]]", SECOND),
    ("**1**", FIRST),
    ("Reply 2", SECOND),
    ("`Reply 1.`", FIRST),
    ("The second reply.", SECOND),
    ("\\boxed{2}", SECOND),
    ("Response (2)", SECOND),
    ("Final answer: reply two", SECOND),
    ("My verdict is: Response 1", FIRST),
    ("The better reply is: 2", SECOND),
    ("The better reply is 2.", SECOND),
    # a last line after talk of both
    ("Reply 1 lists 2 facts, reply 2 lists 1 fact.\n\nBetter: 1", FIRST),
    ("Of the 2 replies, 1 is long. Both try hard.\nFinal answer: 2", SECOND),
    ("Better: 1? At first sight. But reply 2 listens.\n\n### Verdict: 2", SECOND),
    ("You ask for `Better: 1`, `Better: 2` or `Better: none`.\n\nBetter: 2", SECOND),
    ("Better: 2\n\nReply 1 is friendly, but says nothing of the feeling.", SECOND),
    ("<think>Reply 1 is better. No, wait.</think>\nBetter: 2", SECOND),
    # sentences
    ("Reply 2 is better because reply 1 ignores the feeling.", SECOND),
    ("Reply 2 is better, as Reply 1 is worse in every way.", SECOND),
    ("Reply 1 is clearly much better than reply 2.", FIRST),
    ("In this aspect, response 1 is weaker.", SECOND),
    ("I prefer the first reply: it has 2 good points.", FIRST),
    ("I would choose reply 2.", SECOND),
    ("The winner is Response 2!", SECOND),
    ("While both are fine, I\u2019d say the better one is reply 1.", FIRST),
    ("Reply 1 is worse. Reply 2 wins.", SECOND),
    # JSON
    ('{"better": 2}', SECOND),
    ('```json\n{"reason": "Reply 1 has 1 flaw", "winner": "Reply 2"}\n```', SECOND),
    ('Here you are: {"verdict": "1", "confidence": 2}', FIRST),
    ('{"choice": "none"}', NEITHER),
    # no preference
    ("It is a tie.", NEITHER),
    ("Both replies are equally good.", NEITHER),
    ("Tie", NEITHER),
    # nothing is said
    ("", UNPARSED),
    ("I'm sorry, but as an AI I cannot judge which of reply 1 or reply 2 is better.", UNPARSED),
    ("I can\u2019t say that reply 2 is better.", UNPARSED),
    ("Reply 1 has 2 sentences.", UNPARSED),
    ("1. Reply 1 is polite.\n2. Reply 2 is polite.", UNPARSED),
    ("Better: 1 or 2", UNPARSED),
    ("Better: 1/2", UNPARSED),
    ("Better: Reply 1 and reply 2", UNPARSED),
    ("Better: 12", UNPARSED),
    ("Better: 1.5", UNPARSED),
    ("Better:", UNPARSED),
    ("Reply 1 is not better than reply 2.", UNPARSED),
    ("Reply 1 isn't better.", UNPARSED),
    ("Reply 1 is better in tone. Reply 2 is better in substance.", UNPARSED),
    ("If reply 1 were shorter, reply 1 would be better.", UNPARSED),
    ("Reply 2 could be better.", UNPARSED),
    ("<think>Reply 2 is better, so", UNPARSED),
    ('{"score": 1}', UNPARSED),
    ('{"better": 3}', UNPARSED),
    ('{"better": true}', UNPARSED),
    ("Both have 1 merit.", UNPARSED),
]


@pytest.mark.parametrize(("answer", "verdict"), ANSWERS, ids=[answer[:40] or "empty" for answer, _ in ANSWERS])
def test_an_answer_is_read_as_a_person_would(answer: str, verdict: Verdict) -> None:
    assert parse_verdict(answer) is verdict


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=200), st.sampled_from("12"))
def test_a_last_line_decides_whatever_precedes_it(talk: str, digit: str) -> None:
    talk = talk.replace("<", "").replace("{", "")  # thoughts and objects have rules of their own
    assert parse_verdict(f"{talk}\nBetter: {digit}") is {"1": FIRST, "2": SECOND}[digit]


@given(st.text(max_size=400))
def test_any_text_has_an_outcome(text: str) -> None:
    assert parse_verdict(text) in Verdict


@given(
    st.lists(st.sampled_from(["1", "2", "Reply 1", "reply 2", "the", "is", "and", "\n", ":", "12", "of"]), min_size=2)
)
def test_digits_without_a_word_of_preference_are_no_verdict(words: list[str]) -> None:
    text = " and ".join(["There", *words, "here"])
    assert parse_verdict(text) is UNPARSED
