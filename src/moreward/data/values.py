"""The values of a row, read strictly: what is not as it should be raises `RowError`, whose `code` stands in
`reasons.py`. Nothing is coerced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from moreward.errors import DataError
from moreward.types import Message, Text

Row: TypeAlias = Mapping[str, Any]
Turns: TypeAlias = tuple[Message, ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MARGIN = 100.0

_TURN_EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content")


class RowError(DataError):
    """One row cannot be used: `code` is the reason, `field` the column, `detail` what was expected and given."""

    def __init__(self, code: str, field: str, detail: str) -> None:
        self.code, self.field, self.detail = code, field, detail
        super().__init__(f"{field}: {detail}" if field else detail)


def required(row: Row, name: str) -> Any:
    """The value of a column; absent or null is `missing_field`."""
    value = row.get(name)
    if value is None:
        raise RowError("missing_field", name, "is missing or null")
    return value


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", name, f"expected string, got {type(value).__name__}")
    return value


def optional_text(row: Row, name: str) -> str:
    """The text of a column; absent or null is an empty string."""
    value = row.get(name)
    return "" if value is None else text_of(value, name)


def turns_of(value: Any, name: str) -> Turns:
    """Message turns with known roles and text contents."""
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", name, f"expected messages, got {type(value).__name__}")
    if not value:
        raise RowError("empty_conversation", name, "has no turns")
    return tuple(_turn(item, f"{name}[{i}]") for i, item in enumerate(value))


def text_or_turns(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return turns_of(value, name)
    raise RowError("wrong_type", name, f"expected string or messages, got {type(value).__name__}")


def _turn(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError("wrong_type", name, f"expected a message with role and content, got {type(item).__name__}")
    role = item.get("role")
    if role not in ROLES:
        raise RowError("bad_role", f"{name}.role", f"expected one of {', '.join(ROLES)}, got {shown(role)}")
    extras = {key: item[key] for key in _TURN_EXTRAS if item.get(key) is not None}
    content = item.get("content")
    if content is None and extras.get("tool_calls"):
        content = ""
    return {"role": role, "content": content_of(content, f"{name}.content"), **extras}


def content_of(value: Any, name: str) -> str:
    """A turn's text: a string, or text parts one after the other."""
    if isinstance(value, str):
        return value
    if value is None:
        raise RowError("missing_field", name, "is missing or null")
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", name, f"expected string or text parts, got {type(value).__name__}")
    return "".join(_part(part, f"{name}[{i}]") for i, part in enumerate(value))


def _part(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise RowError("unsupported_content", name, f"only text parts can be read, got {shown(kind)}")
    return text_of(required(part, "text"), f"{name}.text")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# Columns that any row may have


def name_of(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RowError("wrong_type", column, f"expected string or whole number, got {type(value).__name__}")
    return str(value)


def margin_of(row: Row) -> float | None:
    if "margin" not in row:
        return None
    value = row["margin"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("bad_margin", "margin", f"expected a number, got {shown(value)}")
    if not abs(value) <= MAX_MARGIN:  # so that NaN is caught too
        raise RowError("bad_margin", "margin", f"must be finite and within ±{MAX_MARGIN:g}, got {shown(value)}")
    return float(value)


def tools_of(value: Any) -> list[Mapping[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError as error:
            raise RowError("wrong_type", "tools", "expected a list or a list as JSON text") from error
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("wrong_type", "tools", f"expected a list of tool descriptions, got {type(value).__name__}")
    return value or None


def mapping_of(row: Row, column: str) -> Mapping[str, Any]:
    value = row.get(column)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError("wrong_type", column, f"expected an object, got {type(value).__name__}")
    return value
