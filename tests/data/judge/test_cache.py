"""The cache: what a killed process left is read, what is no cache is left alone, and one process has it at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from moreward.data.judge.cache import Cache, cache_key
from moreward.errors import RunError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Cache(tmp_path / "new" / "cache.jsonl") as cache:
        cache.put({"a": "Better: 1", "b": 0.25})
        cache.put({"c": "line\nbreak \u2028"})
    return cache.path


def test_what_was_put_is_there_again(path: Path) -> None:
    with Cache(path) as cache:
        assert [cache.get(key) for key in "abcd"] == ["Better: 1", 0.25, "line\nbreak \u2028", None]
        assert (len(cache), "c" in cache, cache.num_damaged) == (3, True, 0)


def test_a_file_cut_anywhere_keeps_every_whole_line_and_can_be_written_again(path: Path) -> None:
    data = path.read_bytes()
    header = data.index(b"\n") + 1
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        with Cache(path) as cache:
            whole = max(data[:size].count(b"\n") - 1, 0)
            assert len(cache) == whole
            assert cache.num_damaged == (size > header and not data[:size].endswith(b"\n"))
            cache.put({"after": "yes"})
        with Cache(path) as cache:
            assert (len(cache), cache.num_damaged) == (whole + 1, 0)


def test_damaged_lines_are_passed_over_and_counted(path: Path) -> None:
    header, first, *rest = path.read_bytes().splitlines(keepends=True)
    bad = [b"\n", b"\xff\n", b"[]\n", b'{"key": "x"}\n', b'{"key": 1, "said": "y"}\n', b'{"key": "k", "said": null}\n']
    path.write_bytes(b"".join([header, first, *bad, *rest]))
    with Cache(path) as cache:
        assert (len(cache), cache.num_damaged) == (3, len(bad))


@pytest.mark.parametrize("data", [b'{"prompt": "precious"}\n', b"no", b'{"moreward":"judge-cache","schema":2}\n'])
def test_another_file_is_refused_and_unchanged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(RunError, match="is no cache"), Cache(path):
        pass
    assert path.read_bytes() == data


def test_a_second_user_is_refused(path: Path) -> None:
    with Cache(path), pytest.raises(RunError, match="another process"), Cache(path):
        pass
    with Cache(path) as cache:
        assert len(cache) == 3


def test_threads_do_not_mix_their_lines(path: Path) -> None:
    with Cache(path) as cache:
        threads = [
            threading.Thread(target=lambda t=t: [cache.put({f"{t}-{n}": "x" * 5000}) for n in range(20)])
            for t in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Cache(path) as cache:
        assert (len(cache), cache.num_damaged) == (3 + 120, 0)


def test_a_key_depends_on_every_part_and_on_their_order() -> None:
    keys = {cache_key(*parts) for parts in [("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a", "b", None)]}
    assert len(keys) == 5
