"""Every column shape of the interface table, and every way a row can be wrong."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moreward.data.formats import convert, convert_row, detect
from moreward.data.shapes import SHAPES
from moreward.data.values import RowError
from moreward.errors import ConfigError
from moreward.types import TokenIds


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


HI = (u("Hi"),)
NICE, RUDE = (a("Hello!"),), (a("Go away."),)
CALL = {"name": "add", "arguments": {"x": 1}}
CALL_TURN = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": CALL}],
}

# name, row, prompt, chosen, rejected
SAMPLES = [
    (
        "explicit",
        {"prompt": "Capital of France? ", "chosen": "Paris.", "rejected": "Rome."},
        "Capital of France? ",
        "Paris.",
        "Rome.",
    ),
    (
        "explicit",
        {"prompt": list(HI), "chosen": list(NICE), "rejected": list(RUDE), "margin": 1.0},
        HI,
        NICE,
        RUDE,
    ),
    (  # RewardBench 1 and others: whole conversations beside the prompt's text
        "explicit",
        {"prompt": "Hi", "chosen": [*HI, *NICE], "rejected": [*HI, *RUDE], "subset": "alpacaeval-easy"},
        HI,
        NICE,
        RUDE,
    ),
    (  # the same with the prompt as turns
        "explicit",
        {"prompt": list(HI), "chosen": [*HI, *NICE], "rejected": [*HI, *RUDE]},
        HI,
        NICE,
        RUDE,
    ),
    (  # a project benchmark row: messages are the prompt
        "explicit",
        {
            "id": "code-1",
            "domain": "code",
            "prompt": "Human: Hi",
            "chosen": "Hello!",
            "rejected": "Go away.",
            "group": "833c89beee",
            "messages": list(HI),
            "meta": {"turns": 1},
        },
        HI,
        NICE,
        RUDE,
    ),
    (  # a copy of the chosen conversation under `messages` is not a prompt
        "explicit",
        {"prompt": "Hi", "messages": [*HI, *NICE], "chosen": [*HI, *NICE], "rejected": [*HI, *RUDE]},
        HI,
        NICE,
        RUDE,
    ),
    ("messages_prompt", {"messages": list(HI), "chosen": "Hello!", "rejected": "Go away."}, HI, NICE, RUDE),
    ("implicit", {"chosen": "2+2? 4", "rejected": "2+2? 5"}, "", "2+2? 4", "2+2? 5"),
    ("implicit", {"chosen": [*HI, *NICE], "rejected": [*HI, *RUDE], "tools": "[]"}, HI, NICE, RUDE),
    (
        "alpaca",
        {"instruction": "Add", "input": "1 and 2", "chosen": "3", "rejected": "4"},
        (u("Add\n1 and 2"),),
        (a("3"),),
        (a("4"),),
    ),
    (
        "alpaca",
        {
            "instruction": "More",
            "input": "",
            "system": "Be short",
            "history": [["1?", "one"]],
            "chosen": "3",
            "rejected": "4",
        },
        ({"role": "system", "content": "Be short"}, u("1?"), a("one"), u("More")),
        (a("3"),),
        (a("4"),),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "Go away."},
        },
        HI,
        NICE,
        RUDE,
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
            ],
            "system": "S",
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "Go away."},
        },
        ({"role": "system", "content": "S"}, u("Hi"), CALL_TURN, {"role": "tool", "content": "2"}),
        NICE,
        RUDE,
    ),
    (
        "ms_swift",
        {"messages": [*HI, *NICE], "rejected_response": "Go away.", "margin": 0.5, "channel": "chat"},
        HI,
        NICE,
        RUDE,
    ),
    (
        "ms_swift",
        {
            "messages": [
                *HI,
                {"role": "tool_call", "content": json.dumps(CALL)},
                {"role": "tool_response", "content": "2"},
                *NICE,
            ],
            "rejected_response": list(RUDE),
        },
        HI,
        (CALL_TURN, {"role": "tool", "content": "2"}, *NICE),
        RUDE,
    ),
    ("ms_swift_messages", {"messages": [*HI, *NICE], "rejected_messages": [*HI, *RUDE]}, HI, NICE, RUDE),
    (
        "nemo",
        {
            "context": [u("2+2?")],
            "completions": [{"rank": 1, "completion": [a("5")]}, {"rank": 0, "completion": [a("4")]}],
            "task_name": "math",
        },
        (u("2+2?"),),
        (a("4"),),
        (a("5"),),
    ),
    (
        "hh",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."},
        HI,
        NICE,
        RUDE,
    ),
    ("question", {"question": "2+2?", "chosen": "4", "rejected": "5", "id": 3}, "2+2?", "4", "5"),
    ("input", {"input": "2+2?", "chosen": "4", "rejected": "5", "subset": "x"}, "2+2?", "4", "5"),
    (
        "rewardbench2",
        {
            "id": "ref:7",
            "prompt": "Name a colour",
            "chosen": ["red"],
            "rejected": ["dog"],
            "num_correct": 1,
            "num_incorrect": 1,
            "total_completions": 2,
            "subset": "Ties",
            "models": ["m"],
            "additional_metadata": {},
        },
        "Name a colour",
        "red",
        "dog",
    ),
]


@pytest.mark.parametrize(("name", "row", "prompt", "chosen", "rejected"), SAMPLES)
def test_every_shape_is_detected_and_becomes_a_preference(name, row, prompt, chosen, rejected):
    assert detect(row) == name
    [preference] = convert(row)
    assert (preference.prompt, preference.chosen, preference.rejected) == (prompt, chosen, rejected)


@pytest.mark.parametrize("suffix", ["_ids", "_input_ids"])
def test_token_ids_are_kept_where_they_are_asked_for(suffix):
    row = {f"chosen{suffix}": [1, 2, 3], f"rejected{suffix}": [1, 2, 4], "domain": "d"}
    [pair] = convert_row(row, allow_token_ids=True).preferences
    assert (pair.token_ids, pair.domain) == (TokenIds(chosen=(1, 2, 3), rejected=(1, 2, 4)), "d")
    [known] = convert_row({**row, f"prompt{suffix}": [1, 2]}, allow_token_ids=True).preferences
    assert known.token_ids.prompt == (1, 2)


def test_no_shape_lacks_a_sample():
    assert set(SHAPES) == {name for name, *_ in SAMPLES} | {"pretokenized", "pretokenized_legacy"}


def test_the_other_columns_travel_with_the_pair():
    row = {
        **SAMPLES[0][1],
        "id": 7,
        "domain": "geo",
        "margin": 2,
        "group": "g",
        "tools": '[{"name": "t"}]',
        "chat_template_kwargs": {"think": False},
        "meta": {"k": 1},
        "channel": "c",
    }
    [p] = convert(row)
    assert (p.id, p.domain, p.margin, p.group, p.tools) == ("7", "geo", 2.0, "g", [{"name": "t"}])
    assert (p.chat_template_kwargs, p.meta) == ({"think": False}, {"channel": "c", "k": 1})


def test_a_ranked_list_gives_every_pair_of_different_rank_and_counts_ties():
    ranks = [2, 0, 1, 1]
    row = {
        "id": "r",
        "context": [u("q")],
        "completions": [{"rank": rank, "completion": [a(f"answer {i}")]} for i, rank in enumerate(ranks)],
    }
    converted = convert_row(row)
    found = {(p.chosen[0]["content"][-1], p.rejected[0]["content"][-1]) for p in converted.preferences}
    assert found == {(str(i), str(j)) for i in range(4) for j in range(4) if ranks[i] < ranks[j]}
    assert converted.num_ties == 1
    assert len({p.id for p in converted.preferences}) == 5


def test_many_right_answers_beat_every_wrong_one():
    row = {"prompt": "Name a colour", "chosen": ["red", "blue"], "rejected": ["dog", "cat"], "num_correct": 2}
    pairs = [(p.chosen, p.rejected) for p in convert(row)]
    assert pairs == [("red", "dog"), ("red", "cat"), ("blue", "dog"), ("blue", "cat")]


def test_text_parts_are_joined_and_image_parts_refused():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    row = {"prompt": list(HI), "chosen": [{"role": "assistant", "content": parts}], "rejected": list(RUDE)}
    assert convert(row)[0].chosen == NICE
    parts.append({"type": "image", "image": "x.png"})
    assert refusal(row) == ("unsupported_content", "chosen[0].content[2]")


def test_columns_can_be_renamed():
    row = {"prompt": "not this", "q": "2+2?", "good": "4", "bad": "5"}
    [p] = convert(row, fields={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (p.prompt, p.chosen, p.rejected) == ("2+2?", "4", "5")
    with pytest.raises(RowError, match="q: is missing"):
        convert({"good": "4", "bad": "5"}, fields={"prompt": "q"})


def refusal(row, **options):
    with pytest.raises(RowError) as caught:
        convert(row, **options)
    return caught.value.code, caught.value.field


def explicit(**changes):
    return {"prompt": "2+2?", "chosen": "4", "rejected": "5"} | changes


def talk(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


REFUSALS = {
    "D1 identical text": (explicit(rejected="4"), "identical", "rejected"),
    "D1 identical turns": (talk([*HI, *NICE], [*HI, *NICE]), "identical", "rejected"),
    "D2 empty chosen": (explicit(chosen=""), "empty_chosen", "chosen"),
    "D2 blank rejected": (explicit(rejected=" \n\t"), "empty_rejected", "rejected"),
    "D2 empty turn": (talk([*HI, a(" ")], [*HI, *NICE]), "empty_chosen", "chosen"),
    "D2 blank prompt": (explicit(prompt=" "), "empty_prompt", "prompt"),
    "D4 unknown role": (talk([{"role": "bot", "content": "x"}], list(NICE)), "bad_role", "chosen[0].role"),
    "D4 role is a list": (talk([{"role": [], "content": "x"}], list(NICE)), "bad_role", "chosen[0].role"),
    "D4 ends on the user": (talk([*HI, *NICE, u("?")], [*HI, *NICE]), "ends_on_user", "chosen"),
    "D4 other prompts": (talk([u("Hi"), *NICE], [u("Ho"), *RUDE]), "prompt_mismatch", "rejected"),
    "D4 prompts part later": (
        talk([*HI, *NICE, u("1"), a("x")], [*HI, *NICE, u("2"), a("y")]),
        "prompt_mismatch",
        "rejected",
    ),
    "D4 reply to another prompt": (
        explicit(prompt=list(HI), chosen=[u("Ho"), *NICE], rejected=list(RUDE)),
        "prompt_mismatch",
        "chosen",
    ),
    "D4 prompt not in the talk": (
        explicit(prompt="Ho", chosen=[*HI, *NICE], rejected=[*HI, *RUDE]),
        "prompt_mismatch",
        "prompt",
    ),
    "D4 empty conversation": (talk([], [*HI, *NICE]), "empty_conversation", "chosen"),
    "D5 null": (explicit(chosen=None), "missing_field", "chosen"),
    "D5 null prompt": (explicit(prompt=None), "missing_field", "prompt"),
    "D5 int": (explicit(chosen=4), "wrong_type", "chosen"),
    "D5 bool": (explicit(rejected=True), "wrong_type", "rejected"),
    "D5 object": (explicit(chosen={"text": "4"}), "wrong_type", "chosen"),
    "D5 list of texts": (explicit(chosen=["4"]), "wrong_type", "chosen[0]"),
    "D5 no rejected": ({"prompt": "2+2?", "chosen": "4"}, "missing_field", "rejected"),
    "D5 no chosen": ({"prompt": "2+2?", "rejected": "4"}, "missing_field", "chosen"),
    "D5 nothing known": ({"text": "x"}, "unknown_shape", ""),
    "D5 no columns": ({}, "unknown_shape", ""),
    "D5 messages alone": ({"messages": [*HI, *NICE]}, "missing_field", "rejected_response"),
    "D5 chat and text": (explicit(chosen=list(NICE)), "wrong_type", "rejected"),
    "D5 chat prompt": (explicit(prompt=list(HI)), "wrong_type", "chosen"),
    "D5 text prompt": (explicit(chosen=list(NICE), rejected=list(RUDE)), "wrong_type", "chosen"),
    "D5 null content": (talk([u("Hi"), {"role": "assistant"}], [*HI, *NICE]), "missing_field", "chosen[1].content"),
    "D5 int content": (talk([u(1), *NICE], [*HI, *NICE]), "wrong_type", "chosen[0].content"),
    "D5 text as turn": (talk(["Hi"], [*HI, *NICE]), "wrong_type", "chosen[0]"),
    "D5 domain": (explicit(domain=3), "wrong_type", "domain"),
    "D5 meta": (explicit(meta=[1]), "wrong_type", "meta"),
    "D5 tools": (explicit(tools="no"), "wrong_type", "tools"),
    "D6 NaN": (explicit(margin=float("nan")), "bad_margin", "margin"),
    "D6 infinite": (explicit(margin=float("-inf")), "bad_margin", "margin"),
    "D6 null": (explicit(margin=None), "bad_margin", "margin"),
    "D6 huge": (explicit(margin=1e30), "bad_margin", "margin"),
    "D6 huge int": (explicit(margin=-(10**400)), "bad_margin", "margin"),
    "D6 text": (explicit(margin="1"), "bad_margin", "margin"),
    "ids": ({"chosen_ids": [1], "rejected_ids": [2]}, "pretokenized", ""),
    "old ids": ({"chosen_input_ids": [1], "rejected_input_ids": [2]}, "pretokenized", ""),
    "ids of another kind": ({"chosen_ids": [1], "rejected_ids": ["2"]}, "wrong_type", "rejected_ids"),
    "negative ids": ({"chosen_ids": [-1], "rejected_ids": [2]}, "wrong_type", "chosen_ids"),
    "no ids": ({"chosen_ids": [], "rejected_ids": [2]}, "empty_chosen", "chosen_ids"),
    "the same ids": ({"chosen_ids": [2], "rejected_ids": [2]}, "identical", "rejected_ids"),
    "images": (explicit(images=["x.png"]), "unsupported_content", "images"),
    "one completion": ({"context": list(HI), "completions": [{}]}, "too_few_responses", "completions"),
    "no rank": (
        {"context": list(HI), "completions": [{"completion": list(NICE)}] * 2},
        "wrong_type",
        "completions[0].rank",
    ),
    "no right answer": (explicit(chosen=[], rejected=["x"], num_correct=0), "too_few_responses", "chosen"),
    "hh ends on Human": (
        talk("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B", "\n\nHuman: Hi\n\nAssistant: C"),
        "ends_on_user",
        "chosen",
    ),
    "hh silent": (talk("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: C"), "empty_chosen", "chosen"),
    "hh and text": (talk("\n\nHuman: Hi\n\nAssistant: A", "plain"), "wrong_type", "rejected"),
    "unknown speaker": (
        {"conversations": [{"from": "me", "value": "Hi"}], "chosen": {}, "rejected": {}},
        "bad_role",
        "conversations[0].from",
    ),
    "broken call": (
        {"conversations": [{"from": "function_call", "value": "add(1)"}], "chosen": {}, "rejected": {}},
        "wrong_type",
        "conversations[0].value",
    ),
    "swift reply missing": ({"messages": list(HI), "rejected_response": "x"}, "ends_on_user", "messages"),
}


@pytest.mark.parametrize(("row", "code", "field"), REFUSALS.values(), ids=REFUSALS)
def test_a_bad_row_is_refused_with_its_reason_and_field(row, code, field):
    assert refusal(row) == (code, field)


def test_one_bad_pair_refuses_the_whole_row():
    row = {"prompt": "Name a colour", "chosen": ["red"], "rejected": ["dog", " "], "num_correct": 1}
    assert refusal(row) == ("empty_rejected", "rejected")


@pytest.mark.parametrize("margin", [0, -100, 100.0, 0.5])
def test_margins_within_the_limit_are_kept(margin):
    assert convert(explicit(margin=margin))[0].margin == margin


def test_an_empty_prompt_needs_the_flag():
    [p] = convert_row(explicit(prompt=""), allow_empty_prompt=True).preferences
    assert p.prompt == ""


def test_an_ambiguous_row_names_the_candidates_and_the_flag():
    row = {"prompt": "q", "instruction": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(RowError, match="alpaca or explicit; say which with --format") as caught:
        detect(row)
    assert caught.value.code == "ambiguous_shape"
    assert convert(row, shape="explicit")[0].prompt == "q"
    assert convert(row, shape="alpaca")[0].prompt == (u("q"),)


def test_a_row_error_reads_like_a_sentence_about_the_field():
    with pytest.raises(RowError, match=r"^chosen: expected string or messages, got int$"):
        convert(explicit(chosen=4))


def test_an_unknown_format_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'alpaca'"):
        convert({}, shape="alpacca")


def test_null_extras_of_columnar_turns_do_not_count():
    padded = [{**turn, "tool_calls": None, "name": None} for turn in [*HI, *NICE]]
    [p] = convert({"chosen": padded, "rejected": [*HI, *RUDE]})
    assert (p.prompt, p.chosen) == (HI, NICE)


NAMES = sorted({name for shape in SHAPES.values() for name in shape.needs | shape.often} | {"tools", "meta", "margin"})
LEAVES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(["", "x", "[]", "\n\nHuman: x"])
TURN_KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "rank", "completion", "tool_calls"])
TURN_VALUES = LEAVES | st.sampled_from(["user", "assistant", "human", "gpt", "tool_call", "function_call"])
VALUES = st.recursive(
    TURN_VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TURN_KEYS, inner, max_size=3)
)


@given(row=st.dictionaries(st.sampled_from(NAMES), VALUES), shape=st.sampled_from([None, *SHAPES]))
@settings(deadline=None, max_examples=120)
def test_whatever_a_row_holds_it_is_read_or_refused_as_a_row(row, shape):
    try:
        preferences = convert(row, shape=shape)
    except RowError:
        return
    assert all(p.chosen != p.rejected for p in preferences)
