"""Conversations as users have them at hand, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from moreward.errors import DataError
from moreward.types import Conversation, Rendered, Text

Item: TypeAlias = "Conversation | Rendered | Mapping[str, Any] | tuple[Text, Text]"
ITEM_KEYS = ("prompt", "response", "id", "domain", "tools", "chat_template_kwargs", "meta")


def as_text(value: Any) -> Text:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"expected text or a list of messages, got {type(value).__name__}")
    for place, turn in enumerate(value):
        role, content = turn.get("role"), turn.get("content")
        if not isinstance(role, str):
            raise DataError(f"message {place}: role must be a string (got {type(role).__name__})")
        if content is not None and not isinstance(content, str):
            raise DataError(f"message {place}: content must be a string or None (got {type(content).__name__})")
    return tuple(value)


def as_conversation(item: Item, index: int) -> Conversation | Rendered:
    """Accept what users have at hand. DataError names the item."""
    if isinstance(item, Rendered):
        return item
    try:
        conversation = _converted(item)
        given = (conversation.prompt, conversation.response, conversation.tools, conversation.chat_template_kwargs)
        json.dumps(given, ensure_ascii=False, default=dict).encode()  # half a surrogate pair is in no text of ours
    except KeyError as error:
        raise DataError(f"items[{index}]: {error} is missing; needed are prompt and response") from None
    except (DataError, ValueError, TypeError) as error:
        raise DataError(f"items[{index}]: {error}") from None
    return conversation


def _converted(item: Conversation | Mapping[str, Any] | tuple[Text, Text]) -> Conversation:
    if isinstance(item, Conversation):
        return item
    if isinstance(item, tuple):
        prompt, response = item
        return Conversation(prompt=as_text(prompt), response=as_text(response))
    if not isinstance(item, Mapping):
        raise DataError(f"expected a Conversation, a mapping or (prompt, response), got {type(item).__name__}")
    if unknown := [key for key in item if key not in ITEM_KEYS]:
        raise DataError(f"unknown key {unknown[0]!r}. Known: {', '.join(ITEM_KEYS)}.")
    tools, options = item.get("tools"), item.get("chat_template_kwargs") or {}
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools)):
        raise DataError("tools: expected a list of mappings")
    if not isinstance(options, Mapping):
        raise DataError(f"chat_template_kwargs: expected a mapping, got {type(options).__name__}")
    return Conversation(
        prompt=as_text(item["prompt"]),
        response=as_text(item["response"]),
        id=str(item.get("id", "")),
        domain=str(item.get("domain") or ""),
        tools=tools,
        chat_template_kwargs=options,
    )
