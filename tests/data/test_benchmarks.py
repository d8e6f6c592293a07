"""The paper's five data sets from small rows of their original shape."""

import json

import pytest

from moreward.data.benchmarks import BENCHMARKS, hellaswag, oasst
from moreward.data.formats import convert
from moreward.data.load import load_preferences
from moreward.data.values import RowError

HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant: Gladly.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant: Never.",
}
SHP = {
    "post_id": "qt3nxl",
    "domain": "askculinary_test",
    "upvote_ratio": 0.98,
    "history": "How long does stock keep?",
    "c_root_id_A": "hkh25sc",
    "c_root_id_B": "hkh25lp",
    "score_A": 340,
    "score_B": 166,
    "human_ref_A": "Four days.",
    "human_ref_B": "A year.",
    "labels": 1,
    "seconds_difference": 100.0,
    "score_ratio": 2.048,
}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["sings.", "swims.", "flies.", "starts pulling up shingles."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
    "split": "val",
    "split_type": "indomain",
    "label": "3",
}
DAHOAS = {"prompt": "What is tea?", "chosen": "A drink.", "rejected": "A car."}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "row", "domain"),
    [
        ("anthropic_hh", HH, "anthropic"),
        ("shp", SHP, "shp"),
        ("hellaswag", HELLASWAG, "hellaswag"),
        ("dahoas", DAHOAS, "dahoas"),
    ],
)
def test_every_benchmark_loads_by_its_format_into_its_own_domain(tmp_path, name, row, domain):
    loaded = load_preferences(write(tmp_path / "some_file.jsonl", [row]), shape=name)
    assert [p.domain for p in loaded.preferences] == [domain]
    renamed = load_preferences(tmp_path / "some_file.jsonl", shape=name, domain="mine")
    assert [p.domain for p in renamed.preferences] == ["mine"]


def test_hh_keeps_the_dialogue_as_prompt_and_the_last_reply_as_response():
    [p] = convert(HH, shape=BENCHMARKS["anthropic_hh"])
    assert [turn["content"] for turn in p.prompt] == ["Hi", "Yes?", "Tea?"]
    assert (p.chosen[0]["content"], p.rejected[0]["content"]) == ("Gladly.", "Never.")


@pytest.mark.parametrize(("label", "chosen"), [(1, "Four days."), (0, "A year.")])
def test_shp_follows_the_label(label, chosen):
    [p] = convert({**SHP, "labels": label}, shape=BENCHMARKS["shp"])
    assert (p.prompt, p.chosen) == ("How long does stock keep?", chosen)
    assert {p.chosen, p.rejected} == {"Four days.", "A year."}
    assert (p.group, p.meta["subreddit"]) == ("qt3nxl", "askculinary_test")


def test_hellaswag_draws_a_wrong_ending_per_row_and_seed():
    rows = [{**HELLASWAG, "ind": i} for i in range(60)]
    drawn = [hellaswag(row).pairs[0] for row in rows]
    assert {chosen for chosen, _ in drawn} == {"starts pulling up shingles."}
    assert {rejected for _, rejected in drawn} == set(HELLASWAG["endings"][:3])
    assert drawn == [hellaswag(row).pairs[0] for row in rows]
    assert drawn != [hellaswag(row, seed=1).pairs[0] for row in rows]


def test_hellaswag_keeps_the_other_endings_for_best_of_n():
    [p] = convert(HELLASWAG, shape=BENCHMARKS["hellaswag"])
    assert {p.chosen, p.rejected, *p.meta["other_rejected"]} == set(HELLASWAG["endings"])
    assert p.meta["activity"] == "Roof shingle removal"


@pytest.mark.parametrize(
    ("name", "row", "code"),
    [
        ("shp", {**SHP, "labels": 2}, "bad_label"),
        ("shp", {**SHP, "labels": True}, "bad_label"),
        ("shp", {**SHP, "labels": None}, "missing_field"),
        ("hellaswag", {**HELLASWAG, "label": ""}, "bad_label"),
        ("hellaswag", {**HELLASWAG, "label": "4"}, "bad_label"),
        ("hellaswag", {**HELLASWAG, "endings": "x"}, "wrong_type"),
        ("dahoas", {**DAHOAS, "rejected": " "}, "empty_rejected"),
        ("anthropic_hh", {"chosen": "Hi", "rejected": "Ho"}, "wrong_type"),
    ],
)
def test_what_a_benchmark_cannot_use_is_refused_with_a_reason(name, row, code):
    with pytest.raises(RowError) as caught:
        convert(row, shape=BENCHMARKS[name])
    assert caught.value.code == code


def message(name, parent, role, *, rank=None, lang="en", deleted=False, review=True, tree="t"):
    return {
        "message_id": name,
        "parent_id": parent,
        "message_tree_id": tree,
        "text": f"text of {name}",
        "role": role,
        "lang": lang,
        "rank": rank,
        "deleted": deleted,
        "review_result": review,
    }


TREE = [
    message("a1", "root", "assistant", rank=1),
    message("a0", "root", "assistant", rank=0),
    message("a2", "root", "assistant", rank=2, deleted=True),
    message("a3", "root", "assistant", rank=3, review=False),
    message("a4", "root", "assistant"),
    message("a5", "root", "assistant", rank=1),
    message("a6", "root", "assistant", rank=5, lang="de"),
    message("root", None, "prompter"),
    message("p0", "a0", "prompter"),
    message("b0", "p0", "assistant", rank=0),
    message("b1", "p0", "assistant", rank=1),
    message("p2", "a2", "prompter"),
    message("c0", "p2", "assistant", rank=0),
    message("c1", "p2", "assistant", rank=1),
    message("d0", "lost", "assistant", rank=0),
    message("d1", "lost", "assistant", rank=1),
    message("p3", "lost", "prompter"),
    message("f0", "p3", "assistant", rank=0),
    message("f1", "p3", "assistant", rank=1),
    message("p1", "a1", "prompter"),
    message("e0", "p1", "assistant", rank=0),
]


def test_oasst_pairs_ranked_siblings_under_their_conversation():
    result = oasst(TREE)
    pairs = {(p.chosen[0]["content"][-2:], p.rejected[0]["content"][-2:]) for p in result.preferences}
    assert pairs == {("a0", "a1"), ("a0", "a5"), ("b0", "b1")}
    deep = next(p for p in result.preferences if p.id == "b0>b1")
    assert [(t["role"], t["content"][8:]) for t in deep.prompt] == [
        ("user", "root"),
        ("assistant", "a0"),
        ("user", "p0"),
    ]
    assert {p.group for p in result.preferences} == {"t"}
    assert deep.meta == {"k": 2, "rank_chosen": 0, "rank_rejected": 1}


def test_oasst_counts_what_became_of_every_message():
    result = oasst(TREE)
    assert result.messages == {
        "used": 5,
        "prompter": 5,
        "deleted": 1,
        "rejected_in_review": 1,
        "unranked": 1,
        "other_language": 1,
        "broken_context": 6,
        "alone": 1,
    }
    assert sum(result.messages.values()) == result.num_messages == len(TREE)
    assert result.num_ties == 1
