"""A reward file for OpenRLHF: `--reward.remote_url .../moreward/integrations/openrlhf.py`.

$MOREWARD_MODEL is the folder of a run, loaded in the process, or the address of a server. For a server without this
file, give its `/get_reward` as the remote URL. As of OpenRLHF 0.11.2, which calls `reward_func` in a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moreward.errors import ServerError
from moreward.integrations.source import Budget, opened
from moreward.types import Rendered

BUDGET = Budget()


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Any = None, **_: Any) -> dict[str, Any]:
    """`queries` hold prompt and response as the policy's tokenizer joined them; where `prompts` begin them they are
    what a router reads. `scores` lie in [0, 1]. Values of `extra_logs` are numbers: others would stop the trainer."""
    import torch

    items = [_item(query, prompt) for query, prompt in zip(queries, prompts or [""] * len(queries), strict=True)]
    try:
        rewards = opened().score(items)
    except ServerError as error:
        BUDGET.spend([None] * len(items), str(error))
        raise
    BUDGET.spend([reward.reward for reward in rewards], "")
    values = [reward.number for reward in rewards]
    return {
        "rewards": torch.tensor(values),
        "scores": torch.tensor([1 / (1 + math.exp(-value)) for value in values]),
        "extra_logs": {"moreward_truncated": [float(reward.truncated) for reward in rewards]},
    }


def _item(query: str, prompt: str) -> Any:
    if prompt and query.startswith(prompt):
        return (prompt, query[len(prompt) :])
    return Rendered(text=query)
