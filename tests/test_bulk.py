"""Bulk scoring: every row has its line, in order, whatever is wrong with it and whenever the job is killed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward import bulk as module
from moreward.bulk import BulkReport, score_file
from moreward.errors import ConfigError, DataError, MorewardError, RunError, SpaceError
from moreward.types import Conversation, Reward

SOURCE = Path(module.__file__).resolve().parents[1]

# A process that forks a child for each line "SOURCE TARGET CRASH_AT SECONDS" it reads. The child scores the file,
# SECONDS per chunk. CRASH_AT > 0 ends it, as kill -9 would, at that one of its calls that change the disk. The
# rewards depend on place and number in the chunk, as those of a real model do in their last bits.
SCORERS = """
import hashlib, itertools, os, signal, sys, time
from pathlib import Path
from moreward.bulk import score_file
from moreward.types import Reward

class BatchScorer:
    identity = "batch-scorer-1"
    on_long = "drop"

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def score(self, items, *, explain=False):
        time.sleep(self.seconds)
        return [self.one(item, place, len(items)) for place, item in enumerate(items)]

    def one(self, item, place, size):
        digest = hashlib.sha256(repr((item.prompt, item.response, place, size)).encode()).digest()
        return Reward(reward=int.from_bytes(digest[:6], "big") / 1e12, expert="code", id=item.id)

def crash_at(number):
    calls = itertools.count(1)
    def counted(call):
        def run(*args, **kwargs):
            if next(calls) == number:
                os._exit(9)
            return call(*args, **kwargs)
        return run
    for name in ("open", "fsync", "replace", "truncate", "unlink"):
        setattr(os, name, counted(getattr(os, name)))

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        source, target, crash, seconds = line.split()
        child = os.fork()
        if child == 0:
            try:
                if int(crash):
                    crash_at(int(crash))
                score_file(BatchScorer(float(seconds)), Path(source), Path(target), chunk=50, max_bad_share=1)
            finally:
                os._exit(1)
        print(child, flush=True)
"""
_scope: dict[str, Any] = {"__name__": "scorers"}
exec(SCORERS, _scope)
BatchScorer = _scope["BatchScorer"]


class TextScorer:
    """A reward of the text alone. Some responses make it fail or give no number."""

    def __init__(self, identity: str = "text-scorer-1", on_long: str = "drop") -> None:
        self.identity = identity
        self.on_long = on_long
        self.calls: list[list[str]] = []

    def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
        self.calls.append([item.id for item in items])
        if any("poison" in str(item.response) for item in items):
            raise MorewardError("this response cannot be encoded")
        return [self.one(item, explain) for item in items]

    def one(self, item: Conversation, explain: bool) -> Reward:
        reward = float("nan") if item.response == "nan" else float(len(str((item.prompt, item.response))))
        experts = {"code": reward, "help": -1.5} if explain else {}
        return Reward(
            reward=reward, expert="code", weights={"code": 1.0}, expert_rewards=experts, num_tokens=7, id=item.id
        )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def row(number: int, **more: object) -> dict[str, object]:
    return {"id": f"r{number}", "prompt": f"prompt {number}", "response": "word " * (number % 7 + 1), **more}


def score(source: Path, scorer: Any = None, **options: Any) -> tuple[BulkReport, list[dict[str, Any]]]:
    target = source.with_name("out.jsonl")
    report = score_file(scorer or TextScorer(), source, target, **{"max_bad_share": 1.0, **options})
    assert sorted(os.listdir(source.parent)) == sorted({source.name, target.name}), "nothing is left behind"
    return report, read_rows(target)


# ---------------------------------------------------------------- rows


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"a turn of {role}"} for role in roles]


def test_a_line_of_output_tells_all_there_is(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row(1)])
    report, lines = score(source)
    told = {"id": "r1", "row": 1, "reward": 26.0, "expert": "code", "weights": {"code": 1.0}}
    assert lines == [{**told, "num_tokens": 7, "truncated": False}]
    assert (report.rows, report.scored, report.bad, report.resumed_from, report.exit_code) == (1, 1, 0, 0, 0)
    (tmp_path / "out.jsonl").unlink()
    _, lines = score(source, explain=True)
    assert lines[0]["expert_rewards"] == {"code": 26.0, "help": -1.5}


@pytest.mark.parametrize(
    ("given", "prompt", "response"),
    [
        ({"prompt": "p", "response": "r"}, "p", "r"),
        ({"prompt": "", "response": ""}, "", ""),
        ({"messages": turns("system", "user", "assistant")}, turns("system", "user"), turns("assistant")),
        ({"prompt": turns("user"), "response": turns("assistant")}, turns("user"), turns("assistant")),
        ({"prompt": turns("user"), "response": "r"}, turns("user"), "r"),
        ({"prompt": "a\u2028b\u0085c\r", "response": "é😀\x00"}, "a\u2028b\u0085c\r", "é😀\x00"),
    ],
)
def test_every_shape_of_row_reaches_the_scorer_as_it_is(tmp_path: Path, given: Any, prompt: Any, response: Any) -> None:
    seen: list[Conversation] = []

    class Keeper(TextScorer):
        def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
            seen.extend(items)
            return super().score(items, explain=explain)

    tools = [{"type": "function"}]
    more = {"domain": "code", "tools": tools, "chat_template_kwargs": {"enable_thinking": False}, "other": 1}
    lines = [json.dumps(given, ensure_ascii=False), json.dumps({**given, **more, "id": 5})]
    _, written = score(write_rows(tmp_path / "in.jsonl", lines), Keeper())
    for item in seen:
        assert (item.prompt if isinstance(prompt, str) else list(item.prompt)) == prompt
        assert (item.response if isinstance(response, str) else list(item.response)) == response
    assert [(item.id, item.domain, item.tools) for item in seen] == [("1", "", None), ("5", "code", tools)]
    assert [dict(item.chat_template_kwargs) for item in seen] == [{}, {"enable_thinking": False}]
    assert [line["id"] for line in written] == ["1", 5]


BAD_ROWS: list[tuple[str | dict[str, object], str, str]] = [
    ("{", "bad_json", "Expecting property name"),
    ('{"prompt": "p", "response": "r"', "bad_json", "Expecting ',' delimiter"),
    ('{"prompt": "p", "response": "r", "margin": NaN}', "bad_json", "NaN is not JSON"),
    ("[" * 100_000, "bad_json", "recursion"),
    ('{"id": ' + "9" * 5000 + "}", "bad_json", "digits"),
    ("null", "wrong_type", "a row must be an object, got null"),
    ("[1]", "wrong_type", "got list"),
    ('{"prompt": "p", "response": "r", "prompt": "q"}', "duplicate_key", "twice"),
    ('{"prompt": "\\ud800", "response": "r"}', "bad_encoding", "surrogates"),
    ({"prompt": "p"}, "missing_field", "response missing"),
    ({"text": "p"}, "missing_field", "prompt and response missing"),
    ({"messages": turns("user", "assistant"), "prompt": "p"}, "wrong_fields", "not both"),
    ({"prompt": "p", "response": None}, "wrong_type", "response: expected string or messages, got null"),
    ({"prompt": 1, "response": "r"}, "wrong_type", "prompt: expected string or messages, got int"),
    ({"prompt": {"a": 1}, "response": "r"}, "wrong_type", "got object"),
    ({"prompt": "p", "response": ["r"]}, "bad_role", "response[0]: expected an object with a role"),
    (
        {"prompt": "p", "response": [{"role": "assistant"}]},
        "wrong_type",
        "response[0].content: expected string, got null",
    ),
    ({"prompt": "p", "response": []}, "empty_conversation", "response: an empty list"),
    ({"prompt": "p", "response": turns("user")}, "bad_role", "must be the assistant's"),
    ({"messages": turns("assistant", "user")}, "bad_role", "must be the assistant's"),
    ({"messages": turns("assistant")}, "empty_conversation", "nothing stands before"),
    ({"messages": "text"}, "wrong_type", "messages: expected string or messages, got string"),
    ({"prompt": "p", "response": "r", "domain": 3}, "wrong_type", "domain: expected string, got int"),
    ({"prompt": "p", "response": "r", "tools": {}}, "wrong_type", "tools: expected list, got object"),
    ({"prompt": "p", "response": "r", "tools": [{}, "add"]}, "wrong_type", "tools[1]: expected object, got string"),
    ({"prompt": "p", "response": "r", "id": 1.5}, "wrong_type", "id: expected string or int, got float"),
    ({"prompt": "p", "response": "r", "id": True}, "wrong_type", "got boolean"),
    ({"prompt": "p", "response": "poison"}, "not_scored", "cannot be encoded"),
    ({"prompt": "p", "response": "nan"}, "non_finite", "NaN or Inf"),
]


@pytest.mark.parametrize(("bad", "code", "message"), BAD_ROWS)
def test_a_bad_row_gets_an_error_line_and_harms_no_other(tmp_path: Path, bad: Any, code: str, message: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row(1), bad, row(3)])
    report, lines = score(source)
    assert [line["id"] for line in lines] == ["r1", "2", "r3"]
    assert [line["row"] for line in lines] == [1, 2, 3]
    assert lines[1].keys() == {"id", "row", "error"}
    assert lines[1]["error"]["code"] == code
    assert message in lines[1]["error"]["message"]
    assert report.bad_rows == (f"in.jsonl:2: {code}: {lines[1]['error']['message']}",)
    assert (report.rows, report.scored, report.bad, report.exit_code) == (3, 2, 1, 3)
    _, good = score(write_rows(tmp_path / "in.jsonl", [row(1), row(2), row(3)]), overwrite=True)
    assert (lines[0], lines[2]) == (good[0], good[2])


def test_bytes_that_are_no_text_and_over_long_rows_are_bad_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROW_LIMIT", 200)
    ends = b'", "response": "r", "id": "x"}\n'
    rows = [
        b'{"prompt": "a' + ends,
        b'{"prompt": "\xff' + ends,
        b'{"prompt": "' + b"a" * 900 + ends,
        b'{"prompt": "b' + ends,
    ]
    (tmp_path / "in.jsonl").write_bytes(b"".join(rows))
    _, lines = score(tmp_path / "in.jsonl")
    assert [line.get("error", {}).get("code") for line in lines] == [None, "bad_encoding", "too_long", None]
    assert [line["id"] for line in lines] == ["x", "2", "3", "x"]


def test_marks_blank_lines_line_ends_and_a_missing_last_one_are_read(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + b"\r\n".join([json.dumps(row(1)).encode(), b"", b"  ", json.dumps(row(2)).encode()])
    (tmp_path / "in.jsonl").write_bytes(text)
    report, lines = score(tmp_path / "in.jsonl")
    assert [(line["id"], line["row"]) for line in lines] == [("r1", 1), ("r2", 4)]
    assert report.rows == 2


def test_an_empty_file_gives_an_empty_file(tmp_path: Path) -> None:
    report, lines = score(write_rows(tmp_path / "in.jsonl", []))
    assert (report.rows, report.exit_code, lines) == (0, 0, [])


def test_ids_that_stand_twice_are_kept_as_they_are(tmp_path: Path) -> None:
    ids = ["a", "a", 7, "7", "a"]
    _, lines = score(write_rows(tmp_path / "in.jsonl", [row(n, id=name) for n, name in enumerate(ids)]), chunk=2)
    assert [line["id"] for line in lines] == ids


KINDS = ["good", "no id", "messages", "poison", "nan", "cut", "no response"]


def row_of(kind: str, number: int) -> dict[str, object] | str:
    special: dict[str, dict[str, object] | str] = {
        "no id": {"prompt": f"p{number}", "response": "r"},
        "messages": {"id": f"r{number}", "messages": turns("user", "assistant")},
        "cut": '{"id": "cut", "prompt',
        "no response": {"id": f"r{number}", "prompt": "p"},
    }
    return special.get(kind) or row(number, response="good words" if kind == "good" else kind)


@settings(max_examples=100)
@given(st.lists(st.sampled_from(KINDS), max_size=12), st.integers(1, 14))
def test_any_mixture_in_any_chunks_gives_each_row_what_it_gets_alone(kinds: list[str], chunk: int) -> None:
    codes = {"poison": "not_scored", "nan": "non_finite", "cut": "bad_json", "no response": "missing_field"}
    with tempfile.TemporaryDirectory() as folder:
        rows = [row_of(kind, number) for number, kind in enumerate(kinds, start=1)]
        report, lines = score(write_rows(Path(folder) / "in.jsonl", rows), chunk=chunk)
    assert [line["row"] for line in lines] == list(range(1, len(kinds) + 1))
    for number, (kind, line) in enumerate(zip(kinds, lines, strict=True), start=1):
        assert line["id"] == (str(number) if kind in ("no id", "cut") else f"r{number}")
        assert line.get("error", {}).get("code") == codes.get(kind)
        if kind not in codes:
            given = row_of(kind, number)
            assert isinstance(given, dict)
            shown = tuple(given["messages"]) if kind == "messages" else None  # type: ignore[arg-type]
            text = (shown[:-1], shown[-1:]) if shown else (given["prompt"], given["response"])
            assert line["reward"] == len(str(text))
    bad = sum(kind in codes for kind in kinds)
    assert (report.rows, report.scored, report.bad) == (len(kinds), len(kinds) - bad, bad)
    assert report.exit_code == (3 if bad else 0)


def test_a_row_that_makes_a_chunk_fail_is_found_one_by_one(tmp_path: Path) -> None:
    scorer = TextScorer()
    rows = [row(1), row(2, response="poison"), row(3), row(4)]
    _, lines = score(write_rows(tmp_path / "in.jsonl", rows), scorer, chunk=3)
    assert scorer.calls == [["r1", "r2", "r3"], ["r1"], ["r2"], ["r3"], ["r4"]]
    assert ["error" in line for line in lines] == [False, True, False, False]


def test_our_own_bugs_are_not_taken_for_bad_rows(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row(n) for n in range(4)])

    class Short(TextScorer):
        def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
            return super().score(items, explain=explain)[1:]

    class Swapped(TextScorer):
        def score(self, items: Sequence[Conversation], *, explain: bool = False) -> list[Reward]:
            return super().score(items, explain=explain)[::-1]

    for scorer in (Short(), Swapped()):
        with pytest.raises(RuntimeError, match="one each and in order"):
            score_file(scorer, source, tmp_path / f"{type(scorer).__name__}.jsonl")


# ---------------------------------------------------------------- how much may be bad


def test_too_many_bad_rows_stop_the_job_before_the_model_works(tmp_path: Path) -> None:
    rows: list[Any] = [row(n) for n in range(100)]
    rows[30], rows[60] = "{", "[]"
    source, scorer = write_rows(tmp_path / "in.jsonl", rows), TextScorer()
    with pytest.raises(
        DataError, match=r"2 of 100 rows cannot be scored(?s:.)*in.jsonl:31: bad_json.*\n.*:61: wrong_type"
    ):
        score_file(scorer, source, tmp_path / "out.jsonl")
    assert scorer.calls == []
    assert os.listdir(tmp_path) == ["in.jsonl"]
    report, _ = score(source, max_bad_share=0.02)
    assert report.bad == 2


def test_rows_the_model_refuses_count_too_and_a_larger_share_goes_on(tmp_path: Path) -> None:
    rows = [row(n, response="poison" if n in (25, 45) else "fine") for n in range(100)]
    source, scorer = write_rows(tmp_path / "in.jsonl", rows), TextScorer()
    with pytest.raises(DataError, match=r"2 of 100 rows cannot be scored, more than max_bad_share=0\.01"):
        score_file(scorer, source, tmp_path / "out.jsonl", chunk=10)
    assert not (tmp_path / "out.jsonl").exists()
    assert not any("r50" in call for call in scorer.calls)
    report, lines = score(source, chunk=10, max_bad_share=0.05)
    assert (report.rows, report.bad, report.resumed_from, len(lines)) == (100, 2, 50, 100)
    assert [name.split(": ")[0] for name in report.bad_rows] == ["in.jsonl:26", "in.jsonl:46"]


def test_all_bad_rows_are_counted_and_twenty_are_named(tmp_path: Path) -> None:
    report, _ = score(write_rows(tmp_path / "in.jsonl", ["{"] * 30), chunk=7)
    assert (report.bad, len(report.bad_rows), report.bad_rows[19][:12]) == (30, 20, "in.jsonl:20:")


# ---------------------------------------------------------------- files


def packed_as(path: Path, data: bytes) -> Path:
    """`data` under the format of the file's name; as two frames or members where the format has them."""
    half = len(data) // 2
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data[:half]) + pack(data[half:]))
    return path


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
def test_a_packed_file_gives_what_the_plain_one_gives(tmp_path: Path, name: str) -> None:
    rows = [row(n, prompt=random.Random(n).randbytes(60).hex()) for n in range(700)]
    plain = write_rows(tmp_path / "in.jsonl", rows)
    data = plain.read_bytes()
    _, expected = score(plain)
    (tmp_path / "out.jsonl").unlink()
    plain.unlink()
    _, lines = score(packed_as(tmp_path / name, data))
    assert lines == expected


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "not packed at all"])
def test_a_damaged_packed_file_is_refused_before_the_model_works(tmp_path: Path, name: str, damage: str) -> None:
    source = packed_as(tmp_path / name, "".join(json.dumps(row(n)) + "\n" for n in range(700)).encode())
    data, scorer = source.read_bytes(), TextScorer()
    broken = {
        "cut": data[:-3],
        "changed": data[:30] + b"\x00" * 30 + data[60:],
        "not packed at all": b'{"id": 1}\n' * 9,
    }
    source.write_bytes(broken[damage])
    with pytest.raises(DataError, match="cannot be read"):
        score_file(scorer, source, tmp_path / "out.jsonl", max_bad_share=1)
    assert scorer.calls == []
    assert os.listdir(tmp_path) == [name]


def test_wrong_arguments_are_told_all_at_once(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.gz", [])
    with pytest.raises(ConfigError) as raised:
        score_file(TextScorer(), source, source, chunk=0, max_bad_share=1.5)
    assert [fault.split(" ")[0].rstrip(":") for fault in raised.value.faults] == [
        "chunk",
        "max_bad_share",
        str(source),
        str(source),
    ]
    with pytest.raises(ConfigError, match="is a folder"):
        score_file(TextScorer(), source, tmp_path)
    with pytest.raises(DataError, match="No such file"):
        score_file(TextScorer(), tmp_path / "none.jsonl", tmp_path / "out.jsonl")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row(n, prompt="x" * 8000) for n in range(1000)])
    tracemalloc.start()
    try:
        score_file(TextScorer(), source, tmp_path / "out.jsonl", chunk=8)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000 < source.stat().st_size / 5


def test_the_module_loads_without_torch() -> None:
    code = "import sys, moreward.bulk; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}).returncode == 0


def test_progress_is_told_from_where_it_starts_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    source = write_rows(tmp_path / "in.jsonl", [row(n) for n in range(5)])
    score(source, chunk=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]


# ---------------------------------------------------------------- going on


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


class Scorers:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, source: Path, target: Path, *, crash_at: int = 0, seconds: float = 0.0) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{source} {target} {crash_at} {seconds}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def scorers() -> Iterator[Scorers]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCORERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    with process:
        yield Scorers(process)
        process.kill()


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.002)
    raise AssertionError(f"process {pid} did not end")


def many_rows(number: int) -> dict[str, object] | str:
    if number % 97 == 0:
        return '{"id": "cut'
    if number % 101 == 0:
        return ""
    return row(number, id=f"r{number % 1000}", prompt=f"line\u2028break {number}")


def test_ten_kills_at_random_instants_give_the_file_of_an_undisturbed_run(scorers: Scorers, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [many_rows(number) for number in range(1, 3001)])
    clean, target = tmp_path / "clean.jsonl", tmp_path / "killed.jsonl"
    score_file(BatchScorer(), source, clean, chunk=50, max_bad_share=1)
    delays, reached = random.Random(11), []
    for _ in range(10):
        child = scorers.start(source, target, seconds=0.06)
        time.sleep(delays.uniform(0.01, 0.3))
        os.kill(child, 9)
        wait_for_end(child)
        record = tmp_path / "killed.jsonl.progress.json"
        reached.append(json.loads(record.read_text())["done"]["rows"] if record.exists() else 0)
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
def test_a_death_at_any_change_to_the_disk_gives_the_same_file(
    scorers: Scorers, tmp_path: Path, overwrite: bool
) -> None:
    """Every call that changes the disk, from the empty partial to the last clean-up, then the job starts again."""
    source = write_rows(tmp_path / "in.jsonl", [many_rows(number) for number in range(1, 181)])
    clean = tmp_path / "clean.jsonl"
    score_file(BatchScorer(), source, clean, chunk=50, max_bad_share=1)
    resumed, finished = set(), 0
    for crash_at in range(1, 45):
        folder = tmp_path / f"crash-{crash_at}"
        folder.mkdir()
        target = folder / "out.jsonl"
        wait_for_end(scorers.start(source, target, crash_at=crash_at))
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
