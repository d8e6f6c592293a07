"""Unlabelled conversations: prompts with one response or several, every row accounted for as in `load`.

Layouts, told by their columns: `prompt` and `response`; `prompt` and `responses`, a list; any layout of preference
pairs, of which both responses are taken and what was preferred is forgotten. The domain is found as for pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moreward.data.formats import convert_row, find_shape
from moreward.data.load import FORMATS, Quarantined, domain_of_file
from moreward.data.reasons import NOT_BAD
from moreward.data.rows import BadRow, RawRow
from moreward.data.sources import find_sources, read_rows
from moreward.data.split import split_by_group
from moreward.data.values import RowError, mapping_of, name_of, optional_text, required, text_or_turns, tools_of
from moreward.errors import DataError
from moreward.types import NO_DOMAIN, Conversation, Preference, Rated, Text, text_key


@dataclass(frozen=True)
class Texts:
    """Conversations, each once, without ratings; rows that were not usable; `num_repeated` stood in the data twice."""

    rows: list[Rated] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    num_rows: int = 0
    num_repeated: int = 0


def load_texts(
    patterns: str | Path | Sequence[str | Path],
    *,
    domain_key: str | None = None,
    shape: str | None = None,
    max_bad_share: float = 0.01,
) -> Texts:
    """All conversations of files, folders and globs. `shape` is the layout of pairs, where it cannot be told.

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
            found = list(texts_in(item, domain_key or "", shape))
        except RowError as error:
            quarantine.append(Quarantined(item.file, item.line, NO_DOMAIN, error.code, error.field, error.detail))
            continue
        num_conversations += len(found)
        for one in found:
            said = one.conversation
            kept.setdefault(text_key(said.prompt, said.response, repr(said.tools)), one)
    bad = [row for row in quarantine if row.reason not in NOT_BAD]
    if not kept or len(bad) > max_bad_share * num_rows:
        counts = ", ".join(f"{reason} {n}" for reason, n in Counter(row.reason for row in bad).most_common())
        raise DataError(
            f"--texts: {len(kept)} conversations in {num_rows} rows, {len(bad)} of them bad ({counts or 'none'}); "
            f"{max_bad_share:.1%} may be. Rows have prompt and response, prompt and responses, or are pairs."
            + "".join(f"\n  {row}" for row in bad[:5])
        )
    return Texts(list(kept.values()), quarantine, num_rows, num_conversations - len(kept))


def texts_in(item: RawRow, domain_key: str = "", shape: str | None = None) -> Iterator[Rated]:
    """The conversations of a row. Raises RowError where it has another layout, or an empty text."""
    row, source = item.row, f"{item.file}:{item.line}"
    domain = (optional_text(row, domain_key) if domain_key else "") or domain_of_file(item.file)
    if "prompt" in row and ("response" in row or "responses" in row):
        prompt = text_or_turns(required(row, "prompt"), "prompt")
        responses = _responses(row)
        for name, text in (("prompt", prompt), *(("response", one) for one in responses)):
            if not (text.strip() if isinstance(text, str) else text):
                raise RowError(f"empty_{name}", name, "is empty or only blanks")
        for number, response in enumerate(responses):
            conversation = Conversation(
                prompt=prompt,
                response=response,
                id=name_of(row, "id") and f"{name_of(row, 'id')}/{number}",
                domain=optional_text(row, "domain") or domain or NO_DOMAIN,
                tools=tools_of(row.get("tools")),
                chat_template_kwargs=mapping_of(row, "chat_template_kwargs"),
            )
            yield Rated(conversation=conversation, ratings={}, group=name_of(row, "group"), source=source)
        return
    told = find_shape(shape, FORMATS) if shape else None
    for pair in convert_row(row, shape=told, domain=domain, source=source).preferences:
        for response in (pair.chosen, pair.rejected):
            conversation = Conversation(
                prompt=pair.prompt,
                response=response,
                domain=pair.domain,
                tools=pair.tools,
                chat_template_kwargs=pair.chat_template_kwargs,
            )
            yield Rated(conversation=conversation, ratings={}, group=pair.group, source=source)


def _responses(row: dict[str, object]) -> list[Text]:
    if "response" in row:
        return [text_or_turns(required(row, "response"), "response")]
    given = required(row, "responses")
    if not isinstance(given, list) or not given:
        raise RowError("wrong_type", "responses", f"expected a list of responses, got {type(given).__name__}")
    return [text_or_turns(one, f"responses[{i}]") for i, one in enumerate(given)]


def divided_texts(rows: Sequence[Rated], share: float, seed: int) -> tuple[list[Rated], list[Rated]]:
    """To learn from and to judge by: about `share` of every domain is held out, whole prompts and groups."""
    pseudo = [
        Preference(
            prompt=one.conversation.prompt,
            chosen=one.conversation.response,
            rejected="",
            domain=one.conversation.domain,
            group=one.group,
            id=str(i),
        )
        for i, one in enumerate(rows)
    ]
    sides = split_by_group(pseudo, {"train": 1 - share, "val": share}, seed=seed)
    train, val = ([rows[int(p.id)] for p in sides[side]] for side in ("train", "val"))
    return train, val


def rated_by(rows: Sequence[Rated], name: str, values: Sequence[float]) -> list[Rated]:
    """The same conversations with what a model says of them."""
    return [replace(one, ratings={name: value}) for one, value in zip(rows, values, strict=True)]
