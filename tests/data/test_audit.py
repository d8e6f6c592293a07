"""What `moreward data check` counts and says."""

import json
from dataclasses import replace

import pytest

from moreward.data.audit import PairLengths, TokenizerMarks, audit, render
from moreward.data.load import Loaded, Quarantined, load_preferences
from moreward.data.reasons import MESSAGE_FATES
from moreward.types import Preference

MAX_TOKENS = 16


def measure(p):
    """A tokenizer of words that keeps the last `MAX_TOKENS`."""
    chosen, rejected = ((p.prompt + " " + text).split() for text in (p.chosen, p.rejected))
    over = max(len(chosen), len(rejected)) > MAX_TOKENS
    same = chosen[-MAX_TOKENS:] == rejected[-MAX_TOKENS:]
    special = "<eos>" in chosen + rejected
    return PairLengths(len(chosen), len(rejected), over, same, special)


def row(i, chosen="yes it is", rejected="no", **changes):
    return {"prompt": f"q{i}", "chosen": f"{chosen} {i}", "rejected": f"{rejected} {i}"} | changes


def load(path, rows, **options):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_preferences(path, max_bad_share=1, **options)


def test_the_audit_counts_what_was_planted(tmp_path):
    rows = [row(i, domain="a") for i in range(6)]
    rows += [row(10, domain="b", chosen="no", rejected="yes"), row(11, domain="b", chosen="12", rejected="34")]
    rows += [
        row(0, domain="a"),
        row(3, domain="a", chosen="no", rejected="yes it is"),
        row(12, domain="b", rejected="yes it is"),
        row(13, domain="b", chosen=4) | {"chosen": 4},
        row(14, domain="b", prompt=" "),
    ]
    found = audit(load(tmp_path / "x.jsonl", rows, allow_empty_prompt=True))
    a, b = found.domains["a"], found.domains["b"]
    assert (a.num_rows, a.num_pairs, a.dropped, a.contradictions) == (8, 7, {"duplicate": 1}, 1)
    assert (b.num_rows, b.num_pairs, b.dropped) == (5, 3, {"identical": 1, "wrong_type": 1})
    assert (a.empty_prompts, b.empty_prompts) == (0, 1)
    assert (a.share, b.share) == (0.7, 0.3)
    assert a.chosen_longer == pytest.approx(6 / 7)
    assert b.chosen_longer == pytest.approx((0 + 0.5 + 1) / 3)
    assert (found.num_rows, found.num_kept_rows) == (13, 10)
    assert a.truncated is None
    places = {(f.reason, f.place.rpartition(":")[2], f.is_error) for f in found.findings}
    assert places == {
        ("duplicate", "9", False),
        ("contradiction", "10", False),
        ("identical", "11", False),
        ("wrong_type", "12", True),
        ("empty_prompt", "13", False),
    }


def test_lengths_are_the_plain_median_and_95th_percentile():
    pairs = [Preference(prompt="q", chosen="x" * (2 * n + 1), rejected="x" * (2 * n + 2)) for n in range(51)]
    figures = audit(Loaded(pairs, [], 51, 51)).domains["default"]
    assert (figures.median_length, figures.p95_length, figures.chosen_longer) == (51.5, 97, 0.0)


def test_only_unusable_rows_are_errors(tmp_path):
    assert not audit(load(tmp_path / "x.jsonl", [row(0), row(0), row(1, rejected="yes it is")])).has_errors
    assert audit(load(tmp_path / "x.jsonl", [row(0), row(1, domain=3)])).has_errors


def test_messages_of_a_tree_that_stand_in_no_pair_are_no_errors():
    unused = [Quarantined("trees.jsonl", i, "oasst", fate, "", "") for i, fate in enumerate(MESSAGE_FATES)]
    pair = Preference(prompt="q", chosen="a", rejected="b")
    assert not audit(Loaded([pair], unused, len(unused) + 2, 2)).has_errors


def test_a_measure_adds_tokens_truncation_and_special_tokens(tmp_path):
    long = "w " * 20
    rows = [row(0), row(1, chosen=long), row(2, rejected="<eos>"), row(3, chosen="a " + long, rejected="b " + long)]
    found = audit(load(tmp_path / "x.jsonl", rows), measure=measure)
    figures = found.domains["x"]
    assert (figures.truncated, figures.identical_after_truncation, figures.special_tokens) == (2, 1, 1)
    assert found.length_unit == "tokens"
    assert (figures.median_length, figures.p95_length) == (5.0, 23)
    assert {(f.reason, f.place[-1]) for f in found.findings} == {
        ("truncated", "2"),
        ("truncated", "4"),
        ("identical_after_truncation", "4"),
        ("special_tokens", "3"),
    }


MARKS = TokenizerMarks(bos="<s>", eos="</s>", pad="</s>")


def test_bos_eos_and_pad_are_told_for_each_domain(tmp_path):
    rows = [row(0, domain="a"), row(1, domain="a", chosen="<s> <s> yes"), row(2, domain="b", rejected="no end")]
    rows += [row(3, domain="b", chosen="cannot be rendered")]

    def marked(p):
        if "cannot" in p.chosen:
            return PairLengths(0, 0, False, False, False, refusal="template: no")
        return replace(measure(p), doubled_bos="<s> <s>" in p.chosen, missing_eos="no end" in p.rejected)

    found = audit(load(tmp_path / "x.jsonl", rows), measure=marked, marks=MARKS)
    told = {name: (d.doubled_bos, d.missing_eos, d.bad_template) for name, d in found.domains.items()}
    assert told == {"a": (1, 0, 0), "b": (0, 1, 1)}
    assert {(f.reason, f.domain, f.place[-1], f.is_error) for f in found.findings} == {
        ("doubled_bos", "a", "2", False),
        ("missing_eos", "b", "3", False),
        ("bad_template", "b", "4", True),
        ("pad_is_eos", "a", "r", False),
        ("pad_is_eos", "b", "r", False),
    }
    assert found.domains["b"].median_length == 4.5, "a pair that cannot be rendered has no length"
    assert found.to_json()["tokenizer"] == {
        "bos": "<s>",
        "eos": "</s>",
        "pad": "</s>",
        "pad_is_eos": True,
        "sha256": "",
    }
    text = render(found)
    assert "Tokenizer: BOS <s>, EOS </s>, pad </s> (the same as EOS)." in text
    assert "remark pad_is_eos: 2 (a 1, b 1)" in text
    assert "ERROR bad_template: 1 (b 1)" in text


def test_a_pad_of_its_own_is_no_finding(tmp_path):
    marks = replace(MARKS, pad="<pad>")
    assert audit(load(tmp_path / "x.jsonl", [row(0)]), measure=measure, marks=marks).findings == []


def test_the_json_of_an_audit_is_json(tmp_path):
    found = audit(load(tmp_path / "x.jsonl", [row(0), row(1, chosen=0) | {"chosen": None}]))
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert read["has_errors"] is True
    assert read["domains"]["x"]["dropped"] == {"missing_field": 1}


def test_the_rendered_audit_names_domains_reasons_and_places(tmp_path):
    rows = [row(0, domain="law"), *[row(i, domain="[b]odd") for i in range(1, 9)], *[{"chosen": "x"}] * 7]
    text = render(audit(load(tmp_path / "x.jsonl", rows), measure=measure), width=160)
    assert "law" in text
    assert "[b]odd" in text
    assert "ERROR missing_field: 7 (x 7)" in text
    assert "x.jsonl:10: rejected: is missing" in text
    assert "... and 2 more" in text
    assert "16 rows = 9 kept + 7 not kept" in text


UNFIT = {
    "every row bad": ([row(0, domain="a") | {"chosen": 1}], "1 of 1 rows are bad"),
    "a domain with bad rows only": ([row(0), row(1, domain="law") | {"chosen": 1}], "No row is left of domain law"),
    "margins in some rows": ([row(0, margin=1), row(1)], "1 pairs have a margin and 1 have none"),
    "an empty file": ([], "no rows in"),
}


@pytest.mark.parametrize(("rows", "message"), UNFIT.values(), ids=UNFIT)
def test_data_unfit_as_a_whole_is_described_not_refused(tmp_path, rows, message):
    found = audit(load(tmp_path / "x.jsonl", rows, strict=False), measure=measure)
    assert found.has_errors
    assert message in render(found, width=160)
    assert any(message in problem for problem in json.loads(json.dumps(found.to_json()))["problems"])


def test_files_that_were_not_read_are_remarks(tmp_path):
    (tmp_path / "law.tsv").write_text("x")
    load(tmp_path / "x.jsonl", [row(0)])
    found = audit(load_preferences(tmp_path))
    assert not found.has_errors
    assert [(f.reason, f.domain) for f in found.findings] == [("file_not_read", "law")]
    assert f"{tmp_path / 'law.tsv'}: unknown kind of file" in render(found, width=160)
