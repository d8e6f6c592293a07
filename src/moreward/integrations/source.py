"""Where a trainer's rewards come from, a run in this process or a server; and what a missing reward may cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from moreward.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from moreward.client import Client
    from moreward.scoring import Scorer

VARIABLE = "MOREWARD_MODEL"
MISSING_SHARE = 0.01


@lru_cache(maxsize=4)
def opened(model: str = "", on_long: str = "truncate") -> Scorer | Client:
    """A run's folder is loaded, an address is asked; empty is what $MOREWARD_MODEL says. Kept for the next call."""
    model = model or os.environ.get(VARIABLE, "")
    if not model:
        raise ConfigError(f"no model: set {VARIABLE} to the folder of a run, or to http://HOST:PORT of a server")
    if model.startswith(("http://", "https://")):
        from moreward.client import Client

        return Client(model, on_long=on_long)
    from moreward.scoring import load

    scorer = load(model)
    scorer.on_long = on_long
    return scorer


class Budget:
    """Counts rewards that never came. A trainer that learns from half of them learns something else, so beyond
    `share` of all rows so far (and never for a single lost one in the first hundred) it is an error."""

    def __init__(self, share: float = MISSING_SHARE) -> None:
        if not 0 <= share < 1:
            raise ConfigError(f"missing_share: at least 0 and less than 1 (got {share})")
        self.share, self.num_rows, self.num_missing = share, 0, 0

    def spend(self, values: Sequence[float | None], why: str) -> None:
        """ServerError when too many are None."""
        self.num_rows += len(values)
        self.num_missing += sum(value is None for value in values)
        if self.num_missing > self.share * max(self.num_rows, 1 / self.share if self.share else 1):
            raise ServerError(
                f"{self.num_missing} of {self.num_rows} rewards are missing, more than {self.share:.0%}. The last "
                f"reason: {why}"
            )
