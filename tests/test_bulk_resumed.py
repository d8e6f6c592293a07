"""Bulk scoring that is stopped or killed: it goes on, asks for no row again and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from killing import Forks
from moreward.bulk import score_file
from moreward.errors import RunError, SpaceError
from moreward.types import Conversation, Reward
from rows import BatchScorer, TextScorer, read_rows, row, score, write_rows

SCORE = """
from pathlib import Path
from moreward.bulk import score_file
from rows import BatchScorer

def work(source, target, seconds):
    score_file(BatchScorer(float(seconds)), Path(source), Path(target), chunk=50, max_bad_share=1)
"""


class Stopping(TextScorer):
    """Stops the job, as Ctrl-C would, when asked for the row `at`."""

    def __init__(self, at: str, identity: str = "text-scorer-1") -> None:
        super().__init__(identity)
        self.at = at

    def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
        if any(item.id == self.at for item in items):
            raise KeyboardInterrupt
        return super().score(items, explain=explain)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A source of which 6 of 10 rows were scored, in chunks of 3."""
    source = write_rows(tmp_path / "in.jsonl", [row(n) for n in range(10)])
    with pytest.raises(KeyboardInterrupt):
        score_file(Stopping("r7"), source, tmp_path / "out.jsonl", chunk=3)
    return source


def test_a_stopped_job_goes_on_and_asks_for_no_row_again(unfinished: Path) -> None:
    scorer = TextScorer()
    report, lines = score(unfinished, scorer, chunk=3)
    assert scorer.calls == [["r6", "r7", "r8"], ["r9"]]
    assert (report.rows, report.scored, report.resumed_from) == (10, 10, 6)
    assert [line["id"] for line in lines] == [f"r{n}" for n in range(10)]


def test_another_model_source_or_option_is_refused_and_nothing_changes(unfinished: Path) -> None:
    folder = unfinished.parent
    other = write_rows(folder / "other.jsonl", [row(n) for n in range(11)])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    cases: list[tuple[str, Path, TextScorer, dict[str, Any]]] = [
        ("model was 'text-scorer-1', is 'text-scorer-2'", unfinished, TextScorer("text-scorer-2"), {"chunk": 3}),
        ("on_long was 'drop', is 'truncate'.*overwrite", unfinished, TextScorer(on_long="truncate"), {"chunk": 3}),
        ("source was ", other, TextScorer(), {"chunk": 3}),
        ("chunk was 3, is 4", unfinished, TextScorer(), {"chunk": 4}),
        ("explain was False, is True", unfinished, TextScorer(), {"chunk": 3, "explain": True}),
    ]
    for reason, source, scorer, options in cases:
        with pytest.raises(RunError, match=reason):
            score_file(scorer, source, folder / "out.jsonl", **options)
        assert scorer.calls == []
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    other.unlink()
    report, lines = score(unfinished, TextScorer("text-scorer-2"), chunk=4, overwrite=True)
    assert (report.resumed_from, len(lines)) == (0, 10)


def test_a_damaged_partial_or_record_is_refused(unfinished: Path) -> None:
    partial, record = (unfinished.with_name(f"out.jsonl.{end}") for end in ("partial", "progress.json"))
    kept = partial.read_bytes(), record.read_bytes()
    for path, data in [
        (partial, kept[0][:-1]),
        (partial, kept[0].replace(b"r2", b"r1")),
        (record, b""),
        (record, b"[]"),
        (record, b"{}"),
        (record, kept[1].replace(b'"rows": 6', b'"lines": 6')),
    ]:
        path.write_bytes(data)
        with pytest.raises(RunError, match="begin again"):
            score_file(TextScorer(), unfinished, unfinished.with_name("out.jsonl"), chunk=3)
        assert path.read_bytes() == data
        partial.write_bytes(kept[0])
        record.write_bytes(kept[1])
    partial.unlink()
    with pytest.raises(RunError, match="partial is not what was recorded"):
        score_file(TextScorer(), unfinished, unfinished.with_name("out.jsonl"), chunk=3)


def test_a_finished_output_is_not_overwritten_unasked(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row(n) for n in range(4)])
    target, scorer = tmp_path / "out.jsonl", TextScorer()
    target.write_text("precious")
    with pytest.raises(RunError, match="exists already"):
        score_file(scorer, source, target)
    assert (target.read_text(), scorer.calls, len(os.listdir(tmp_path))) == ("precious", [], 2)
    with pytest.raises(KeyboardInterrupt):
        score_file(Stopping("r3"), source, target, chunk=2, overwrite=True)
    assert target.read_text() == "precious", "the old file stays until the new one is whole"
    with pytest.raises(RunError, match="exists already"):
        score_file(scorer, source, target, chunk=2)
    report, lines = score(source, chunk=2, overwrite=True)
    assert (report.resumed_from, len(lines)) == (2, 4)


def test_a_source_that_changes_during_the_job_fails_it(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row(n) for n in range(4)])

    class Changing(TextScorer):
        def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
            rewards = super().score(items, explain=explain)
            with source.open("a") as file:
                file.write(json.dumps(row(9)) + "\n" if len(self.calls) == 1 else "")
            return rewards

    with pytest.raises(RunError, match="not those of the source"):
        score_file(Changing(), source, tmp_path / "out.jsonl", chunk=4)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_full_disk_stops_the_job_and_it_goes_on_later(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SpaceError, match="start again to resume"):
        score_file(TextScorer(), unfinished, unfinished.with_name("out.jsonl"), chunk=3)
    monkeypatch.undo()
    report, lines = score(unfinished, chunk=3)
    assert (report.resumed_from, [line["id"] for line in lines]) == (6, [f"r{n}" for n in range(10)])


# ---------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def scorers() -> Iterator[Forks]:
    with Forks(SCORE) as scorers:
        yield scorers


def many_rows(number: int) -> dict[str, object] | str:
    if number % 97 == 0:
        return '{"id": "cut'
    if number % 101 == 0:
        return ""
    return row(number, id=f"r{number % 1000}", prompt=f"line\u2028break {number}")


def test_ten_kills_at_random_instants_give_the_file_of_an_undisturbed_run(scorers: Forks, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [many_rows(number) for number in range(1, 3001)])
    clean, target = tmp_path / "clean.jsonl", tmp_path / "killed.jsonl"
    score_file(BatchScorer(), source, clean, chunk=50, max_bad_share=1)
    delays, reached, patience = random.Random(11), [0], 1.0
    for _ in range(10):
        assert scorers.run(source, target, 0.06, kill_after=delays.uniform(0.01, 0.3) * patience) == -9
        record = tmp_path / "killed.jsonl.progress.json"
        reached.append(json.loads(record.read_text())["done"]["rows"] if record.exists() else 0)
        # A busy machine may need longer to get anywhere.
        patience = min(2 * patience, 8.0) if reached[-1] == reached[-2] else 1.0
    assert not target.exists(), "all ten kills must fall into the job"
    assert reached == sorted(reached)
    assert len(set(reached)) >= 4, "the job must get somewhere between two kills"
    report = score_file(BatchScorer(), source, target, chunk=50, max_bad_share=1)
    assert report.resumed_from == reached[-1] > 0
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(clean.read_bytes()).digest()
    given = Counter(f"r{n % 1000}" if n % 97 else str(n) for n in range(1, 3001) if n % 97 == 0 or n % 101)
    assert Counter(line["id"] for line in read_rows(target)) == given
    assert report.bad == 3000 // 97
    assert sorted(os.listdir(tmp_path)) == ["clean.jsonl", "in.jsonl", "killed.jsonl"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_death_at_any_change_to_the_disk_gives_the_same_file(scorers: Forks, tmp_path: Path, overwrite: bool) -> None:
    """Every call that changes the disk, from the empty partial to the last clean-up, then the job starts again."""
    source = write_rows(tmp_path / "in.jsonl", [many_rows(number) for number in range(1, 181)])
    clean = tmp_path / "clean.jsonl"
    score_file(BatchScorer(), source, clean, chunk=50, max_bad_share=1)
    resumed, finished = set(), 0
    for crash_at in range(1, 45):
        folder = tmp_path / f"crash-{crash_at}"
        folder.mkdir()
        target = folder / "out.jsonl"
        scorers.run(source, target, 0, crash_at=crash_at)
        left = sorted(os.listdir(folder))
        if left == ["out.jsonl"]:
            finished += 1
        else:
            options: dict[str, Any] = {"chunk": 50, "max_bad_share": 1, "overwrite": overwrite}
            resumed.add(score_file(BatchScorer(), source, target, **options).resumed_from)
        assert target.read_bytes() == clean.read_bytes()
        assert os.listdir(folder) == ["out.jsonl"]
        shutil.rmtree(folder)
    assert finished > 0, "the range must reach the end of the job"
    assert resumed == {0, 50, 100, 150, 179}
