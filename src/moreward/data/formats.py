"""From a row to preferences: which shape it has, and what every shape has in common."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moreward.data.shapes import SHAPES, UNDECLARED, Judged, Shape, check_ends
from moreward.data.values import Row, RowError, mapping_of, margin_of, name_of, optional_text, tools_of
from moreward.errors import ConfigError
from moreward.types import NO_DOMAIN, Preference, Text

MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
LABEL_COLUMNS = ("subset", "task_name", "channel", "data_source")
"""Columns that say where a row belongs; kept in `Preference.meta`, and usable as `domain_key`."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Converted:
    """The pairs of one row. Ties are counted and give no pair."""

    preferences: list[Preference]
    num_ties: int = 0


# Which shape


def detect(row: Row) -> str:
    """The name of the shape that explains most of this row's columns.

    Raises:
        RowError: `missing_field` when a known shape lacks a column, `unknown_shape` when nothing fits,
            `ambiguous_shape` (with the candidates) when several fit equally well.
    """
    columns = frozenset(row)
    fits = {
        name: (len(columns & (shape.needs | shape.often)), shape.claims is not None)
        for name, shape in SHAPES.items()
        if shape.needs <= columns and (shape.claims is None or shape.claims(row))
    }
    if not fits:
        raise _no_shape(columns)
    best = max(fits.values())
    names = sorted(name for name, fit in fits.items() if fit == best)
    if len(names) > 1:
        raise RowError(
            "ambiguous_shape",
            "",
            f"columns {', '.join(sorted(columns))} could be {' or '.join(names)}; say which with --format",
        )
    return names[0]


def find_shape(name: str, shapes: Mapping[str, Shape] = SHAPES) -> Shape:
    """The shape of that name, or a `ConfigError` with the nearest and all known ones."""
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"Unknown format {name!r}.{hint} Known: {', '.join(sorted(shapes))}.")
    return shapes[name]


def _no_shape(columns: frozenset[str]) -> RowError:
    """Names the column that the nearest shape lacks."""
    if "messages" in columns:
        return RowError("missing_field", "rejected_response", "is missing; messages alone hold no preference")
    name = max(SHAPES, key=lambda n: (len(SHAPES[n].needs & columns), -len(SHAPES[n].needs - columns)))
    missing = sorted(SHAPES[name].needs - columns)
    if len(missing) < len(SHAPES[name].needs):
        return RowError("missing_field", missing[0], f"is missing (nearest shape: {name})")
    found = ", ".join(sorted(columns)) or "none"
    return RowError("unknown_shape", "", f"no known shape has the columns {found}; known: {', '.join(SHAPES)}")


# From a row to preferences


def convert(row: Row, *, shape: str | Shape | None = None, fields: Mapping[str, str] = _NOTHING) -> list[Preference]:
    """The pairs that a row holds: one, or several from ranked or many answers, or none if all are ties.

    `shape` names an entry of `SHAPES` (default: detected). `fields` renames columns first, from our name to
    the row's, as in `{"prompt": "question", "chosen": "good"}`.

    Raises:
        RowError: the row cannot be used; `code` says why.
    """
    return convert_row(row, shape=shape, fields=fields).preferences


def convert_row(
    row: Row,
    *,
    shape: str | Shape | None = None,
    fields: Mapping[str, str] = _NOTHING,
    domain: str = "",
    source: str = "",
    allow_empty_prompt: bool = False,
    allow_token_ids: bool = False,
) -> Converted:
    """`convert` with the number of ties. `domain` is for rows that name none; `source` is `file:line`."""
    row = _renamed(row, fields)
    kind = shape if isinstance(shape, Shape) else find_shape(shape or detect(row))
    if media := [name for name in MEDIA_COLUMNS if row.get(name)]:
        raise RowError("unsupported_content", media[0], "only text can be read")
    judged = kind.read(row)
    if judged.token_ids is not None and not allow_token_ids:
        raise RowError("pretokenized", "", UNDECLARED)
    if kind.has_prompt and not allow_empty_prompt and _is_blank(judged.prompt):
        raise RowError("empty_prompt", "prompt", "is empty; empty prompts need allow_empty_prompt")
    for chosen, rejected in judged.pairs if judged.token_ids is None else ():
        _check_pair(chosen, rejected)
    own = "" if kind.domain else optional_text(row, "domain")
    domain = own or domain or kind.domain or NO_DOMAIN
    return Converted(_preferences(row, judged, domain=domain, source=source), judged.num_ties)


def _renamed(row: Row, fields: Mapping[str, str]) -> Row:
    if not fields:
        return row
    if absent := [theirs for theirs in fields.values() if theirs not in row]:
        raise RowError("missing_field", absent[0], "is missing")
    rest = {name: value for name, value in row.items() if name not in fields.values()}
    return rest | {ours: row[theirs] for ours, theirs in fields.items()}


def _check_pair(chosen: Text, rejected: Text) -> None:
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str):
            check_ends(text, name)
        if _is_blank(text):
            raise RowError(f"empty_{name}", name, "is empty or only blanks")
    if chosen == rejected:
        raise RowError("identical", "rejected", "is the same as chosen")


def _is_blank(text: Text) -> bool:
    """A conversation is judged by its last turn, in which a tool call counts as something said."""
    if isinstance(text, str):
        return not text.strip()
    return not text or not (text[-1]["content"].strip() or text[-1].get("tool_calls"))


def _preferences(row: Row, judged: Judged, *, domain: str, source: str) -> list[Preference]:
    name, margin, tools = name_of(row, "id"), margin_of(row), tools_of(row.get("tools"))
    kwargs = mapping_of(row, "chat_template_kwargs")
    labels = {column: row[column] for column in LABEL_COLUMNS if row.get(column) is not None}
    meta = {**labels, **judged.meta, **mapping_of(row, "meta")}
    several = len(judged.pairs) > 1
    return [
        Preference(
            prompt=judged.prompt,
            chosen=chosen,
            rejected=rejected,
            domain=domain,
            id=f"{name}#{i}" if several and name else name,
            margin=margin,
            capability=name_of(row, "capability"),
            group=judged.group or name_of(row, "group"),
            source=source,
            tools=tools,
            chat_template_kwargs=kwargs,
            meta=meta,
            token_ids=judged.token_ids,
        )
        for i, (chosen, rejected) in enumerate(judged.pairs)
    ]
