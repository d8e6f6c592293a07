"""Texts to tokens, pairs to batches.

N conversations, B pairs (N = 2B, chosen first), P distinct prompts, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from moreward.data.audit import PairLengths, TokenizerMarks
from moreward.data.load import Quarantined
from moreward.errors import DataError
from moreward.types import NO_DOMAIN, Batch, Conversation, Message, OwnIds, Preference, Rated, Rendered, Text

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ROLES = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}

OURS = frozenset({"tokenize", "add_generation_prompt", "chat_template", "conversation", "return_tensors"})
"""Arguments of `apply_chat_template` that no row may set: they change what it returns, not what a template reads."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation and of its prompt alone; how many tokens were cut off the conversation. `own_ids_E`
    is the same conversation for each expert that has a tokenizer of its own."""

    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    num_dropped: int = 0
    own_ids_E: tuple[OwnIds, ...] = ()

    @property
    def truncated(self) -> bool:
        return self.num_dropped > 0

    @property
    def num_tokens(self) -> int:
        """Of the longest reading."""
        return max(len(self.ids), *(len(own.ids) for own in self.own_ids_E), 0)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    preference: Preference
    chosen: Encoded
    rejected: Encoded
    domain: int

    @property
    def num_tokens(self) -> int:
        return max(self.chosen.num_tokens, self.rejected.num_tokens)


@dataclass(frozen=True, slots=True)
class EncodedRated:
    rated: Rated
    encoded: Encoded
    domain: int
    ratings_K: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.encoded.ids)


class Encoder:
    """A tokenizer with the rules that make its output a reward model's input.

    Turns are rendered with the tokenizer's chat template, plain text as the tokenizer joins a pair (encoders) or
    prompt + response + eos (decoders, as TRL does). Special tokens written inside a text stay text. What exceeds
    `max_length` is cut from the start: the prompt goes first, the end of the response stays.
    """

    def __init__(self, tokenizer: Any, max_length: int, input_template: str = "") -> None:
        """`input_template` holds one `{}`, where a prompt that is plain text is put."""
        self.tokenizer = tokenizer
        self.before, _, self.after = input_template.partition("{}")
        self.max_length = max_length
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.joins_pairs = tokenizer.sep_token_id is not None and tokenizer.cls_token_id is not None
        self._specials = sorted((t for t in tokenizer.all_special_tokens if t), key=len, reverse=True)
        self._bos_ids = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
        self._special_ids = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        self._to_hide = re.compile("|".join(re.escape(t) for t in (*self._specials, "\ue000")))
        self._ahead: dict[str, list[int]] = {}
        self._prefix, self._middle, self._suffix = self._frame()
        num_frame = len(self._prefix) + len(self._middle) + len(self._suffix)
        if max_length <= num_frame + 1:
            raise DataError(f"data.max_length: {max_length} leaves no room beside {num_frame} special tokens")

    def conversation(self, item: Conversation | Rendered) -> Encoded:
        """Token ids. DataError where the chat template refuses the turns, tools or arguments of this item."""
        if isinstance(item, Rendered):
            return self._as_it_stands(item)
        if not isinstance(item.prompt, str) or not isinstance(item.response, str):
            if self.has_template:
                return self._templated(item)
            item = Conversation(prompt=_as_text(item.prompt), response=_as_text(item.response), id=item.id)
        else:
            item = replace(item, prompt=self._framed(item.prompt))
        prompt, response = self._plain(str(item.prompt)), self._plain(str(item.response))
        if not self.joins_pairs:
            eos = self._suffix
            body = self._plain(f"{item.prompt}{item.response}")
            body = body[: -len(eos)] if eos and body[-len(eos) :] == eos else body
            return self._cut(self._prefix, body, eos, prompt)
        return self._cut_pair(prompt, response)

    def pair(self, preference: Preference) -> tuple[Encoded, Encoded]:
        if ids := preference.token_ids:
            return self._given(ids.chosen, ids.prompt), self._given(ids.rejected, ids.prompt)
        return self.conversation(side(preference, "chosen")), self.conversation(side(preference, "rejected"))

    def too_long(self, encoded: Encoded) -> str:
        """What is said of a conversation that was cut."""
        return f"{len(encoded.ids) + encoded.num_dropped} tokens, the limit is {self.max_length}"

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` reads back into `folder/backbone`."""
        self.tokenizer.save_pretrained(folder / "backbone")

    def measure(self, preference: Preference) -> PairLengths:
        """What the audit wants to know of a pair's tokens."""
        texts = " ".join(_as_text(t) for t in (preference.prompt, preference.chosen, preference.rejected))
        special_tokens = any(s in texts for s in self._specials)
        try:
            chosen, rejected = self.pair(preference)
        except DataError as error:
            return PairLengths(0, 0, False, False, special_tokens, refusal=str(error))
        return PairLengths(
            chosen_tokens=len(chosen.ids) + chosen.num_dropped,
            rejected_tokens=len(rejected.ids) + rejected.num_dropped,
            truncated=chosen.truncated or rejected.truncated,
            identical_after_truncation=chosen.ids == rejected.ids,
            special_tokens=special_tokens,
            doubled_bos=any(self._bos_ids >= {*e.ids[:2]} for e in (chosen, rejected)),
            missing_eos=not (self._is_ended(chosen) and self._is_ended(rejected)),
        )

    @property
    def marks(self) -> TokenizerMarks:
        """The tokens that the audit speaks of."""
        t = self.tokenizer
        return TokenizerMarks(
            bos=t.bos_token or t.cls_token or "",
            eos=t.eos_token or t.sep_token or "",
            pad=t.pad_token or "",
            sha256=tokenizer_sha256(t),
        )

    def _is_ended(self, encoded: Encoded) -> bool:
        """Whether the last token that is not blank ends a text."""
        ends = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id} - {None}
        last = next((i for i in reversed(encoded.ids) if i in ends or self.tokenizer.decode([i]).strip()), None)
        return last in ends

    @contextmanager
    def reading_ahead(self, preferences: Sequence[Preference]) -> Iterator[None]:
        """Within this context the plain texts of these pairs are known: tokenised together, which is several times
        faster than one by one."""
        texts = {t for p in preferences for t in (p.chosen, p.rejected) if isinstance(t, str)}
        texts |= {self._framed(p.prompt) for p in preferences if isinstance(p.prompt, str)}
        self._ahead = dict(zip(texts, self._tokenise(list(texts)), strict=True)) if self.joins_pairs else {}
        try:
            yield
        finally:
            self._ahead = {}

    def _framed(self, prompt: str) -> str:
        return f"{self.before}{prompt}{self.after}" if prompt.strip() else prompt

    def _plain(self, text: str) -> list[int]:
        return self._ahead[text] if text in self._ahead else self._tokenise([text])[0]

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        rows = list(self.tokenizer(texts, **options)["input_ids"])
        # Unigram vocabularies hold the special tokens as pieces, and find them in a text all the same.
        meant = [i for i, row in enumerate(rows) if not self._special_ids.isdisjoint(row)]
        for i in meant:
            rows[i] = self.tokenizer(self._broken_up(texts[i]), **options)["input_ids"]
        return rows

    def _broken_up(self, text: str) -> str:
        for special in self._specials:
            text = text.replace(special, f"{special[0]} {special[1:]}")
        return text

    def _frame(self) -> tuple[list[int], list[int], list[int]]:
        """The special tokens that the tokenizer puts before, between and after two texts (or around one)."""
        first, second = self._plain("one"), self._plain("two")
        if self.joins_pairs:
            ids = list(self.tokenizer("one", "two")["input_ids"])
            a = _find(ids, first, 0)
            b = _find(ids, second, a + len(first))
            return ids[:a], ids[a + len(first) : b], ids[b + len(second) :]
        ids = list(self.tokenizer("one")["input_ids"])
        a = _find(ids, first, 0)
        eos = self.tokenizer.eos_token_id
        return ids[:a], [], ids[a + len(first) :] or ([] if eos is None else [eos])

    def _as_it_stands(self, item: Rendered) -> Encoded:
        if not isinstance(item.text, str):
            if not item.text:
                raise DataError("no token ids; give at least one")
            if any(i < 0 for i in item.text):
                raise DataError(f"token id {min(item.text)} is negative")
            return self._given(item.text, item.text)
        options = {"add_special_tokens": item.special_tokens, "verbose": False}
        ids = list(self.tokenizer(item.text, **options)["input_ids"])
        num_doubled = 1 if len(ids) > 1 and ids[0] == ids[1] and ids[0] in self._bos_ids else 0
        ids = ids[num_doubled:]
        if not ids:
            raise DataError("the text has no tokens; give at least one")
        known = item.prompt and item.text.startswith(item.prompt)
        prompt = list(self.tokenizer(item.prompt, **options)["input_ids"])[num_doubled:] if known else ids
        bos = [ids[0]] if ids[0] in self._bos_ids else []
        return self._cut(bos, ids[len(bos) :], [], prompt[len(bos) :])

    def _cut(self, prefix: list[int], body: list[int], suffix: list[int], prompt: list[int]) -> Encoded:
        room = self.max_length - len(prefix) - len(suffix)
        dropped = max(0, len(body) - room)
        ids = [*prefix, *body[dropped:], *suffix]
        prompt_ids = [*prefix, *prompt[-room:]] or suffix or [self.pad_id]
        return Encoded(tuple(ids), tuple(prompt_ids), dropped)

    def _given(self, ids: tuple[int, ...], prompt: tuple[int, ...]) -> Encoded:
        """Token ids as they came, cut from the start like any others."""
        if (largest := max((*ids, *prompt))) >= len(self.tokenizer):
            raise DataError(f"token id {largest} is none of the {len(self.tokenizer)} of the tokenizer")
        dropped = max(0, len(ids) - self.max_length)
        return Encoded(ids[dropped:], prompt[-self.max_length :] or tuple(self._suffix) or (self.pad_id,), dropped)

    def _cut_pair(self, prompt: list[int], response: list[int]) -> Encoded:
        room = self.max_length - len(self._prefix) - len(self._middle) - len(self._suffix)
        cut_response = max(0, len(response) - room)
        cut_prompt = max(0, len(prompt) - (room - (len(response) - cut_response)))
        ids = [*self._prefix, *prompt[cut_prompt:], *self._middle, *response[cut_response:], *self._suffix]
        alone = self.max_length - len(self._prefix) - len(self._suffix)
        prompt_ids = [*self._prefix, *prompt[max(0, len(prompt) - alone) :], *self._suffix]
        return Encoded(tuple(ids), tuple(prompt_ids), cut_prompt + cut_response)

    def _templated(self, item: Conversation) -> Encoded:
        prompt, response = _as_turns(item.prompt, "user"), _as_turns(item.response, "assistant")
        options: dict[str, Any] = {"tools": item.tools or None, **item.chat_template_kwargs}
        where = f"{item.id}: " if item.id else ""
        if taken := sorted(OURS & options.keys()):
            raise DataError(f"{where}chat template: chat_template_kwargs may not set {', '.join(taken)}; leave it out")
        try:
            body = self._rendered([*prompt, *response], options)
            alone = self._rendered(prompt, options) if prompt else []
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}chat template: {error}") from error
        return self._cut([], body, [], alone)

    def _rendered(self, turns: Sequence[Message], options: dict[str, Any]) -> list[int]:
        """Template tokens are special, the same strings inside a turn are not: they travel as placeholders."""
        hidden: list[str] = []
        turns = [{**turn, "content": self._hide(str(turn.get("content") or ""), hidden)} for turn in turns]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False, **options)
        ids: list[int] = []
        for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            if i % 2:
                ids += self._plain(hidden[int(piece)])
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _hide(self, content: str, hidden: list[str]) -> str:
        def placeholder(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return f"\ue000{len(hidden) - 1}\ue001"

        return self._to_hide.sub(placeholder, content)


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of which token each id means, the same however the tokenizer is stored."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def side(preference: Preference, which: str) -> Conversation:
    """The chosen or the rejected half of a pair as a conversation."""
    if preference.token_ids is not None:
        raise DataError(f"{preference.name}: token ids are for training only; a reward is given to texts")
    return Conversation(
        prompt=preference.prompt,
        response=preference.chosen if which == "chosen" else preference.rejected,
        id=preference.name,
        domain=preference.domain,
        tools=preference.tools,
        chat_template_kwargs=preference.chat_template_kwargs,
    )


@dataclass(frozen=True)
class EncodedSet:
    """Pairs ready for training; those that did not get in, each with its reason; and how many were cut, by domain."""

    pairs: list[EncodedPair]
    refused: list[Preference]
    quarantine: list[Quarantined]
    num_truncated: dict[str, int]


def encode_pairs(
    encoder: Encoder, preferences: Sequence[Preference], domains: Sequence[str], *, on_long: str
) -> EncodedSet:
    """Tokenise pairs. `on_long`: `drop` leaves pairs beyond the limit out, `truncate` cuts them; both are counted.
    A pair that the chat template refuses is left out too.

    A domain that loses all its pairs is a DataError: a mixture without one of its domains is not what was asked for.
    """
    index = {domain: i for i, domain in enumerate(domains)}
    result = EncodedSet([], [], [], {})
    with encoder.reading_ahead(preferences):
        for preference, place in zip(preferences, _places_in_rows(preferences), strict=True):
            try:
                chosen, rejected = encoder.pair(preference)
                reason, detail = _fault(chosen, rejected, on_long)
            except DataError as error:
                reason, detail = "bad_template" if preference.token_ids is None else "bad_token_ids", str(error)
            if reason:
                result.refused.append(preference)
                result.quarantine.append(_refused(preference, reason, place + detail))
                continue
            if chosen.truncated or rejected.truncated:
                count = result.num_truncated.get(preference.domain, 0)
                result.num_truncated[preference.domain] = count + 1
            result.pairs.append(EncodedPair(preference, chosen, rejected, index.get(preference.domain, -1)))
    _refuse_emptied(result, preferences, encoder.max_length)
    return result


def _fault(chosen: Encoded, rejected: Encoded, on_long: str) -> tuple[str, str]:
    """Why two token sequences are no pair to learn from, in a word and in a sentence; both empty if they are."""
    is_same = (chosen.ids, chosen.own_ids_E) == (rejected.ids, rejected.own_ids_E)
    reason = "identical_after_truncation" if is_same else ""
    if on_long == "drop" and (chosen.truncated or rejected.truncated):
        reason = "too_long"
    sizes = [e.num_tokens + e.num_dropped for e in (chosen, rejected)]
    return reason, f"{reason}: chosen {sizes[0]} tokens, rejected {sizes[1]}" if reason else ""


def _refuse_emptied(result: EncodedSet, preferences: Sequence[Preference], max_length: int) -> None:
    emptied = {p.domain for p in preferences} - {p.preference.domain for p in result.pairs}
    if emptied:
        raise DataError(
            f"no pair of domain {', '.join(sorted(emptied))} fits the limit of {max_length} tokens and the "
            "chat template. Raise data.max_length, set data.on_long=truncate, or leave the domain out.\n"
            + "\n".join(f"  {row}" for row in [q for q in result.quarantine if q.domain in emptied][:5])
        )


def _places_in_rows(preferences: Sequence[Preference]) -> list[str]:
    """`pair 2 of 3: ` for each pair of a row that holds several, as its place in the row; else nothing."""
    num_pairs = Counter(p.source for p in preferences if p.source)
    seen: Counter[str] = Counter()
    places = []
    for preference in preferences:
        seen[preference.source] += 1
        several = num_pairs[preference.source] > 1
        places.append(f"pair {seen[preference.source]} of {num_pairs[preference.source]}: " if several else "")
    return places


def _refused(preference: Preference, reason: str, detail: str) -> Quarantined:
    file, _, line = preference.source.rpartition(":")
    return Quarantined(file, int(line) if line.isdigit() else 0, preference.domain, reason, "", detail)


def pair_batch(pairs: Sequence[EncodedPair], pad_id: int) -> Batch:
    """Pairs to one Batch: chosen rows, then rejected rows; every distinct prompt once."""
    import torch

    encoded = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    domain_B = [p.domain for p in pairs]
    margins = [p.preference.margin for p in pairs]
    margin_B = None
    if any(m is not None for m in margins):
        margin_B = torch.tensor([m or 0.0 for m in margins], dtype=torch.float32)
    weights = [p.preference.weight for p in pairs]
    weight_B = torch.tensor(weights, dtype=torch.float32) if any(w != 1 for w in weights) else None
    return _batch(
        encoded,
        domain_B + domain_B,
        pad_id,
        margin_B=margin_B,
        weight_B=weight_B,
        is_pairs=True,
        names=tuple(p.preference.name for p in pairs),
    )


def encode_rated(
    encoder: Encoder, rows: Sequence[Rated], objectives: Sequence[str], domains: Sequence[str], *, on_long: str
) -> tuple[list[EncodedRated], list[Quarantined]]:
    """Tokenise rated conversations, their ratings in the order of `objectives`, NaN where missing; and those that do
    not fit or that the chat template refuses."""
    index = {domain: i for i, domain in enumerate(domains)}
    made: list[EncodedRated] = []
    put_aside: list[Quarantined] = []
    for rated in rows:
        file, _, line = rated.source.rpartition(":")
        number, domain = int(line) if line.isdigit() else 0, rated.conversation.domain or NO_DOMAIN
        try:
            encoded = encoder.conversation(rated.conversation)
        except DataError as error:
            put_aside.append(Quarantined(file, number, domain, "bad_template", "", str(error)))
            continue
        if encoded.truncated and on_long == "drop":
            size = len(encoded.ids) + encoded.num_dropped
            put_aside.append(Quarantined(file, number, domain, "too_long", "", f"{size} tokens"))
            continue
        ratings_K = tuple(rated.ratings.get(name, math.nan) for name in objectives)
        made.append(EncodedRated(rated, encoded, index.get(rated.conversation.domain, -1), ratings_K))
    return made, put_aside


def rated_batch(rows: Sequence[EncodedRated], pad_id: int) -> Batch:
    """Rated conversations to one Batch with `ratings_NK`, in float64."""
    import torch

    ratings_NK = torch.tensor([row.ratings_K for row in rows], dtype=torch.float64)
    return _batch([row.encoded for row in rows], [row.domain for row in rows], pad_id, ratings_NK=ratings_NK)


def conversation_batch(encoded: Sequence[Encoded], domains: Sequence[int], pad_id: int) -> Batch:
    return _batch(encoded, domains, pad_id)


def _batch(encoded: Sequence[Encoded], domains: Sequence[int], pad_id: int, **more: Any) -> Batch:
    import torch

    prompts: dict[tuple[int, ...], int] = {}
    prompt_of_N = [prompts.setdefault(e.prompt_ids, len(prompts)) for e in encoded]
    ids_NT, mask_NT = _pad([e.ids for e in encoded], pad_id)
    prompt_ids_PT, prompt_mask_PT = _pad(list(prompts), pad_id)
    return Batch(
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        prompt_ids_PT=prompt_ids_PT,
        prompt_mask_PT=prompt_mask_PT,
        prompt_of_N=torch.tensor(prompt_of_N),
        domain_N=torch.tensor(list(domains)),
        truncated_N=torch.tensor([e.truncated for e in encoded]),
        own_ids_NE=tuple(e.own_ids_E for e in encoded) if encoded[0].own_ids_E else (),
        **more,
    )


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    longest = max(len(r) for r in rows)
    ids_NT = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask_NT = torch.zeros_like(ids_NT)
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)] = torch.tensor(row)
        mask_NT[i, : len(row)] = 1
    return ids_NT, mask_NT


def _find(ids: list[int], part: list[int], start: int) -> int:
    for i in range(start, len(ids) - len(part) + 1):
        if ids[i : i + len(part)] == part:
            return i
    raise DataError("the tokenizer changes a text when it adds special tokens; such tokenizers are not supported")


def _as_turns(text: Text, role: str) -> list[Message]:
    if isinstance(text, str):
        return [{"role": role, "content": text}] if text else []
    return list(text)


def _as_text(text: Text) -> str:
    """Turns as plain text, for tokenizers without a chat template: one user turn stands bare."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return _said(text[0])
    return "\n\n".join(f"{ROLES.get(str(t['role']), str(t['role']))}: {_said(t)}" for t in text)


def _said(turn: Message) -> str:
    calls = turn.get("tool_calls")
    parts = [turn.get("content"), json.dumps(calls, ensure_ascii=False, default=dict) if calls else ""]
    return "\n".join(str(part) for part in parts if part)
