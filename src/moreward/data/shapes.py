"""Column shapes found in the wild.

A shape is one entry of `SHAPES`: the columns it needs, those that often come with it, and one function from
a row to `Judged`. To add a shape, write that function and its entry. Plain text stays `str`; turns become a
tuple of messages.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moreward.data.values import (
    Row,
    RowError,
    Turns,
    assistant,
    content_of,
    optional_text,
    required,
    shown,
    text_of,
    text_or_turns,
    turns_of,
    user,
)
from moreward.types import Message, Text, TokenIds


@dataclass(frozen=True, slots=True)
class Judged:
    """What a row says: (chosen, rejected) pairs of responses to one prompt, and how many pairs were ties."""

    prompt: Text
    pairs: tuple[tuple[Text, Text], ...]
    num_ties: int = 0
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    token_ids: TokenIds | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """How one column shape is known and read.

    `needs` must all be there; `often` only breaks ties between shapes. `claims` looks at the values where the
    columns cannot tell. A shape with a `domain` is a benchmark: its own `domain` column means something else.
    """

    needs: frozenset[str]
    read: Callable[[Row], Judged]
    often: frozenset[str] = frozenset()
    claims: Callable[[Row], bool] | None = None
    has_prompt: bool = True
    domain: str = ""


# From texts to a prompt and a pair


def shared_prompt(chosen: Turns, rejected: Turns) -> Judged:
    """Two whole conversations: the prompt is their longest common run of turns."""
    check_ends(chosen, "chosen")
    check_ends(rejected, "rejected")
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(limit) if chosen[n] != rejected[n]), limit)
    if shared == 0 or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise RowError("prompt_mismatch", "rejected", f"differs from chosen before the reply, at turn {shared + 1}")
    return Judged(chosen[:shared], ((chosen[shared:], rejected[shared:]),))


def _reply(value: Text, prompt: Turns, name: str) -> Turns:
    """The reply turns alone, where the source may repeat the prompt before them."""
    turns = (assistant(value),) if isinstance(value, str) else value
    if turns[0]["role"] == "assistant":
        return turns
    if turns[: len(prompt)] == prompt and len(turns) > len(prompt):
        return turns[len(prompt) :]
    check_ends(turns, name)
    raise RowError("prompt_mismatch", name, f"starts with a {turns[0]['role']} turn that is not the prompt's")


def check_ends(turns: Turns, name: str) -> None:
    role = turns[-1]["role"]
    if role != "assistant":
        raise RowError("ends_on_user", name, f"must end with an assistant turn, ends with {role}")


def _same_kind(chosen: Text, rejected: Text) -> None:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("wrong_type", "rejected", "chosen and rejected must both be text or both be messages")


def _pair(row: Row) -> tuple[Text, Text]:
    chosen = text_or_turns(required(row, "chosen"), "chosen")
    rejected = text_or_turns(required(row, "rejected"), "rejected")
    _same_kind(chosen, rejected)
    return chosen, rejected


def ranked(prompt: Text, replies: Sequence[Text], ranks: Sequence[float]) -> Judged:
    """All pairs whose ranks differ; the lower rank is the better response. Equal ranks are ties."""
    order = sorted(range(len(replies)), key=lambda i: ranks[i])
    both = list(itertools.combinations(order, 2))
    pairs = tuple((replies[i], replies[j]) for i, j in both if ranks[i] != ranks[j])
    return Judged(prompt, pairs, num_ties=len(both) - len(pairs))


# One function per shape


def explicit(row: Row) -> Judged:
    """TRL with a prompt, OpenRLHF with a prompt key, RewardBench 1, and our own benchmark files.

    `messages` beside chosen and rejected is the prompt as turns, unless it ends with a reply (a copy of chosen).
    """
    if row.get("messages") is not None:
        turns = turns_of(row["messages"], "messages")
        if turns[-1]["role"] != "assistant":
            return _with_prompt(turns, *_pair(row))
    prompt = text_or_turns(required(row, "prompt"), "prompt")
    chosen, rejected = _pair(row)
    if isinstance(prompt, str):
        if isinstance(chosen, str) or isinstance(rejected, str):
            return Judged(prompt, ((chosen, rejected),))
        return _told_twice(prompt, chosen, rejected)
    if isinstance(chosen, str):
        raise RowError("wrong_type", "chosen", "prompt is messages, so expected messages, got str")
    return _with_prompt(prompt, chosen, rejected)


def _with_prompt(prompt: Turns, chosen: Text, rejected: Text) -> Judged:
    return Judged(prompt, ((_reply(chosen, prompt, "chosen"), _reply(rejected, prompt, "rejected")),))


def _told_twice(prompt: str, chosen: Turns, rejected: Turns) -> Judged:
    """A prompt as text beside whole conversations, which must hold it."""
    if chosen[0]["role"] == "assistant":
        raise RowError("wrong_type", "chosen", "prompt is text, so expected string or the whole conversation")
    judged = shared_prompt(chosen, rejected)
    if prompt not in [turn["content"] for turn in chosen[: len(judged.prompt)]]:
        raise RowError("prompt_mismatch", "prompt", "is not one of the turns before the reply")
    return judged


def messages_prompt(row: Row) -> Judged:
    """`messages` is the prompt where chosen and rejected are there too."""
    return _with_prompt(turns_of(required(row, "messages"), "messages"), *_pair(row))


def implicit(row: Row) -> Judged:
    """TRL without a prompt, OpenRLHF without a prompt key: whole texts, or whole conversations."""
    chosen, rejected = _pair(row)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return Judged("", ((chosen, rejected),))
    return shared_prompt(chosen, rejected)


def _prompt_column(name: str) -> Callable[[Row], Judged]:
    """RewardBench 1 with another name for the prompt."""
    return lambda row: explicit({**row, "prompt": required(row, name)})


_TRANSCRIPT_START = "\n\nHuman:"
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(row: Row) -> bool:
    texts = (row.get("chosen"), row.get("rejected"))
    return any(isinstance(text, str) and text.startswith(_TRANSCRIPT_START) for text in texts)


def transcript(row: Row) -> Judged:
    """Anthropic HH: `Human:` and `Assistant:` paragraphs. Blanks around a turn belong to the labels."""
    return shared_prompt(*(_transcript_turns(text_of(required(row, n), n), n) for n in ("chosen", "rejected")))


def _transcript_turns(text: str, name: str) -> Turns:
    head, *parts = _TRANSCRIPT_TURN.split(text)
    if head.strip() or not parts:
        raise RowError("wrong_type", name, "expected a transcript that starts with a Human: paragraph")
    speakers = {"Human": user, "Assistant": assistant}
    return tuple(speakers[who](said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


UNDECLARED = (
    "token ids are for training, and only where data.tokenizer_sha256 declares the tokenizer that made them (`moreward "
    "data check PATH --backbone DIR` prints the hash of a backbone's); or give the texts (chosen, rejected)"
)


def _pretokenized(suffix: str) -> Callable[[Row], Judged]:
    """TRL rows that are tokens already: whole conversations, and the prompt's tokens if they are there."""

    def read(row: Row) -> Judged:
        chosen, rejected = (
            _ids(required(row, f"{side}{suffix}"), f"{side}{suffix}") for side in ("chosen", "rejected")
        )
        prompt = row.get(f"prompt{suffix}")
        ids = TokenIds(
            chosen=chosen, rejected=rejected, prompt=() if prompt is None else _ids(prompt, f"prompt{suffix}")
        )
        for name, given in (("chosen", chosen), ("rejected", rejected)):
            if not given:
                raise RowError(f"empty_{name}", f"{name}{suffix}", "has no tokens")
        if chosen == rejected:
            raise RowError("identical", f"rejected{suffix}", "is the same as chosen")
        return Judged("", (("", ""),), token_ids=ids)

    return read


def _ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise RowError("wrong_type", name, f"expected a list of token ids, got {shown(value)}")
    return tuple(value)


def alpaca(row: Row) -> Judged:
    """LLaMA-Factory: the instruction, a newline, the input; system and history before it."""
    instruction = text_of(required(row, "instruction"), "instruction")
    extra = optional_text(row, "input")
    prompt = (
        *_system(row),
        *_history(row.get("history")),
        user(f"{instruction}\n{extra}" if extra else instruction),
    )
    chosen, rejected = (text_of(required(row, name), name) for name in ("chosen", "rejected"))
    return Judged(prompt, (((assistant(chosen),), (assistant(rejected),)),))


def _system(row: Row) -> Turns:
    system = optional_text(row, "system")
    return ({"role": "system", "content": system},) if system else ()


def _history(value: Any) -> Turns:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RowError("wrong_type", "history", "expected a list of [user, assistant] pairs")
    return tuple(
        turn for said, heard in value for turn in (user(text_of(said, "history")), assistant(text_of(heard, "history")))
    )


def sharegpt(row: Row) -> Judged:
    """LLaMA-Factory: turns as `from` and `value`, the two replies as one such turn each."""
    spoken = required(row, "conversations")
    if not isinstance(spoken, list) or not spoken:
        code = "wrong_type" if not isinstance(spoken, list) else "empty_conversation"
        raise RowError(code, "conversations", "expected a list of turns with from and value")
    prompt = (*_system(row), *(_sharegpt_turn(turn, f"conversations[{i}]") for i, turn in enumerate(spoken)))
    chosen, rejected = (_sharegpt_turn(required(row, name), name) for name in ("chosen", "rejected"))
    return Judged(prompt, (((chosen,), (rejected,)),))


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}


def _sharegpt_turn(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError("wrong_type", name, f"expected an object with from and value, got {type(item).__name__}")
    speaker, value = item.get("from"), item.get("value")
    if speaker == "function_call":
        return _tool_call_turn(value, f"{name}.value")
    if speaker not in _SHAREGPT_ROLES:
        allowed = ", ".join([*_SHAREGPT_ROLES, "function_call"])
        raise RowError("bad_role", f"{name}.from", f"expected one of {allowed}, got {shown(speaker)}")
    return {"role": _SHAREGPT_ROLES[speaker], "content": content_of(value, f"{name}.value")}


def _tool_call_turn(value: Any, name: str) -> Message:
    """A call written as JSON text: one `{"name", "arguments"}` or a list of them."""
    try:
        calls = json.loads(text_of(value, name))
    except ValueError as error:
        raise RowError("wrong_type", name, "expected a tool call as JSON with name and arguments") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError("wrong_type", name, "expected a tool call as JSON with name and arguments")
    wrapped = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": wrapped}


def _swift_turns(value: Any, name: str) -> Turns:
    """ms-swift messages, whose `tool_call` and `tool_response` roles are spelled ours."""
    if not isinstance(value, list):
        return turns_of(value, name)
    return turns_of([_swift_turn(item, f"{name}[{i}]") for i, item in enumerate(value)], name)


def _swift_turn(item: Any, name: str) -> Any:
    role = item.get("role") if isinstance(item, Mapping) else None
    if role == "tool_call":
        return _tool_call_turn(item.get("content"), f"{name}.content")
    return {**item, "role": "tool"} if role == "tool_response" else item


def swift_response(row: Row) -> Judged:
    """ms-swift: the last reply of `messages` is chosen; `rejected_response` replaces it."""
    messages = _swift_turns(required(row, "messages"), "messages")
    check_ends(messages, "messages")
    users = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
    if not users:
        raise RowError("empty_prompt", "messages", "has no user turn")
    value = required(row, "rejected_response")
    rejected = (assistant(value),) if isinstance(value, str) else _swift_turns(value, "rejected_response")
    after = users[-1] + 1
    return Judged(messages[:after], ((messages[after:], rejected),))


def swift_messages(row: Row) -> Judged:
    """ms-swift: both conversations in full."""
    names = ("messages", "rejected_messages")
    return shared_prompt(*(_swift_turns(required(row, name), name) for name in names))


def nemo(row: Row) -> Judged:
    """NeMo-RL: ranked completions of a context, lower rank better; two or more."""
    context = turns_of(required(row, "context"), "context")
    items = required(row, "completions")
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise RowError("wrong_type", "completions", "expected a list of objects with rank and completion")
    if len(items) < 2:
        raise RowError("too_few_responses", "completions", f"a preference needs at least 2, got {len(items)}")
    ranks = [_rank(item.get("rank"), f"completions[{i}].rank") for i, item in enumerate(items)]
    replies = [turns_of(item.get("completion"), f"completions[{i}].completion") for i, item in enumerate(items)]
    return ranked(context, replies, ranks)


def _rank(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RowError("wrong_type", name, f"expected a whole number, got {shown(value)}")
    return value


def rewardbench2(row: Row) -> Judged:
    """RewardBench 2: every right answer over every wrong one."""
    right, wrong = (_answers(required(row, name), name) for name in ("chosen", "rejected"))
    pairs = tuple(itertools.product(right, wrong))
    return Judged(text_or_turns(required(row, "prompt"), "prompt"), pairs)


def _answers(value: Any, name: str) -> list[Text]:
    if not isinstance(value, list):
        raise RowError("wrong_type", name, f"expected a list of answers, got {type(value).__name__}")
    if not value:
        raise RowError("too_few_responses", name, "has no answer")
    return [text_or_turns(answer, f"{name}[{i}]") for i, answer in enumerate(value)]


def _columns(names: str) -> frozenset[str]:
    return frozenset(names.split())


SHAPES: Mapping[str, Shape] = {
    "explicit": Shape(_columns("prompt chosen rejected"), explicit, often=_columns("messages question input")),
    "messages_prompt": Shape(_columns("messages chosen rejected"), messages_prompt),
    "implicit": Shape(_columns("chosen rejected"), implicit, has_prompt=False),
    "hh": Shape(_columns("chosen rejected"), transcript, claims=is_transcript),
    "question": Shape(_columns("question chosen rejected"), _prompt_column("question")),
    "input": Shape(_columns("input chosen rejected"), _prompt_column("input")),
    "rewardbench2": Shape(
        _columns("prompt chosen rejected num_correct"),
        rewardbench2,
        often=_columns("num_incorrect total_completions models additional_metadata"),
    ),
    "alpaca": Shape(_columns("instruction chosen rejected"), alpaca, often=_columns("input system history")),
    "sharegpt": Shape(_columns("conversations chosen rejected"), sharegpt, often=_columns("system")),
    "ms_swift": Shape(_columns("messages rejected_response"), swift_response),
    "ms_swift_messages": Shape(_columns("messages rejected_messages"), swift_messages),
    "nemo": Shape(_columns("context completions"), nemo),
    "pretokenized": Shape(
        _columns("chosen_ids rejected_ids"), _pretokenized("_ids"), often=_columns("prompt_ids"), has_prompt=False
    ),
    "pretokenized_legacy": Shape(
        _columns("chosen_input_ids rejected_input_ids"),
        _pretokenized("_input_ids"),
        often=_columns("prompt_input_ids"),
        has_prompt=False,
    ),
}
