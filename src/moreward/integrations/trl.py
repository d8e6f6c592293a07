"""Rewards for TRL's `reward_funcs` (GRPO, RLOO), in process or from a server.

    trainer = GRPOTrainer(model, reward_funcs=MorewardReward("runs/a"), train_dataset=...)

As of TRL 1.16: a reward function is called with keywords, every column of the data set but `prompt` and `completion`
among them; `None` leaves a row out; `log_metric` and `log_extra` are there where the trainer has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from moreward.client import AsyncClient
from moreward.errors import DataError, ServerError
from moreward.integrations.source import MISSING_SHARE, Budget, opened
from moreward.types import Reward

LogMetric = Callable[[str, float], None]
LogExtra = Callable[[str, list[Any]], None]


class MorewardReward:
    """A run in this process as a reward function. It pickles as the run's path and loads where it is first called.

    `name` is the metric's: `rewards/NAME/mean`. `domain_column` names the column that says where a row comes from; it
    is only a hint, for what the run's calibration and reports know of domains.
    """

    def __init__(
        self, run: str, *, name: str = "moreward", domain_column: str = "domain", truncate: bool = True
    ) -> None:
        self.__name__ = name
        self.run, self.domain_column = run, domain_column
        self.on_long = "truncate" if truncate else "error"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: LogMetric | None = None,
        log_extra: LogExtra | None = None,
        **columns: Any,
    ) -> list[float]:
        items = items_of(prompts, completions, columns.get(self.domain_column))
        rewards = opened(self.run, self.on_long).score(items)
        tell(rewards, log_metric, log_extra)
        return [reward.number for reward in rewards]


class RemoteReward:
    """A server as a reward function; TRL runs asynchronous functions beside each other.

    Broken connections and a busy server are tried again. What is missing after that is None, and more than
    `missing_share` of such rows is a ServerError: training would go on with what is left, without a word.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        name: str = "moreward",
        domain_column: str = "domain",
        truncate: bool = True,
        missing_share: float = MISSING_SHARE,
        **client: Any,
    ) -> None:
        """`client` are further arguments of `AsyncClient`: `timeout`, `retries`, `batch`, `at_once`."""
        self.__name__ = name
        self.url, self.domain_column = url, domain_column
        self.client = {"key": key, "on_long": "truncate" if truncate else "error", **client}
        self.budget = Budget(missing_share)

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: LogMetric | None = None,
        log_extra: LogExtra | None = None,
        **columns: Any,
    ) -> list[float | None]:
        items = items_of(prompts, completions, columns.get(self.domain_column))
        values: list[float | None]
        try:
            async with AsyncClient(self.url, **self.client) as client:  # a loop of its own for each call
                rewards = await client.score(items)
        except ServerError as error:
            values = [None] * len(items)
            self.budget.spend(values, str(error))
            return values
        tell(rewards, log_metric, log_extra)
        values = [reward.reward for reward in rewards]
        self.budget.spend(values, next((r.abstained for r in rewards if r.reward is None), ""))
        return values


def items_of(prompts: Sequence[Any], completions: Sequence[Any], domains: Any) -> list[dict[str, Any]]:
    """Texts stay texts, turns stay turns. DataError where the columns do not belong together."""
    if len(prompts) != len(completions):
        raise DataError(f"{len(prompts)} prompts and {len(completions)} completions: as many of each are needed")
    hints = domains if isinstance(domains, list) and len(domains) == len(prompts) else [""] * len(prompts)
    return [
        {"prompt": prompt, "response": completion, "domain": str(hint or "")}
        for prompt, completion, hint in zip(prompts, completions, hints, strict=True)
    ]


def tell(rewards: Sequence[Reward], log_metric: LogMetric | None, log_extra: LogExtra | None) -> None:
    """The share of each expert, and what was cut, as metrics; each row's expert and reward in the completions table."""
    experts = [reward.expert for reward in rewards]
    if log_metric is not None:
        for expert, num in sorted(Counter(experts).items()):
            if expert:
                log_metric(f"moreward/{expert}/share", num / len(rewards))
        log_metric("moreward/truncated", sum(reward.truncated for reward in rewards) / max(len(rewards), 1))
    if log_extra is not None:
        if any(experts):
            log_extra("expert", experts)
        log_extra("reward_raw", [reward.reward for reward in rewards])
