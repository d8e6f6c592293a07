"""Every reason for which a row or a pair is put aside, and every remark about one that is kept.

The codes stand in `quarantine.jsonl`, in a run's card and in what `moreward data check` says; `docs/data.md` explains
them to users.
"""

from __future__ import annotations

FAULTS: tuple[str, ...] = (
    # the file is damaged there
    "bad_json",
    "duplicate_key",
    "bad_encoding",
    "row_too_long",
    "bad_csv",
    # the columns
    "missing_field",
    "wrong_type",
    "unknown_shape",
    "ambiguous_shape",
    "pretokenized",
    "unsupported_content",
    "bad_margin",
    "bad_label",
    "bad_rating",
    # what was said
    "empty_prompt",
    "empty_chosen",
    "empty_rejected",
    "empty_response",
    "empty_conversation",
    "bad_role",
    "ends_on_user",
    "prompt_mismatch",
    "too_few_responses",
    "duplicate_in_other_domain",
    # as tokens
    "bad_template",
    "bad_token_ids",
    "too_long",
    "identical_after_truncation",
)

MESSAGE_FATES: tuple[str, ...] = (
    "prompter",
    "deleted",
    "rejected_in_review",
    "other_language",
    "unranked",
    "broken_context",
    "alone",
)
"""Why a message of an OpenAssistant tree stands in no pair."""

CAPABILITY = "capability"
"""The row judges one capability, and whoever reads it wants judgements of whole responses."""

NOT_BAD: frozenset[str] = frozenset({"duplicate", "identical", "tie", CAPABILITY, *MESSAGE_FATES})
"""Reasons that say nothing against the file: such rows do not count towards `max_bad_share`."""

REMARKS: tuple[str, ...] = (
    "contradiction",
    "truncated",
    "special_tokens",
    "doubled_bos",
    "missing_eos",
    "pad_is_eos",
    "file_not_read",
)
"""What `data check` says beside the reasons of rows not kept; `empty_prompt` and `identical_after_truncation` may be
remarks too, where the row is kept."""

CODES: frozenset[str] = frozenset({*FAULTS, *NOT_BAD, *REMARKS})
