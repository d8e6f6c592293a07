"""The long rows of the table of faults: `make soak`, about an hour; each prints its figures.

MOREWARD_SOAK_SHARE=0.01 runs a hundredth of each, to see that it works.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moreward.scoring import Scorer, load
from moreward.types import Preference
from serving import Live, serving
from soaking import both, compositions, flood, many, mixed_up
from trained import trained

SHARE = float(os.environ.get("MOREWARD_SOAK_SHARE", "1"))
MB = 1e6

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]


def part(whole: float) -> int:
    return max(8, round(whole * SHARE))


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], Path], pairs: Sequence[Preference]
) -> Path:
    """Four experts."""
    more = [replace(p, domain=f"{p.domain}-2", id=f"{p.id}-2", prompt=f"Again: {p.prompt}") for p in pairs]
    folder = tmp_path_factory.mktemp("soak")
    return trained(folder, tiny_backbone, [*pairs, *more], "arliss", "bert", "seed=4")


@pytest.fixture(scope="module")
def scorer(run: Path) -> Scorer:
    return load(run, deterministic=True)


@pytest.fixture(scope="module")
def live(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(run, tmp_path_factory.mktemp("log") / "log") as live:
        yield live


def say(text: str) -> None:
    sys.__stdout__.write(f"\n{text}\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def test_s12_1000_shuffled_batches(live: Live, scorer: Scorer) -> None:
    num = part(1000)
    different = compositions(live, scorer, num)
    say(f"S12: {num} compositions, {different} rewards differ")
    assert different == 0


def test_s13_16_threads_4_experts_1000_requests(live: Live, scorer: Scorer) -> None:
    assert len(scorer.experts) == 4
    wrong, of = mixed_up(live, scorer, part(1000))
    say(f"S13: {wrong} of {of} wrong")
    assert wrong == 0


def test_s1_memory_at_ten_times_the_load(run: Path, tmp_path: Path) -> None:
    """The growth is counted from a first burst on, which fills what is allocated once for each connection."""
    with serving(run, tmp_path / "log", limits={"queue_items": 16}) as live:
        cold = both(live)["http"]
        flood(live, 5, num_clients=40)
        warm = both(live)["http"]
        codes = flood(live, part(60), num_clients=40)
        end = both(live)["http"]
    say(f"S1: {dict(codes)}; {(warm - cold) / MB:+.1f} MB in the first burst, {(end - warm) / MB:+.1f} MB after it")
    assert {*codes} == {200, 503}
    assert end - warm < 20 * MB


def test_s17_100000_requests(live: Live) -> None:
    many(live, part(5000))
    start = both(live)
    num = part(100_000)
    many(live, num)
    end = both(live)
    grown = {name: end[name] - start[name] for name in start}
    told = ", ".join(
        f"{name} {value / MB:+.1f} MB ({value / num:.0f} bytes a request)" for name, value in grown.items()
    )
    say(f"S17: {num} requests: {told}")
    assert max(grown.values()) < 50 * MB
    if num >= 50_000:  # below, a page more or less weighs too much
        assert max(grown.values()) < 1000 * num


def test_s7_ten_minutes_of_fuzzing(live: Live, tmp_path: Path) -> None:
    """On the server's own description: no answer of 500 or more, and the server lives."""
    if (command := shutil.which("schemathesis") or os.environ.get("MOREWARD_SCHEMATHESIS")) is None:
        pytest.skip("schemathesis is not installed: pip install 'moreward[soak]'")
    done = subprocess.run(
        [
            *(command, "run", f"{live.url}/openapi.json", "--checks", "not_a_server_error"),
            *("--max-time", str(part(600)), "--max-examples", "500", "--exclude-path", "/admin/reload"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    say("S7: " + "\n".join(done.stdout.splitlines()[-15:]))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    with live.client() as client:
        assert client.get("/readyz").status_code == 200
        assert client.post("/classify", json={"input": "a"}).status_code == 200
