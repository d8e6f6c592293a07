"""Column shapes found in the wild, turned into `Preference`.

A shape is one entry of `SHAPES`: the columns it needs, those that often come with it, and one function from
a row to `Judged`. To add a shape, write that function and its entry. Plain text stays `str`; turns become a
tuple of messages. A row that cannot be used raises `RowError`, whose `code` stands in `reasons.py`.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from moreward.errors import ConfigError, DataError
from moreward.types import NO_DOMAIN, Message, Preference, Text, TokenIds

Row: TypeAlias = Mapping[str, Any]
Turns: TypeAlias = tuple[Message, ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MARGIN = 100.0
MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
LABEL_COLUMNS = ("subset", "task_name", "channel", "data_source")
"""Columns that say where a row belongs; kept in `Preference.meta`, and usable as `domain_key`."""

_TURN_EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class RowError(DataError):
    """One row cannot be used: `code` is the reason, `field` the column, `detail` what was expected and given."""

    def __init__(self, code: str, field: str, detail: str) -> None:
        self.code, self.field, self.detail = code, field, detail
        super().__init__(f"{field}: {detail}" if field else detail)


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


@dataclass(frozen=True, slots=True)
class Converted:
    """The pairs of one row. Ties are counted and give no pair."""

    preferences: list[Preference]
    num_ties: int = 0


# Reading one value


def required(row: Row, name: str) -> Any:
    """The value of a column; absent or null is `missing_field`."""
    value = row.get(name)
    if value is None:
        raise RowError("missing_field", name, "is missing or null")
    return value


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", name, f"expected string, got {type(value).__name__}")
    return value


def optional_text(row: Row, name: str) -> str:
    """The text of a column; absent or null is an empty string."""
    value = row.get(name)
    return "" if value is None else text_of(value, name)


def turns_of(value: Any, name: str) -> Turns:
    """Message turns with known roles and text contents."""
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", name, f"expected messages, got {type(value).__name__}")
    if not value:
        raise RowError("empty_conversation", name, "has no turns")
    return tuple(_turn(item, f"{name}[{i}]") for i, item in enumerate(value))


def text_or_turns(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return turns_of(value, name)
    raise RowError("wrong_type", name, f"expected string or messages, got {type(value).__name__}")


def _turn(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError("wrong_type", name, f"expected a message with role and content, got {type(item).__name__}")
    role = item.get("role")
    if role not in ROLES:
        raise RowError("bad_role", f"{name}.role", f"expected one of {', '.join(ROLES)}, got {_short(role)}")
    extras = {key: item[key] for key in _TURN_EXTRAS if item.get(key) is not None}
    content = item.get("content")
    if content is None and extras.get("tool_calls"):
        content = ""
    return {"role": role, "content": _content(content, f"{name}.content"), **extras}


def _content(value: Any, name: str) -> str:
    """A turn's text: a string, or text parts one after the other."""
    if isinstance(value, str):
        return value
    if value is None:
        raise RowError("missing_field", name, "is missing or null")
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", name, f"expected string or text parts, got {type(value).__name__}")
    return "".join(_part(part, f"{name}[{i}]") for i, part in enumerate(value))


def _part(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise RowError("unsupported_content", name, f"only text parts can be read, got {_short(kind)}")
    return text_of(required(part, "text"), f"{name}.text")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# From texts to a prompt and a pair


def shared_prompt(chosen: Turns, rejected: Turns) -> Judged:
    """Two whole conversations: the prompt is their longest common run of turns."""
    _check_ends(chosen, "chosen")
    _check_ends(rejected, "rejected")
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
    _check_ends(turns, name)
    raise RowError("prompt_mismatch", name, f"starts with a {turns[0]['role']} turn that is not the prompt's")


def _check_ends(turns: Turns, name: str) -> None:
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
        raise RowError("wrong_type", name, f"expected a list of token ids, got {_short(value)}")
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
        raise RowError("bad_role", f"{name}.from", f"expected one of {allowed}, got {_short(speaker)}")
    return {"role": _SHAREGPT_ROLES[speaker], "content": _content(value, f"{name}.value")}


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
    _check_ends(messages, "messages")
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
        raise RowError("wrong_type", name, f"expected a whole number, got {_short(value)}")
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


# Which shape


def detect(row: Row) -> str:
    """The name of the shape that explains most of this row's columns.

    Raises:
        RowError: `missing_field` when a known shape lacks a column, `unknown_shape` when nothing fits,
            `ambiguous_shape` (with the candidates) when several fit equally well.
    """
    columns = frozenset(row)
    fits = {
        name: (len(columns & (shape.needs | shape.often)), shape.claims is not None)
        for name, shape in SHAPES.items()
        if shape.needs <= columns and (shape.claims is None or shape.claims(row))
    }
    if not fits:
        raise _no_shape(columns)
    best = max(fits.values())
    names = sorted(name for name, fit in fits.items() if fit == best)
    if len(names) > 1:
        raise RowError(
            "ambiguous_shape",
            "",
            f"columns {', '.join(sorted(columns))} could be {' or '.join(names)}; say which with --format",
        )
    return names[0]


def find_shape(name: str, shapes: Mapping[str, Shape] = SHAPES) -> Shape:
    """The shape of that name, or a `ConfigError` with the nearest and all known ones."""
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"Unknown format {name!r}.{hint} Known: {', '.join(sorted(shapes))}.")
    return shapes[name]


def _no_shape(columns: frozenset[str]) -> RowError:
    """Names the column that the nearest shape lacks."""
    if "messages" in columns:
        return RowError("missing_field", "rejected_response", "is missing; messages alone hold no preference")
    name = max(SHAPES, key=lambda n: (len(SHAPES[n].needs & columns), -len(SHAPES[n].needs - columns)))
    missing = sorted(SHAPES[name].needs - columns)
    if len(missing) < len(SHAPES[name].needs):
        return RowError("missing_field", missing[0], f"is missing (nearest shape: {name})")
    found = ", ".join(sorted(columns)) or "none"
    return RowError("unknown_shape", "", f"no known shape has the columns {found}; known: {', '.join(SHAPES)}")


# From a row to preferences


def convert(row: Row, *, shape: str | Shape | None = None, fields: Mapping[str, str] = _NOTHING) -> list[Preference]:
    """The pairs that a row holds: one, or several from ranked or many answers, or none if all are ties.

    `shape` names an entry of `SHAPES` (default: detected). `fields` renames columns first, from our name to
    the row's, as in `{"prompt": "question", "chosen": "good"}`.

    Raises:
        RowError: the row cannot be used; `code` says why.
    """
    return convert_row(row, shape=shape, fields=fields).preferences


def convert_row(
    row: Row,
    *,
    shape: str | Shape | None = None,
    fields: Mapping[str, str] = _NOTHING,
    domain: str = "",
    source: str = "",
    allow_empty_prompt: bool = False,
    allow_token_ids: bool = False,
) -> Converted:
    """`convert` with the number of ties. `domain` is for rows that name none; `source` is `file:line`."""
    row = _renamed(row, fields)
    kind = shape if isinstance(shape, Shape) else find_shape(shape or detect(row))
    if media := [name for name in MEDIA_COLUMNS if row.get(name)]:
        raise RowError("unsupported_content", media[0], "only text can be read")
    judged = kind.read(row)
    if judged.token_ids is not None and not allow_token_ids:
        raise RowError("pretokenized", "", UNDECLARED)
    if kind.has_prompt and not allow_empty_prompt and _is_blank(judged.prompt):
        raise RowError("empty_prompt", "prompt", "is empty; empty prompts need allow_empty_prompt")
    for chosen, rejected in judged.pairs if judged.token_ids is None else ():
        _check_pair(chosen, rejected)
    own = "" if kind.domain else optional_text(row, "domain")
    domain = own or domain or kind.domain or NO_DOMAIN
    return Converted(_preferences(row, judged, domain=domain, source=source), judged.num_ties)


def _renamed(row: Row, fields: Mapping[str, str]) -> Row:
    if not fields:
        return row
    if absent := [theirs for theirs in fields.values() if theirs not in row]:
        raise RowError("missing_field", absent[0], "is missing")
    rest = {name: value for name, value in row.items() if name not in fields.values()}
    return rest | {ours: row[theirs] for ours, theirs in fields.items()}


def _check_pair(chosen: Text, rejected: Text) -> None:
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(text, str):
            _check_ends(text, name)
        if _is_blank(text):
            raise RowError(f"empty_{name}", name, "is empty or only blanks")
    if chosen == rejected:
        raise RowError("identical", "rejected", "is the same as chosen")


def _is_blank(text: Text) -> bool:
    """A conversation is judged by its last turn, in which a tool call counts as something said."""
    if isinstance(text, str):
        return not text.strip()
    return not text or not (text[-1]["content"].strip() or text[-1].get("tool_calls"))


def _preferences(row: Row, judged: Judged, *, domain: str, source: str) -> list[Preference]:
    name, margin, tools = _name(row, "id"), _margin(row), _tools(row.get("tools"))
    kwargs = _mapping(row, "chat_template_kwargs")
    labels = {column: row[column] for column in LABEL_COLUMNS if row.get(column) is not None}
    meta = {**labels, **judged.meta, **_mapping(row, "meta")}
    several = len(judged.pairs) > 1
    return [
        Preference(
            prompt=judged.prompt,
            chosen=chosen,
            rejected=rejected,
            domain=domain,
            id=f"{name}#{i}" if several and name else name,
            margin=margin,
            group=judged.group or _name(row, "group"),
            source=source,
            tools=tools,
            chat_template_kwargs=kwargs,
            meta=meta,
            token_ids=judged.token_ids,
        )
        for i, (chosen, rejected) in enumerate(judged.pairs)
    ]


def _name(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RowError("wrong_type", column, f"expected string or whole number, got {type(value).__name__}")
    return str(value)


def _margin(row: Row) -> float | None:
    if "margin" not in row:
        return None
    value = row["margin"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("bad_margin", "margin", f"expected a number, got {_short(value)}")
    if not abs(value) <= MAX_MARGIN:  # so that NaN is caught too
        raise RowError("bad_margin", "margin", f"must be finite and within ±{MAX_MARGIN:g}, got {_short(value)}")
    return float(value)


def _tools(value: Any) -> list[Mapping[str, Any]] | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError as error:
            raise RowError("wrong_type", "tools", "expected a list or a list as JSON text") from error
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("wrong_type", "tools", f"expected a list of tool descriptions, got {type(value).__name__}")
    return value or None


def _mapping(row: Row, column: str) -> Mapping[str, Any]:
    value = row.get(column)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError("wrong_type", column, f"expected an object, got {type(value).__name__}")
    return value
