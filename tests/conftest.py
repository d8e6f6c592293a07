"""Fixtures for every test: no network, one thread, a cache of their own, tiny models, pairs that disagree."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from moreward.types import Preference

# Here and not in a fixture: torch and huggingface_hub read these once, when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, and no verdict from the clock: a busy machine is not a fault of the code.
settings.register_profile("moreward", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moreward")

_SUBJECTS = (
    "the sea",
    "a good tea",
    "the night sky",
    "old maps",
    "a train ride",
    "the violin",
    "fresh bread",
    "a winter garden",
    "the chess board",
    "a quiet library",
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Tests neither read nor fill the user's cache."""
    with tempfile.TemporaryDirectory(prefix="moreward-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOREWARD_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_backbone("bert")`: a folder with a tiny model of that kind, made once a session. Do not write into it."""
    from tiny import make_backbone  # loads torch and transformers, which many tests need not

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_backbone(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def pairs() -> tuple[Preference, ...]:
    """40 preferences of two domains that disagree: "short" prefers the short answer, "long" the long one.

    Every prompt stands in two pairs of the same domain; row i of "short" and row i of "long" have the same answers.
    """
    made = []
    for domain in ("short", "long"):
        for subject in _SUBJECTS:
            for word in ("calm", "bright"):
                short = f"It is {word}."
                long = f"It is {word}, and there is more to say of {subject}: people come back to it year after year."
                made.append(
                    Preference(
                        prompt=f"In the {domain} style, tell me about {subject}.",
                        chosen=short if domain == "short" else long,
                        rejected=long if domain == "short" else short,
                        domain=domain,
                        id=f"{domain}-{len(made)}",
                    )
                )
    return tuple(made)


@pytest.fixture(scope="session")
def make(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]
) -> Callable[..., Path]:
    """`make("arliss", "bert", "seed=1")`: the folder of a finished run, made once a session. Do not write into it."""
    from trained import trained

    return lambda *what: trained(tmp_path_factory.mktemp("runs"), tiny_backbone, pairs, *what)
