"""Bulk scoring: every row has its line, in order, whatever is wrong with it and whenever the job is killed."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from killing import ENVIRONMENT
from moreward.bulk import rows as module
from moreward.bulk import score_file
from moreward.errors import ConfigError, DataError
from moreward.types import Conversation, Reward
from rows import TextScorer, row, score, write_rows

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
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


def test_progress_is_told_from_where_it_starts_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    source = write_rows(tmp_path / "in.jsonl", [row(n) for n in range(5)])
    score(source, chunk=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]
