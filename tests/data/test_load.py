"""Every row is kept or quarantined with a reason; domains, margins, duplicates and leaks."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moreward.data.load import assert_no_leak, check_domains, domain_of_file, load_preferences, write_quarantine
from moreward.data.split import linked_groups
from moreward.errors import ConfigError, DataError
from moreward.types import Preference


def row(i, **changes):
    return {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} | changes


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


# Nothing is lost


BAD = {
    "bad_json": lambda i: "{",
    "duplicate_key": lambda i: '{"a": 1, "a": 2}',
    "empty_chosen": lambda i: row(i, chosen=" "),
    "identical": lambda i: row(i, rejected=f"good {i}"),
    "wrong_type": lambda i: row(i, rejected=3),
    "missing_field": lambda i: {"prompt": "q", "chosen": "a"},
    "bad_margin": lambda i: row(i, margin=None),
    "tie": lambda i: {
        "context": [{"role": "user", "content": f"q{i}"}],
        "completions": [{"rank": 1, "completion": [{"role": "assistant", "content": c}]} for c in "ab"],
    },
}


@given(plan=st.lists(st.sampled_from(["good", "good", "ranked", "repeat", *BAD]), max_size=25))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kept_and_quarantined_rows_are_the_rows_read(tmp_path, plan):
    plan = ["good", *plan]
    many = {"prompt": "p", "chosen": ["x", "y"], "rejected": ["z"], "num_correct": 2}
    makers = {"good": row, "repeat": lambda i: row(0), "ranked": lambda i: many | {"prompt": f"p{i}"}, **BAD}
    loaded = load_preferences(
        write(tmp_path / "rows.jsonl", [makers[k](i) for i, k in enumerate(plan)]), max_bad_share=1
    )
    assert loaded.num_rows == len(plan) == loaded.num_kept_rows + len(loaded.quarantine)
    reasons = {"repeat": "duplicate"} | {reason: reason for reason in BAD}
    expected = [(line, reasons[k]) for line, k in enumerate(plan, start=1) if k in reasons]
    assert [(q.line, q.reason) for q in loaded.quarantine] == expected
    assert len(loaded.preferences) == plan.count("good") + 2 * plan.count("ranked")
    assert (loaded.duplicates, loaded.num_ties) == (plan.count("repeat"), plan.count("tie"))


def test_planted_duplicates_and_contradictions_are_counted_exactly(tmp_path):
    plain = [row(i) for i in range(200)]
    turned = [row(i, chosen=f"bad {i}", rejected=f"good {i}") for i in range(30)]
    loaded = load_preferences(write(tmp_path / "x.jsonl", plain + plain[:50] + turned))
    assert (loaded.duplicates, len(loaded.contradictions)) == (50, 30)
    assert len(loaded.preferences) == 230
    assert Counter(q.reason for q in loaded.quarantine) == {"duplicate": 50}
    assert loaded.quarantine[0].detail == f"same as {tmp_path / 'x.jsonl'}:1"
    first, second = loaded.contradictions[7]
    assert (first.prompt, first.chosen) == (second.prompt, second.rejected)


def test_both_pairs_of_a_contradiction_weigh_what_the_setting_says_and_no_other(tmp_path):
    rows = [*[row(i) for i in range(4)], row(1, chosen="bad 1", rejected="good 1"), row(1)]
    path = write(tmp_path / "x.jsonl", rows)
    plain, weighted = load_preferences(path), load_preferences(path, contradiction_weight=0.25)
    assert [p.weight for p in plain.preferences] == [1, 1, 1, 1, 1]
    assert [p.weight for p in weighted.preferences] == [1, 0.25, 1, 1, 0.25]
    assert [replace(p, weight=1.0) for p in weighted.preferences] == plain.preferences
    assert (weighted.duplicates, len(weighted.contradictions)) == (1, 1)


def test_two_domains_may_judge_a_pair_differently_at_full_weight(tmp_path):
    rows = [row(0, domain="a"), row(0, chosen="bad 0", rejected="good 0", domain="b")]
    loaded = load_preferences(write(tmp_path / "x.jsonl", rows), contradiction_weight=0)
    assert [p.weight for p in loaded.preferences] == [1, 1]
    assert len(loaded.contradictions) == 1


def test_a_row_of_many_pairs_loses_its_known_pairs_and_stays(tmp_path):
    many = {"prompt": "question 0", "chosen": ["good 0", "also good"], "rejected": ["bad 0"], "num_correct": 2}
    loaded = load_preferences(write(tmp_path / "x.jsonl", [row(0), many, many]))
    assert [p.chosen for p in loaded.preferences] == ["good 0", "also good"]
    assert (loaded.num_rows, loaded.num_kept_rows, len(loaded.quarantine), loaded.duplicates) == (3, 2, 1, 3)


@pytest.mark.parametrize(("num_bad", "stops"), [(4, True), (2, False), (1, False)])
def test_more_than_one_percent_of_bad_rows_stops(tmp_path, num_bad, stops):
    rows = [row(i) for i in range(200 - num_bad)] + [row(i, chosen="") for i in range(num_bad)]
    path = write(tmp_path / "x.jsonl", rows)
    if not stops:
        assert load_preferences(path).num_kept_rows == 200 - num_bad
        return
    with pytest.raises(DataError, match=r"4 of 200 rows are bad \(2.0%\).*empty_chosen 4") as caught:
        load_preferences(path)
    assert f"{path}:197: chosen: is empty or only blanks" in str(caught.value)
    assert caught.value.exit_code == 3


def test_duplicates_and_identical_pairs_do_not_count_as_bad(tmp_path):
    rows = [row(0), row(0), row(1, rejected="good 1")]
    assert load_preferences(write(tmp_path / "x.jsonl", rows)).num_kept_rows == 1


def test_planted_identical_pairs_are_all_found_and_nothing_else(tmp_path):
    planted = set(range(3, 100, 10))
    rows = [row(i, **({"rejected": f"good {i}"} if i in planted else {})) for i in range(100)]
    loaded = load_preferences(write(tmp_path / "x.jsonl", rows))
    assert {q.line - 1 for q in loaded.quarantine if q.reason == "identical"} == planted
    assert len(loaded.preferences) == 90


def test_the_quarantine_is_written_as_json_lines(tmp_path):
    path = write(tmp_path / "code.jsonl", [row(0), row(1, chosen=3), '{"a": '])
    write_quarantine(load_preferences(path, max_bad_share=1).quarantine, tmp_path / "quarantine.jsonl")
    first, second = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert first == {
        "file": str(path),
        "line": 2,
        "domain": "code",
        "reason": "wrong_type",
        "field": "chosen",
        "detail": "expected string or messages, got int",
    }
    assert (second["reason"], second["line"]) == ("bad_json", 3)
    assert "at byte" in second["detail"]


@pytest.mark.parametrize("rows", [[], [row(0, chosen="")], [row(0, rejected="good 0")]])
def test_data_without_a_usable_row_stops(tmp_path, rows):
    with pytest.raises(DataError):
        load_preferences(write(tmp_path / "x.jsonl", rows), max_bad_share=1)


def test_an_ambiguous_file_is_refused_with_its_line_and_the_flag(tmp_path):
    path = write(tmp_path / "x.jsonl", [row(0), row(1, instruction="q")])
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*alpaca or explicit; say which with --format"):
        load_preferences(path)
    assert len(load_preferences(path, shape="explicit").preferences) == 2


def test_an_unknown_format_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'shp'"):
        load_preferences(write(tmp_path / "x.jsonl", [row(0)]), shape="shpp")


def test_shapes_may_change_from_row_to_row(tmp_path):
    rows = [
        row(0),
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
    ]
    assert len(load_preferences(write(tmp_path / "x.jsonl", rows)).preferences) == 3


def test_tags_say_how_sharegpt_rows_spell_keys_and_roles(tmp_path):
    turn = {"who": "me", "said": "Hi"}
    talk = {"conversations": [turn], "chosen": {"who": "it", "said": "A"}, "rejected": {"who": "it", "said": "B"}}
    path = write(tmp_path / "x.jsonl", [talk, row(0, chosen="it said")])
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "it"}
    first, second = load_preferences(path, tags=tags).preferences
    assert (first.prompt, first.chosen) == (
        ({"role": "user", "content": "Hi"},),
        ({"role": "assistant", "content": "A"},),
    )
    assert second.chosen == "it said", "rows of other layouts stay as they are"
    assert [q.reason for q in load_preferences(path, max_bad_share=1).quarantine] == ["bad_role"]


def test_token_ids_are_told_apart_paired_and_grouped_like_texts(tmp_path):
    rows = [{"chosen_ids": [1, 2, i], "rejected_ids": [1, 2, 9], "prompt_ids": [1, 2]} for i in (3, 4, 3)]
    rows += [{"chosen_ids": [1, 2, 9], "rejected_ids": [1, 2, 3], "prompt_ids": [1, 2]}]
    rows += [{"chosen_ids": [5], "rejected_ids": [6]}, {"chosen_ids": [7], "rejected_ids": [6]}]
    path = write(tmp_path / "x.jsonl", rows)
    loaded = load_preferences(path, allow_token_ids=True)
    assert (len(loaded.preferences), loaded.duplicates, len(loaded.contradictions)) == (5, 1, 1)
    assert [len(set(linked_groups(loaded.preferences)[i:])) for i in (0, 3)] == [3, 2]
    with pytest.raises(DataError, match=r"6 of 6 rows are bad.*\n.*data\.tokenizer_sha256.*data check PATH --backbone"):
        load_preferences(path)


# Domains


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("code.train.jsonl.zst", "code"),
        ("data/harmless.jsonl", "harmless"),
        ("train.jsonl", ""),
        ("train-00000-of-00002.parquet", ""),
        ("helpful-base_train.csv", "helpful-base"),
        ("Val.math.json", "math"),
        ("rlhf.v2.jsonl.gz", "rlhf.v2"),
        ("preference_data.jsonl", ""),
        ("saved/code", "code"),
        ("hf:owner/chat:train", "chat"),
    ],
)
def test_the_domain_of_a_file_is_its_name_without_split_words(name, domain):
    assert domain_of_file(name) == domain


def domains(*args, **options):
    return [p.domain for p in load_preferences(*args, **options).preferences]


def test_a_row_keeps_its_own_domain_and_others_take_their_files(tmp_path):
    rows = [row(0, domain="own"), row(1), row(2, domain=None), row(3, domain="")]
    code = write(tmp_path / "code.train.jsonl", rows)
    plain = write(tmp_path / "train.jsonl", [row(4)])
    assert domains([code, plain]) == ["own", "code", "code", "code", "default"]
    assert domains([code], domain="all") == ["own", "all", "all", "all"]


def test_the_domain_key_is_used_where_there_is_no_domain(tmp_path):
    path = write(tmp_path / "x.jsonl", [row(0, channel="chat", domain="own"), row(1, channel="chat"), row(2)])
    assert domains(path) == ["own", "x", "x"]
    assert domains(path, domain_key="channel") == ["own", "chat", "x"]
    assert domains(path, domain_key="channel", domain="all") == ["own", "chat", "all"]


def test_the_domain_map_names_files_and_renames_domains(tmp_path):
    write(tmp_path / "set-a.jsonl", [row(0), row(1, domain="cpp")])
    write(tmp_path / "deep" / "set-b.jsonl", [row(2)])
    mapping = {"set-a*": "first", "*/deep/*": "second", "cpp": "code"}
    assert sorted(domains(tmp_path, domain_map=mapping)) == ["code", "first", "second"]


def test_a_domain_of_which_no_row_is_left_stops(tmp_path):
    many = [row(i) for i in range(200)]
    stated = write(tmp_path / "a.jsonl", [*many, row(300, domain="law", chosen="")])
    with pytest.raises(DataError, match="No row is left of domain law") as caught:
        load_preferences(stated)
    assert "a.jsonl:201: chosen" in str(caught.value)
    files = [write(tmp_path / "a.jsonl", many), write(tmp_path / "b.jsonl", ["{"])]
    with pytest.raises(DataError, match="No row is left of domain b"):
        load_preferences(files)


def test_a_broken_row_of_a_file_with_stated_domains_loses_no_domain(tmp_path):
    rows = [row(i, domain="law") for i in range(200)] + ["{"]
    assert load_preferences(write(tmp_path / "train.jsonl", rows)).num_kept_rows == 200


def test_unknown_domains_are_named_with_the_known_ones():
    stranger = Preference(prompt="q", chosen="a", rejected="b", domain="cod", id="row 1")
    check_domains([stranger], ["cod"])
    with pytest.raises(DataError, match=r"Unknown domain cod\. Known: code, chat\.\n  row 1"):
        check_domains([stranger], ["code", "chat"])


@pytest.mark.parametrize(
    ("name", "text"), [("law.jsonl", ""), ("law.json", "[]"), ("law.csv", "prompt,chosen,rejected\n")]
)
@pytest.mark.parametrize("shape", [None, "oasst"])
def test_a_file_without_rows_is_named(tmp_path, name, text, shape):
    (tmp_path / name).write_text(text)
    if shape is None:
        write(tmp_path / "code.jsonl", [row(0)])
    with pytest.raises(DataError, match=f"no rows in .*{name}"):
        load_preferences(tmp_path, shape=shape)
    assert len(load_preferences(tmp_path, shape=shape, strict=False).problems) == 1


def test_a_file_of_a_registry_without_rows_is_named_whatever_its_others_hold(tmp_path):
    entries = {}
    for name, rows in (("code", [row(0)]), ("law", [])):
        write(tmp_path / f"{name}.jsonl", rows)
        columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
        entries[name] = {"file_name": f"{name}.jsonl", "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"no rows in .*law\.jsonl"):
        load_preferences(tmp_path)
    told = load_preferences(tmp_path, strict=False)
    assert len(told.preferences) == 1
    assert "law.jsonl" in told.problems[0]


def test_files_that_cannot_be_read_are_listed(tmp_path):
    write(tmp_path / "code.jsonl", [row(0)])
    write(tmp_path / "law.tsv", ["x"])
    assert load_preferences(tmp_path).skipped_files == [str(tmp_path / "law.tsv")]


# Duplicates


def test_the_same_pair_in_another_domain_is_a_fault(tmp_path):
    path = write(tmp_path / "x.jsonl", [row(0, domain="law"), row(1, domain="code"), row(0, domain="code")])
    loaded = load_preferences(path, max_bad_share=0.5)
    assert [(q.line, q.domain, q.reason) for q in loaded.quarantine] == [(3, "code", "duplicate_in_other_domain")]
    assert loaded.quarantine[0].detail.endswith("x.jsonl:1 of domain law")
    with pytest.raises(DataError, match="duplicate_in_other_domain 1"):
        load_preferences(path)
    assert load_preferences(path, domain_map={"law": "code"}).duplicates == 1


def test_pairs_with_other_tools_or_template_arguments_are_no_duplicates(tmp_path):
    rows = [
        row(0),
        row(0, tools=[{"name": "f"}]),
        row(0, chat_template_kwargs={"a": 1, "b": 2}),
        row(0, chat_template_kwargs={"b": 2, "a": 1}),
    ]
    loaded = load_preferences(write(tmp_path / "x.jsonl", rows))
    assert (len(loaded.preferences), loaded.duplicates) == (3, 1)


# Margins


def test_margins_in_some_rows_only_are_an_error_naming_the_others(tmp_path):
    path = write(tmp_path / "x.jsonl", [row(0, margin=1.0), row(1), row(2, margin=2)])
    with pytest.raises(DataError, match="2 pairs have a margin and 1 have none") as caught:
        load_preferences(path)
    assert "x.jsonl:2" in str(caught.value)
    assert "train.use_margin=false" in str(caught.value)
    assert [p.margin for p in load_preferences(path, use_margin=False).preferences] == [None] * 3


@pytest.mark.parametrize(("margins", "expected"), [([1, 0.5], [1.0, 0.5]), ([None, None], [None, None])])
def test_margins_in_all_rows_or_in_none_are_fine(tmp_path, margins, expected):
    rows = [row(i, **({} if m is None else {"margin": m})) for i, m in enumerate(margins)]
    assert [p.margin for p in load_preferences(write(tmp_path / "x.jsonl", rows)).preferences] == expected


@pytest.mark.parametrize("margin", ["NaN", "Infinity", "1e999", "null", "1e30", '"1"'])
def test_a_bad_margin_is_quarantined(tmp_path, margin):
    text = f'{{"prompt": "q", "chosen": "a", "rejected": "b", "margin": {margin}}}'
    loaded = load_preferences(write(tmp_path / "x.jsonl", [row(0, margin=1), text]), max_bad_share=1)
    expected = "bad_json" if margin in ("NaN", "Infinity") else "bad_margin"
    assert [q.reason for q in loaded.quarantine] == [expected]


# Leaks


def pref(i, **changes):
    return Preference(**{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "id": f"row{i}"} | changes)


def test_a_pair_or_a_group_on_both_sides_is_named():
    train = [pref(0), pref(1, group="g")]
    assert_no_leak(train, [pref(2), pref(3, group="h")])
    with pytest.raises(DataError, match="again is the same pair as row0"):
        assert_no_leak(train, [pref(0, id="again")])
    with pytest.raises(DataError, match="other has the prompt or group of row0"):
        assert_no_leak(train, [pref(0, id="other", chosen="c")])
    with pytest.raises(DataError, match="kin has the prompt or group of row1"):
        assert_no_leak(train, [pref(9, id="kin", group="g")])


def test_a_pair_without_a_prompt_leaks_too():
    with pytest.raises(DataError, match="1 rows"):
        assert_no_leak([pref(0, prompt="")], [pref(1, prompt="")])


# The whole layer


def test_the_data_layer_does_not_import_torch():
    code = (
        "import sys, moreward.data.audit, moreward.data.split;"
        "heavy = {'torch', 'datasets', 'pyarrow', 'rich', 'transformers'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr


def test_the_same_rows_load_alike_from_every_container(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [row(i, id=str(i), group="g", domain="d", chosen=f"good \u2028{i}") for i in range(5)]
    plain = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    def read(path: Path):
        return [(p.prompt, p.chosen, p.rejected, p.id, p.group, p.domain) for p in load_preferences(path).preferences]

    assert read(plain) == read(tmp_path / "a.json") == read(tmp_path / "a.parquet")
    assert len(read(plain)) == 5
