"""From what a judge wrote to its verdict. What is not plainly said is no verdict: a digit alone proves nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """Which of the two replies as shown is better; or that neither is; or that the answer says nothing of it; or that
    there is no answer."""

    FIRST = "first"
    SECOND = "second"
    NEITHER = "neither"
    UNPARSED = "unparsed"
    FAILED = "failed"


_OF_DIGIT = {"1": Verdict.FIRST, "2": Verdict.SECOND, "0": Verdict.NEITHER}
_OTHER = {"1": "2", "2": "1"}

_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_MARKUP = re.compile(r"[*_`#\"\u2018\u201c\u201d{}]|^\s*[-\u2022]\s|\\boxed", re.MULTILINE)
_SAME = str.maketrans("<>\u2019\uff1a", "()':")
_JSON = re.compile(r"\{[^{}]*\}")
_JSON_KEYS = ("better", "verdict", "winner", "choice", "preferred", "preference", "best", "answer")

_NOUN = r"(?:reply|response|answer|option|candidate)"
_REPLY = re.compile(
    rf"\b(?:the\s+)?(?:{_NOUN}\s*(?:number|no\.|\#)?\s*[\[(]?(?P<digit>1|2|one|two)\b(?![.,]\d)[\])]?"
    rf"|(?P<word>first|second)\s+(?:{_NOUN}|one)\b)",
    re.IGNORECASE,
)
_NONE = r"(?:none|neither|tie|equal|equally good|both|no difference|0)"
_BARE = re.compile(rf"[\s\[(]*(?:<(?P<reply>[12])>|(?P<digit>[12])|(?P<none>{_NONE}))[\s\])]*[.!]?\s*", re.IGNORECASE)
_LABEL = (
    r"(?:better|best|winner|verdict|choice|preferred|preference|answer|final answer|final verdict|my choice|my verdict"
    r"|conclusion|result)"
)
_FINAL = re.compile(
    rf"^\W*(?:(?:so|therefore|thus|hence|overall)[, ]+)?(?:the |my )?{_LABEL}(?: {_NOUN}| one)?(?: is)?\s*[:=]\s*"
    rf"[\s\[(]*(?:<(?P<reply>[12])>|(?P<digit>[12])(?![\d.]\d|\d)|(?P<none>{_NONE})\b)(?P<rest>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_ALTERNATIVE = re.compile(
    r"^[\s\])]*(?:or|and|/|,|\||&|-|vs\.?|versus)\s*[\[(]?(?:<[12]>|[12]\b|better|none)", re.IGNORECASE
)

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+|,?\s+(?:but|however|although|though|while|whereas|because|since)\s+")
_UNSURE = re.compile(
    r"\b(?:whether|if|unless|cannot|can't|unable|neither|nor|could|would|might|may|should)\b"
    r"|<[12]>\s*(?:or|and|/|,|vs\.?|versus)\s*<[12]>",
    re.IGNORECASE,
)
_GAP = r"(?:\s+(?!not\b|no\b|never\b|hardly\b|less\b|least\b)\w+){0,5}?\s+"
_IS_BETTER = re.compile(
    rf"<([12])>{_GAP}(?:better|best|stronger|superior|preferable|preferred|the winner|wins)\b", re.IGNORECASE
)
_IS_WORSE = re.compile(rf"<([12])>{_GAP}(?:worse|worst|weaker|inferior)\b", re.IGNORECASE)
_CHOOSES = re.compile(
    r"\b(?:i|we)\s+(?:(?:would|strongly|clearly|do|must|will)\s+)*(?:prefer|choose|chose|pick|select|favou?r|go with"
    r"|vote for)\s+<([12])>"
    r"|\b(?:better|best|stronger|superior|preferred|preferable|winning)(?:\s+\w+)?(?:\s+here)?\s+is\s*:?\s+"
    r"(?:<([12])>|([12])\b(?!\s*\w|[.,]\d))"
    r"|\b(?:winner|choice|verdict|preference)\s+is\s*:?\s+(?:<([12])>|([12])\b(?!\s*\w|[.,]\d))",
    re.IGNORECASE,
)
_EVEN = re.compile(
    rf"\b(?:it is a tie|it's a tie|neither (?:{_NOUN} )?is better|equally (?:good|strong)|no clear winner"
    rf"|both (?:{_NOUN}s|replies) are equal\w*)\b",
    re.IGNORECASE,
)


def parse_verdict(answer: str) -> Verdict:
    """The verdict of an answer, however chatty.

    In this order: an answer that is nothing but a verdict; a JSON object with one; the last line of the form `Better:
    2`; else statements such as "reply 2 is better because reply 1 ...", which must all name the same reply. Thoughts in
    `<think>` are not read. A line that names both ("Better: 1 or 2") and statements under a condition or a negation do
    not count.
    """
    text = _THOUGHT.sub(" ", answer)
    in_json = _json_verdict(text)
    plain = _REPLY.sub(_marked, _MARKUP.sub("", text.translate(_SAME)))
    if bare := _BARE.fullmatch(plain):
        return _named(bare)
    if in_json is not None:
        return in_json
    finals = [_named(found) for found in _FINAL.finditer(plain) if not _ALTERNATIVE.match(found["rest"])]
    return finals[-1] if finals else _stated(plain)


def _marked(found: re.Match[str]) -> str:
    """`<1>` or `<2>`, whatever the reply was called."""
    named = (found["digit"] or found["word"]).lower()
    return "<1>" if named in ("1", "one", "first") else "<2>"


def _named(found: re.Match[str]) -> Verdict:
    return _OF_DIGIT[found["reply"] or found["digit"] or "0"]


def _json_verdict(text: str) -> Verdict | None:
    """The verdict of the last JSON object that holds one."""
    verdicts = [verdict for found in _JSON.finditer(text) for verdict in _of_object(found[0])]
    return verdicts[-1] if verdicts else None


def _of_object(text: str) -> Iterator[Verdict]:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return
    folded = {str(key).lower(): entry for key, entry in value.items()}
    for key in _JSON_KEYS:
        if isinstance(entry := folded.get(key), str | int) and not isinstance(entry, bool):
            if bare := _BARE.fullmatch(_REPLY.sub(_marked, str(entry))):
                yield _named(bare)
            return


def _stated(plain: str) -> Verdict:
    sentences = [sentence for sentence in _SENTENCE.split(plain) if sentence]
    named = {digit for sentence in sentences if not _UNSURE.search(sentence) for digit in _statements(sentence)}
    # "I would prefer reply 2" is a choice, not a condition
    named |= {d for s in sentences if re.match(r"\s*i would\b", s, re.IGNORECASE) for d in _choices(s)}
    if len(named) == 1:
        return _OF_DIGIT[named.pop()]
    return Verdict.NEITHER if not named and _EVEN.search(plain) else Verdict.UNPARSED


def _statements(sentence: str) -> Iterator[str]:
    yield from (found[1] for found in _IS_BETTER.finditer(sentence))
    yield from (_OTHER[found[1]] for found in _IS_WORSE.finditer(sentence))
    yield from _choices(sentence)


def _choices(sentence: str) -> Iterator[str]:
    if not re.search(r"\b(?:if|unless|or)\b", sentence, re.IGNORECASE):
        yield from (next(filter(None, found.groups())) for found in _CHOOSES.finditer(sentence))
