"""Files as rows: every container, and the ten kinds of damage in each of them."""

import csv
import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward.data import rows
from moreward.data.formats import convert
from moreward.data.rows import BadRow, RawRow
from moreward.data.sources import expand, find_sources, read_rows
from moreward.data.values import RowError
from moreward.errors import DataError, MissingExtraError


def row(i):
    return {"prompt": f"question {i}", "chosen": f"good \u2028 {i}", "rejected": f"bad \u0085 {i}"}


def as_json(value):
    return json.dumps(value, ensure_ascii=False).encode()


GOOD = [as_json(row(i)) for i in range(3)]
PACK = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: zstandard.compress(data[:50]) + zstandard.compress(data[50:]),
}
SUFFIXES = list(PACK)


def write(folder, suffix, data):
    path = folder / f"code{suffix}"
    path.write_bytes(PACK[suffix](data))
    return path


def lines(*rows):
    return b"\n".join(rows) + b"\n"


def outcome(path):
    """What became of each row: "ok" with its content checked, or a reason code."""
    found = []
    for item in read_rows(path):
        if isinstance(item, BadRow):
            found.append((item.line, item.reason))
            continue
        try:
            convert(item.row)
            found.append((item.line, "ok"))
        except RowError as error:
            found.append((item.line, error.code))
    return found


# The damage table, for texts

LONG = b'{"prompt": "q", "chosen": "' + b"a" * 30_000_000 + b'", "rejected": "b"}'
DAMAGE = {
    "BOM": (b"\xef\xbb\xbf" + GOOD[1], "ok"),
    "CRLF": (GOOD[1] + b"\r", "ok"),
    "surrogate": (b'{"prompt": "q", "chosen": "\\ud800", "rejected": "b"}', "bad_encoding"),
    "not UTF-8": (b'{"prompt": "q", "chosen": "\xff", "rejected": "b"}', "bad_encoding"),
    "UTF-8 surrogate": (b'{"prompt": "q", "chosen": "\xed\xa0\x80", "rejected": "b"}', "bad_encoding"),
    "list for text": (b'{"prompt": "q", "chosen": ["a"], "rejected": "b"}', "wrong_type"),
    "missing key": (b'{"prompt": "q", "chosen": "a"}', "missing_field"),
    "duplicate key": (b'{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}', "duplicate_key"),
    "30 MB": (LONG, "row_too_long"),
    "NaN": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}', "bad_json"),
    "not an object": (b"[1]", "wrong_type"),
    "two objects": (b"{} {}", "bad_json"),
    "deep": (b"[" * 200_000, "bad_json"),
    "5,000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "bad_json"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("damaged", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_told_apart_and_the_others_survive(tmp_path, suffix, damaged, reason):
    rows = [damaged, GOOD[0], GOOD[2]] if damaged.startswith(b"\xef") else [GOOD[0], damaged, GOOD[2]]
    expected = [reason if line is damaged else "ok" for line in rows]
    assert outcome(write(tmp_path, suffix, lines(*rows))) == list(enumerate(expected, start=1))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_last_line_is_one_bad_row(tmp_path, suffix):
    path = write(tmp_path, suffix, lines(*GOOD)[:-20])
    assert outcome(path) == [(1, "ok"), (2, "ok"), (3, "bad_json")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_last_line_without_newline_is_a_row(tmp_path, suffix):
    assert len(list(read_rows(write(tmp_path, suffix, lines(*GOOD)[:-1])))) == 3


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_truncated_archive_always_stops(tmp_path, suffix, share):
    path = write(tmp_path, suffix, lines(*GOOD * 30))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"code\.jsonl"):
        list(read_rows(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_an_archive_with_other_bytes_inside_stops(tmp_path, suffix):
    path = tmp_path / f"code{suffix}"
    path.write_bytes(b"these bytes are no archive")
    with pytest.raises(DataError, match=r"code\.jsonl"):
        list(read_rows(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_offsets_point_at_the_fault(tmp_path, suffix):
    damaged = b'{"chosen": "\xff"}'
    data = b"\xef\xbb\xbf" + lines(GOOD[0], damaged, b'{"a": nul}', GOOD[2])
    items = list(read_rows(write(tmp_path, suffix, data)))
    assert data[items[1].offset] == 0xFF
    assert data[items[2].offset :].startswith(b"nul")
    assert data[items[3].offset :].startswith(GOOD[2])
    assert data[items[0].offset :].startswith(GOOD[0])


def test_unicode_line_breaks_do_not_end_a_row(tmp_path):
    [item] = read_rows(write(tmp_path, ".jsonl", lines(GOOD[1])))
    assert item.row == row(1)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    path = write(tmp_path, ".jsonl", lines(b"", GOOD[0], b"  \r", GOOD[1]))
    assert outcome(path) == [(2, "ok"), (4, "ok")]


@given(texts=st.lists(st.binary(max_size=30), max_size=8), chunk=st.integers(1, 12))
@settings(deadline=None, max_examples=200)
def test_lines_are_those_of_a_plain_split_however_the_file_is_chunked(texts, chunk):
    data = b"\n".join(texts)
    chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "MAX_ROW_BYTES", 20)
        found = list(rows.lines_of(chunks))
    plain = data.split(b"\n")
    starts = [sum(len(line) + 1 for line in plain[:i]) for i in range(len(plain))]
    expected = [(i + 1, starts[i], line if len(line) <= 20 else None) for i, line in enumerate(plain)]
    assert found == (expected if plain[-1] else expected[:-1])


# .json


def test_a_json_array_is_read_row_by_row(tmp_path):
    path = tmp_path / "code.json"
    for indent in (None, 2):
        path.write_text("\ufeff" + json.dumps([row(i) for i in range(3)], indent=indent, ensure_ascii=False))
        items = list(read_rows(path))
        assert [item.row for item in items] == [row(i) for i in range(3)]
        assert [path.read_bytes()[item.offset :][:1] for item in items] == [b"{"] * 3


@pytest.mark.parametrize(
    "name", ["surrogate", "not UTF-8", "list for text", "missing key", "duplicate key", "NaN", "30 MB"]
)
def test_a_damaged_item_of_a_json_array_is_told_apart(tmp_path, name):
    damaged, reason = DAMAGE[name]
    path = tmp_path / "code.json"
    path.write_bytes(b"[" + b",\n".join([GOOD[0], damaged, GOOD[2]]) + b"]")
    assert outcome(path) == [(1, "ok"), (2, reason), (3, "ok")]


@pytest.mark.parametrize(
    "text", ['[{"a": 1}', '[{"a": 1},', '[{"a": 1},]', '[{"a": 1} {"b": 2}]', '[{"a": 1}] x', '[{"a']
)
def test_a_broken_json_array_stops(tmp_path, text):
    (tmp_path / "code.json").write_text(text)
    with pytest.raises(DataError, match=r"code\.json"):
        list(read_rows(tmp_path / "code.json"))


def test_json_lines_under_the_name_json_are_read(tmp_path):
    (tmp_path / "code.json").write_bytes(lines(*GOOD))
    assert outcome(tmp_path / "code.json") == [(1, "ok"), (2, "ok"), (3, "ok")]


# .csv


def write_csv(path, rows, encoding="utf-8"):
    names = list(dict.fromkeys(name for one in rows for name in one))
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_cells_hold_texts_and_conversations_as_json(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    other = [talk[0], {"role": "assistant", "content": "Go away."}]
    rows = [
        {"chosen": json.dumps(talk), "rejected": json.dumps(other), "margin": "0.5", "meta": '{"k": 1}'},
        {"chosen": "[1, 2, 3]", "rejected": "two\nlines \u2028", "margin": "1", "meta": ""},
        {"chosen": "a", "rejected": "b", "margin": "", "meta": "{"},
    ]
    path = write_csv(tmp_path / "code.csv", rows, encoding="utf-8-sig")
    first, second, third = read_rows(path)
    assert first.row == {"chosen": talk, "rejected": other, "margin": 0.5, "meta": {"k": 1}}
    assert second.row == {"chosen": "[1, 2, 3]", "rejected": "two\nlines \u2028", "margin": 1}
    assert (third.line, third.reason) == (5, "bad_json")
    assert path.read_bytes()[third.offset :].startswith(b"a,b")
    assert (second.line, path.read_bytes()[second.offset :][:6]) == (3, b'"[1, 2')


def test_bad_csv_rows_are_told_apart(tmp_path):
    path = tmp_path / "code.csv"
    rows = [b"chosen,rejected", b"a,b", b"a", b"a,b,c", b"\xff,b", b"", b"c,d", b"e," + b"f" * 2**25]
    path.write_bytes(b"\r\n".join(rows) + b"\r\n")
    ends = ["ok", "bad_csv", "bad_csv", "bad_encoding", "ok", "row_too_long"]
    assert outcome(path) == list(zip([2, 3, 4, 5, 7, 8], ends, strict=True))


def test_a_csv_with_an_open_quote_stops(tmp_path):
    (tmp_path / "code.csv").write_text('chosen,rejected\na,b\nc,"d\ne,f\n')
    with pytest.raises(DataError, match=r"code\.csv:3: broken CSV in the row at byte 20"):
        list(read_rows(tmp_path / "code.csv"))


# Columns: .parquet and saved data sets


def write_parquet(folder, table):
    pq.write_table(table, folder / "code.parquet", row_group_size=2)
    return folder / "code.parquet"


def write_saved(folder, table):
    """The layout of `Dataset.save_to_disk`, for tables that `datasets` itself would not write."""
    saved = folder / "code"
    saved.mkdir()
    with (
        pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return saved


def strings(*values):
    """A string column from bytes that need not be UTF-8."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


COLUMNAR = {"parquet": write_parquet, "saved": write_saved}


def table(chosen):
    plain = pa.array(["x", "y", "z"])
    return pa.table({"prompt": plain, "chosen": chosen, "rejected": plain})


@pytest.mark.parametrize("kind", COLUMNAR)
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (pa.array(["a", None, "c\u2028"]), ["ok", "missing_field", "ok"]),
        (pa.array(["a", "\ufeff", "c"]), ["ok", "ok", "ok"]),
        (pa.array([["a"], ["b"], ["c"]]), ["wrong_type"] * 3),
        (pa.array([1, 2, 3]), ["wrong_type"] * 3),
        (strings(b"a", b"\xff", b"c"), ["ok", "bad_encoding", "ok"]),
        (strings(b"a", b"\xed\xa0\x80", b"c"), ["ok", "bad_encoding", "ok"]),
        (pa.array(["a", "b" * 30_000_000, "c"]), ["ok", "row_too_long", "ok"]),
    ],
    ids=["null", "BOM", "list for text", "int", "not UTF-8", "surrogate", "30 MB"],
)
def test_damage_in_columns_is_told_apart_too(tmp_path, kind, chosen, expected):
    assert outcome(COLUMNAR[kind](tmp_path, table(chosen))) == list(enumerate(expected, start=1))


@pytest.mark.parametrize("kind", COLUMNAR)
def test_a_missing_column_is_a_missing_field_of_every_row(tmp_path, kind):
    path = COLUMNAR[kind](tmp_path, table(pa.array(["a", "b", "c"])).drop_columns("rejected"))
    assert outcome(path) == [(1, "missing_field"), (2, "missing_field"), (3, "missing_field")]


@pytest.mark.parametrize("kind", COLUMNAR)
def test_two_columns_of_one_name_stop(tmp_path, kind):
    plain = pa.array(["x"])
    twice = pa.Table.from_arrays([plain, plain, plain], names=["chosen", "chosen", "rejected"])
    with pytest.raises(DataError, match="same name"):
        list(read_rows(COLUMNAR[kind](tmp_path, twice)))


@pytest.mark.parametrize("kind", COLUMNAR)
@pytest.mark.parametrize("cut", [8, 9, 200])
def test_a_cut_columnar_file_always_stops(tmp_path, kind, cut):
    path = COLUMNAR[kind](tmp_path, table(pa.array(["a", "b", "c"])))
    file = next(path.glob("*.arrow")) if path.is_dir() else path
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError, match="code"):
        list(read_rows(path))


def test_what_the_datasets_package_saves_is_read_as_it_stands(tmp_path):
    datasets = pytest.importorskip("datasets")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = [{**row(i), "meta": {"i": i}, "messages": talk[:1], "score": None} for i in range(3)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    [path] = expand(tmp_path / "one")
    assert [item.row for item in read_rows(path)] == rows
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="splits train, test"):
        list(read_rows(tmp_path / "both"))
    assert len(list(read_rows(tmp_path / "both" / "test"))) == 3


# LLaMA-Factory registries


def test_a_registry_gives_its_ranking_entries_with_columns_and_tags_renamed(tmp_path):
    alpaca = {"q": "Add", "more": "1 and 2", "good": "3", "bad": "4", "domain": "math"}
    talk = {
        "turns": [{"who": "me", "said": "Hi"}],
        "yes": {"who": "you", "said": "A"},
        "no": {"who": "you", "said": "B"},
    }
    (tmp_path / "a.json").write_text(json.dumps([alpaca]))
    (tmp_path / "s.jsonl").write_text(json.dumps(talk))
    (tmp_path / "other.json").write_text("[{}]")
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "you"}
    entries = {
        "sums": {
            "file_name": "a.json",
            "ranking": True,
            "columns": {"prompt": "q", "query": "more", "chosen": "good", "rejected": "bad"},
        },
        "talks": {
            "file_name": "s.jsonl",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "turns", "chosen": "yes", "rejected": "no"},
            "tags": tags,
        },
        "tuning": {"file_name": "other.json"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    [path] = expand(tmp_path)
    sums, talks = read_rows(path)
    assert sums.row == {"instruction": "Add", "input": "1 and 2", "chosen": "3", "rejected": "4", "domain": "math"}
    assert sums.file.endswith("a.json")
    [pair] = convert(talks.row)
    assert [turn["content"] for turn in (*pair.prompt, *pair.chosen, *pair.rejected)] == ["Hi", "A", "B"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ('{"tuning": {"file_name": "x.json"}}', 'no entry has "ranking": true. Entries: tuning'),
        ('{"far": {"hf_hub_url": "o/n", "ranking": true}}', "hf:owner/name"),
        ('{"odd": {"file_name": "x.json", "ranking": true, "formatting": "x"}}', "alpaca or sharegpt, got 'x'"),
    ],
)
def test_a_registry_without_usable_entries_says_why(tmp_path, text, message):
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / "dataset_info.json"))


# Finding files


def test_patterns_give_each_file_once_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "notes.md", ".hidden.jsonl", "rows.json", "manifest.json", "sub/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]" if name == "rows.json" else '{"files": []}')
    names = [path.relative_to(tmp_path).as_posix() for path in expand([tmp_path / "b.jsonl", tmp_path])]
    assert names == ["b.jsonl", "a.jsonl.gz", "rows.json", "sub/c.csv"]
    assert [path.name for path in expand(f"{tmp_path}/**/*.csv")] == ["c.csv"]


def test_a_folder_and_a_glob_find_and_skip_the_same_files(tmp_path):
    lines_of = {
        "a.ndjson": '{"x": 1}',
        "b.json": '{"x": 1}\n\n{"x": 2}',
        "c.json": '[{"x": 1}]',
        "empty.json": "",
        "law.jsonl": "",
        "one.json": '{"x": 1}',
        "pretty.json": '{\n "x": [\n  {"y": 1}\n ]\n}',
        "med.tsv": "x",
        "chat.txt": "x",
        "README.md": "x",
        "README": "x",
        "LICENSE": "x",
        ".hidden.txt": "x",
    }
    for name, text in lines_of.items():
        (tmp_path / name).write_text(text)
    folder, by_glob = find_sources(tmp_path), find_sources(tmp_path / "*")
    assert folder == by_glob
    assert [path.name for path in folder.sources] == ["a.ndjson", "b.json", "c.json", "empty.json", "law.jsonl"]
    assert [path.name for path in folder.skipped] == ["chat.txt", "med.tsv", "one.json", "pretty.json"]
    assert [item.row for item in read_rows(tmp_path / "b.json")] == [{"x": 1}, {"x": 2}]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_ndjson_is_jsonl_by_another_name(tmp_path, packing):
    path = write(tmp_path, f".jsonl{packing}", lines(*GOOD))
    rows = [item.row for item in read_rows(path)]
    assert rows
    assert [item.row for item in read_rows(path.rename(tmp_path / f"x.ndjson{packing}"))] == rows


def test_a_folder_of_unreadable_files_names_them(tmp_path):
    (tmp_path / "law.tsv").write_text("x")
    with pytest.raises(DataError, match=r"no data file matches\. Not readable: law\.tsv"):
        expand(tmp_path)


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path):
    path = write(tmp_path, ".jsonl", lines(*GOOD)).rename(tmp_path / "a[1].jsonl")
    assert expand(path) == [path]


def test_no_match_names_the_pattern_and_what_is_near(tmp_path):
    (tmp_path / "code.train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"code\.trian\.jsonl: no data file matches\. Near it: code\.train\.jsonl"):
        expand(tmp_path / "code.trian.jsonl")
    with pytest.raises(DataError, match="There is no folder"):
        expand(tmp_path / "nowhere" / "x.jsonl")


def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(DataError, match=r"unknown kind of file\. Known: \.jsonl, "):
        expand(tmp_path / "rows.xlsx")


def test_hub_data_sets_need_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert [str(path) for path in expand("hf:owner/name:test")] == ["hf:owner/name:test"]
    with pytest.raises(MissingExtraError, match=r"moreward\[datasets\]"):
        list(read_rows("hf:owner/name:test"))


def test_hub_rows_come_from_the_named_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([row(0)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("hf:owner/name:test")) == [RawRow("hf:owner/name:test", 1, row(0))]
    list(read_rows("hf:owner/name"))
    assert asked == [("owner/name", "test"), ("owner/name", "train")]
