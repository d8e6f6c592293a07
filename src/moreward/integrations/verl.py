"""A reward function for verl: `reward.custom_reward_function.path=.../moreward/integrations/verl.py`, name
`compute_score`. $MOREWARD_MODEL is the folder of a run or the address of a server. As of verl 0.9.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moreward.errors import DataError
from moreward.integrations.source import opened

PROMPT_KEYS = ("prompt", "question")


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any = None, extra_info: Mapping[str, Any] | None = None, **_: Any
) -> dict[str, Any]:
    """The same keys for every row: verl takes the first row's for all. DataError where no prompt is given, since verl
    itself does not pass it."""
    told = extra_info or {}
    prompt = next((told[key] for key in PROMPT_KEYS if told.get(key)), None)
    if prompt is None:
        raise DataError(
            "extra_info has no prompt, and verl passes none. Add a column `extra_info` with `prompt` (text or turns) "
            f"to the data (got {sorted(told)})"
        )
    item = {"prompt": prompt, "response": _like(prompt, solution_str), "domain": str(data_source or "")}
    reward = opened().score([item])[0]
    return {"score": reward.number, "expert": reward.expert, "truncated": float(reward.truncated)}


def _like(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
