"""Absolute ratings of responses, with every row accounted for as in `load`.

Three layouts, told by their columns:

- HelpSteer, HelpSteer2: `prompt`, `response` and whole numbers 0..4 under `helpfulness`, `correctness`, `coherence`,
  `complexity`, `verbosity`; r becomes (r + 0.5) / 5, as `helpsteer-NAME`;
- UltraFeedback: `instruction` and `completions`, each with `response`, `annotations` {NAME: {"Rating": "1".."5"}} and
  `overall_score` 1..10; r becomes (r - 1) / 4 and the overall score (s - 1) / 9, as `ultrafeedback-NAME`; "N/A" is
  missing;
- ours: `prompt`, `response`, `ratings` {NAME: number or null} and, unless they are in 0..1, `scale` [low, high].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moreward.data.load import Quarantined
from moreward.data.rows import BadRow, RawRow
from moreward.data.sources import find_sources, read_rows
from moreward.data.split import split_by_group
from moreward.data.values import (
    Row,
    RowError,
    mapping_of,
    name_of,
    optional_text,
    required,
    shown,
    text_of,
    text_or_turns,
    tools_of,
)
from moreward.errors import DataError
from moreward.types import NO_DOMAIN, Conversation, Preference, Rated, Text, text_key

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("instruction_following", "truthfulness", "honesty", "helpfulness")
VAL_SHARE, SEED = 0.2, 42
"""The paper's split for choosing alpha (arXiv 2406.12845)."""


@dataclass(frozen=True)
class Ratings:
    """Rated conversations to fit and to choose on, rows that were not usable, and what the run's card says of them.

    `num_moved` went to the held-out side because held-out pairs have their prompt.
    """

    train: list[Rated] = field(default_factory=list)
    val: list[Rated] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    num_rows: int = 0
    num_duplicates: int = 0
    num_moved: int = 0

    @property
    def objectives(self) -> tuple[str, ...]:
        """Every objective that some conversation is rated for, in order of their first appearance."""
        return tuple(dict.fromkeys(name for rated in (*self.train, *self.val) for name in rated.ratings))

    def report(self) -> dict[str, Any]:
        """For the run's card: rows, and for each objective how many are rated and in what range."""
        every = [*self.train, *self.val]
        return {
            "rows": self.num_rows,
            "conversations": len(every),
            "duplicates": self.num_duplicates,
            "train": len(self.train),
            "val": len(self.val),
            "val_because_of_held_out_pairs": self.num_moved,
            "not_used": dict(Counter(row.reason for row in self.quarantine)),
            "objectives": {name: _told(name, every) for name in self.objectives},
        }


def _told(name: str, every: Sequence[Rated]) -> dict[str, float]:
    values = [rated.ratings[name] for rated in every if name in rated.ratings]
    return {
        "rated": len(values),
        "missing": len(every) - len(values),
        "least": min(values),
        "mean": sum(values) / len(values),
        "most": max(values),
    }


def load_ratings(patterns: str | Path | Sequence[str | Path], *, max_bad_share: float = 0.01) -> Ratings:
    """All rated conversations of files, folders and globs, undivided: `train` has all of them.

    A row is kept whole or quarantined whole. A conversation that stands in the data twice with the same ratings counts
    once; with other ratings it is one more opinion and stays.

    Raises:
        DataError: nothing to read, no usable row, or more than `max_bad_share` bad rows.
    """
    kept: dict[str, Rated] = {}
    quarantine: list[Quarantined] = []
    num_rows = num_conversations = 0
    for item in (item for path in find_sources(patterns).sources for item in read_rows(path)):
        num_rows += 1
        if isinstance(item, BadRow):
            quarantine.append(Quarantined(item.file, item.line, NO_DOMAIN, item.reason, "", item.detail))
            continue
        try:
            found = rated_in(item)
        except RowError as error:
            quarantine.append(Quarantined(item.file, item.line, NO_DOMAIN, error.code, error.field, error.detail))
            continue
        num_conversations += len(found)
        for rated in found:
            kept.setdefault(_key(rated), rated)
    _refuse_bad(quarantine, num_rows, len(kept), max_bad_share)
    return Ratings(list(kept.values()), [], quarantine, num_rows, num_conversations - len(kept))


def _key(rated: Rated) -> str:
    said = rated.conversation
    return text_key(said.prompt, said.response, repr(sorted(rated.ratings.items())), repr(said.tools))


def _refuse_bad(quarantine: Sequence[Quarantined], num_rows: int, num_kept: int, max_bad_share: float) -> None:
    if num_kept and len(quarantine) <= max_bad_share * num_rows:
        return
    raise DataError(
        f"data.ratings: {len(quarantine)} of {num_rows} rows are bad and {num_kept} conversations can be used; "
        f"data.max_bad_share allows {max_bad_share:.1%}." + "".join(f"\n  {row}" for row in quarantine[:5])
    )


def divided(ratings: Ratings, held_out: Sequence[Preference] = ()) -> Ratings:
    """A fifth held out by prompt group, as the paper; whatever has the prompt of a held-out pair is held out too."""
    pseudo = [_as_preference(rated, i) for i, rated in enumerate(ratings.train)]
    sides = split_by_group(pseudo, {"train": 1 - VAL_SHARE, "val": VAL_SHARE}, seed=SEED)
    known = {_prompt_key(p.prompt) for p in held_out}
    moved = {p.id for p in sides["train"] if _prompt_key(p.prompt) in known}
    val = {p.id for p in sides["val"]} | moved
    train_rows = [rated for i, rated in enumerate(ratings.train) if str(i) not in val]
    val_rows = [rated for i, rated in enumerate(ratings.train) if str(i) in val]
    return Ratings(
        train_rows, val_rows, ratings.quarantine, ratings.num_rows, ratings.num_duplicates, num_moved=len(moved)
    )


def _as_preference(rated: Rated, number: int) -> Preference:
    """What the split asks of a row: its prompt, its group, and a response where the prompt is blank."""
    said = rated.conversation
    return Preference(prompt=said.prompt, chosen=said.response, rejected="", group=rated.group, id=str(number))


def _prompt_key(prompt: Text) -> str:
    one_turn = not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].get("role") == "user"
    return text_key(str(prompt[0].get("content") or "") if one_turn else prompt)  # type: ignore[union-attr]


# From a row to rated conversations


def rated_in(item: RawRow) -> list[Rated]:
    """The rated conversations of a row. Raises RowError where it has another layout, or a value that is no rating."""
    row = item.row
    if "completions" in row and "instruction" in row:
        found = list(_ultrafeedback(row))
    elif "ratings" in row:
        found = [(_response(row), _own(row))]
    elif "response" in row and any(name in row for name in HELPSTEER):
        found = [(_response(row), _helpsteer(row))]
    else:
        raise RowError("unknown_shape", "", f"no layout of ratings has the columns {', '.join(sorted(row)) or 'none'}")
    prompt = text_or_turns(required(row, "instruction" if "instruction" in row else "prompt"), "prompt")
    if not any(ratings for _, ratings in found):
        raise RowError("bad_rating", "", "nothing is rated")
    source = f"{item.file}:{item.line}"
    return [_rated(row, prompt, response, ratings, source) for response, ratings in found if ratings]


def _rated(row: Row, prompt: Text, response: Text, ratings: Mapping[str, float], source: str) -> Rated:
    conversation = Conversation(
        prompt=prompt,
        response=response,
        id=name_of(row, "id"),
        domain=optional_text(row, "domain"),
        tools=tools_of(row.get("tools")),
        chat_template_kwargs=mapping_of(row, "chat_template_kwargs"),
    )
    return Rated(conversation=conversation, ratings=ratings, group=name_of(row, "group"), source=source)


def _response(row: Row) -> Text:
    response = text_or_turns(required(row, "response"), "response")
    if isinstance(response, str) and not response.strip():
        raise RowError("empty_response", "response", "is empty or only blanks")
    return response


def _helpsteer(row: Row) -> dict[str, float]:
    values = {name: _number(row[name], name, 0, 4) for name in HELPSTEER if row.get(name) is not None}
    return {f"helpsteer-{name}": (value + 0.5) / 5 for name, value in values.items()}


def _ultrafeedback(row: Row) -> Iterator[tuple[Text, dict[str, float]]]:
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(one, Mapping) for one in completions):
        raise RowError("wrong_type", "completions", f"expected a list of objects, got {type(completions).__name__}")
    for one in completions:
        ratings = {}
        if one.get("overall_score") is not None:
            ratings["ultrafeedback-overall_score"] = (_number(one["overall_score"], "overall_score", 1, 10) - 1) / 9
        annotations = mapping_of(one, "annotations")
        for name in ULTRAFEEDBACK:
            given = mapping_of(annotations, name).get("Rating")
            if given is not None and given != "N/A":
                ratings[f"ultrafeedback-{name}"] = (_number(given, name, 1, 5) - 1) / 4
        yield _response(one), ratings


def _own(row: Row) -> dict[str, float]:
    low, high = _scale(row.get("scale"))
    given = {text_of(name, "ratings"): value for name, value in mapping_of(row, "ratings").items()}
    values = {name: _number(value, name, low, high) for name, value in given.items() if value is not None}
    return {name: (value - low) / (high - low) for name, value in values.items()}


def _scale(value: Any) -> tuple[float, float]:
    if value is None:
        return 0.0, 1.0
    sound = isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
    if not sound or not value[0] < value[1]:
        raise RowError("bad_rating", "scale", f"expected [lowest, highest], got {shown(value)}")
    return float(value[0]), float(value[1])


def _number(value: Any, name: str, low: float, high: float) -> float:
    """A rating, also where it is written as text (UltraFeedback), or true and false for 1 and 0."""
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        number = None
    if number is None or not low <= number <= high:  # NaN is in no range
        raise RowError("bad_rating", name, f"expected a number from {low:g} to {high:g}, got {shown(value)}")
    return number
