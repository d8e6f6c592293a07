"""Rows read = rows used + rows not used; pairs made = pairs used + pairs not used."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moreward.data.batches import Encoder, encode_pairs
from moreward.data.books import account
from moreward.data.load import load_preferences
from moreward.nn.backbone import load_tokenizer

SHORT, LONG = "the sky is blue", "the sky is blue " * 30


@pytest.fixture(scope="module")
def encoder(tiny_backbone):
    return Encoder(load_tokenizer(str(tiny_backbone("bert"))), 60)


def ranked(i, *replies):
    """A row of two, three or more completions, the first the best."""
    told = [{"rank": rank, "completion": [{"role": "assistant", "content": c}]} for rank, c in enumerate(replies)]
    return {"context": [{"role": "user", "content": f"q{i}"}], "completions": told, "domain": "x"}


MAKERS = {
    "pair": lambda i: ranked(i, SHORT, "no"),
    "whole": lambda i: ranked(i, SHORT, "no", "blue"),
    "partly": lambda i: ranked(i, SHORT, "no", LONG),
    "lost": lambda i: ranked(i, LONG, SHORT),
    "all lost": lambda i: ranked(i, LONG, LONG + "!", LONG + "?"),
    "bad": lambda i: ranked(i, SHORT),
}


def loaded_and_encoded(encoder, path, plan):
    path.write_text("".join(json.dumps(MAKERS[kind](i)) + "\n" for i, kind in enumerate(plan)))
    loaded = load_preferences(path, max_bad_share=1)
    return loaded, encode_pairs(encoder, loaded.preferences, ["x"], on_long="drop")


@given(plan=st.lists(st.sampled_from([*MAKERS]), max_size=12))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_and_pairs_add_up(encoder, tmp_path, plan):
    plan = ["pair", *plan]
    loaded, encoded = loaded_and_encoded(encoder, tmp_path / "x.jsonl", plan)
    books = account(loaded.quarantine, [encoded])
    lost = sum(sum(reasons.values()) for reasons in books.rows_not_used.values())
    assert loaded.num_rows == len(plan) == books.rows_read == books.rows_used + lost
    assert books.rows_partly_used == plan.count("partly")
    assert books.rows_used == sum(plan.count(kind) for kind in ("pair", "whole", "partly"))
    reasons = Counter({"too_long": plan.count("lost") + plan.count("all lost"), "too_few_responses": plan.count("bad")})
    assert books.rows_not_used == ({"x": dict(+reasons)} if +reasons else {})
    refused = sum(sum(reasons.values()) for reasons in books.pairs_not_used.values())
    assert len(loaded.preferences) == books.pairs_made == books.pairs_used + refused
    assert refused == 2 * plan.count("partly") + plan.count("lost") + 3 * plan.count("all lost")
    assert books.pairs_used == len(encoded.pairs)


def test_a_refused_pair_of_several_says_which_one_of_its_row_it_is(encoder, tmp_path):
    loaded, encoded = loaded_and_encoded(encoder, tmp_path / "x.jsonl", ["pair", "partly", "lost"])
    told = [(q.line, q.detail.split("too_long")[0]) for q in [*loaded.quarantine, *encoded.quarantine]]
    assert told == [(2, "pair 2 of 3: "), (2, "pair 3 of 3: "), (3, "")]
