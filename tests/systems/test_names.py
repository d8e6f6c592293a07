"""Any domain is the name of an expert: fit for files and torch, unique, and the same when domains are added."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moreward.errors import ConfigError
from moreward.systems._base import expert_names

DOMAINS = st.lists(st.text(min_size=1, max_size=80) | st.sampled_from(dir(nn.ModuleDict())), unique=True, max_size=6)


def test_plain_domains_keep_their_names() -> None:
    assert expert_names(["code", "Chat Easy", "hh_rlhf"]) == ("code", "chat-easy", "hh_rlhf")


@given(DOMAINS)
def test_every_domain_gets_a_name_of_its_own_that_torch_and_files_take(domains: list[str]) -> None:
    names = expert_names(domains)
    assert list(nn.ModuleDict({name: nn.Identity() for name in names})) == list(names)
    assert len(set(names)) == len(domains)
    assert all(re.fullmatch(r"[a-z0-9_-]{1,73}", name) for name in names)


@given(DOMAINS)
def test_a_domain_added_later_changes_no_name(domains: list[str]) -> None:
    assert expert_names(domains[:-1]) == expert_names(domains)[: max(0, len(domains) - 1)]


def test_torchs_own_attributes_get_a_mark() -> None:
    assert expert_names(["values", "Keys", "type", "train", "forward"]) == (
        "values_",
        "keys_",
        "type_",
        "train_",
        "forward_",
    )


def test_domains_without_a_latin_letter_are_named_by_their_hash() -> None:
    maths, law = expert_names(["数学", "法律"])
    assert re.fullmatch(r"d-[0-9a-f]{8}", maths)
    assert maths != law


def test_of_two_domains_with_one_name_the_later_gets_a_hash_behind_it() -> None:
    first, second = expert_names(["chat easy", "chat/easy"])
    assert first == "chat-easy"
    assert re.fullmatch(r"chat-easy-[0-9a-f]{8}", second)


def test_the_same_domain_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="must differ"):
        expert_names(["code", "code", "code"])
