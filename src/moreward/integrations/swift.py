"""A plugin for ms-swift: `--external_plugins .../moreward/integrations/swift.py --reward_funcs moreward`.

$MOREWARD_MODEL is the folder of a run or the address of a server. As of ms-swift 4.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moreward.errors import DataError
from moreward.integrations.source import opened

try:
    from swift.rewards import ORM, orms  # type: ignore[import-not-found]
except ImportError:  # other versions keep it elsewhere; the class is the same callable in all of them
    ORM, orms = object, {}


class MorewardORM(ORM):  # type: ignore[misc]
    """Called with the completions of a step; `messages` are the turns before each."""

    def __init__(self, args: Any = None, **_: Any) -> None:
        self.args = args

    def __call__(self, completions: Sequence[str], messages: Sequence[Any] | None = None, **_: Any) -> list[float]:
        if messages is None or len(messages) != len(completions):
            raise DataError("messages: the turns before each completion are needed; keep the column in the data")
        items = [
            {"prompt": _before(turns, text), "response": [{"role": "assistant", "content": text}]}
            for turns, text in zip(messages, completions, strict=True)
        ]
        return [reward.number for reward in opened().score(items)]


def _before(turns: Sequence[Any], text: str) -> list[Any]:
    """The turns without the completion, which some versions put at the end of them already."""
    last = turns[-1] if turns else {}
    is_there = last.get("role") == "assistant" and last.get("content") == text
    return list(turns[:-1] if is_there else turns)


orms["moreward"] = MorewardORM
