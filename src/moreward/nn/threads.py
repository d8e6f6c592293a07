"""The number of threads, set once for a process."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from moreward.errors import ConfigError

log = logging.getLogger(__name__)


@cache
def settle_threads() -> int:
    """Set the threads that `$MOREWARD_THREADS` asks for, else leave torch's own choice (`$OMP_NUM_THREADS`, else one
    for each core), and say it in the log. Called before the first model is built: the choice of products depends on
    it. Returns their number."""
    wanted = os.environ.get("MOREWARD_THREADS")
    if wanted is not None:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise ConfigError(f"MOREWARD_THREADS: must be a whole number from 1 (got {wanted!r})")
        torch.set_num_threads(int(wanted))
    log.info("computing with %d threads", torch.get_num_threads())
    return torch.get_num_threads()
