"""One server for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from moreward.scoring import Scorer, load
from serving import Live, serving

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def run(make: Make) -> Path:
    return make("arliss")


@pytest.fixture(scope="session")
def scorer(run: Path) -> Scorer:
    return load(run, deterministic=True)


@pytest.fixture(scope="session")
def live(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with serving(run, log, names=["mixture", "alias"]) as live:
        yield live


@pytest.fixture(scope="session")
def client(live: Live) -> Iterator[httpx2.Client]:
    with live.client() as client:
        yield client
