"""The five data sets of arXiv 2407.17546 (its appendix B), from their original rows.

Four are formats of `load_preferences`, which counts whatever it cannot use. `oasst` needs every message of a
tree, so it is a function over rows with counts of its own. The paper does not say how it filtered SHP and which
pairs of a ranked list it took; here nothing is filtered by score, and all pairs with different ranks are used.

| name | data set | chosen over rejected | not used |
|---|---|---|---|
| anthropic_hh | Anthropic/hh-rlhf | last assistant turns; the turns before are the prompt | transcripts that differ earlier in a human turn, end on one, or are equal |
| shp | stanfordnlp/SHP | the comment that people preferred | rows without a label |
| hellaswag | Rowan/hellaswag | right ending over one wrong ending drawn by seed and row | the unlabelled test rows |
| dahoas | Dahoas/synthetic-instruct-gptj-pairwise | as given | equal or empty answers |
| oasst | OpenAssistant/oasst2 | better over worse rank among replies to one message | see `oasst` |
"""  # noqa: E501

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moreward.data.shapes import Judged, Shape, explicit, transcript
from moreward.data.values import Row, RowError, assistant, required, text_of, user
from moreward.types import Message, Preference


def anthropic_hh(row: Row) -> Judged:
    """Human text becomes the prompt, the last assistant text the response."""
    return transcript(row)


def shp(row: Row) -> Judged:
    """`labels` 1 prefers comment A, 0 comment B. Rows of one post stay on one side of a split.

    The `domain` column of SHP is the subreddit and its split; it is kept as `meta["subreddit"]`.
    """
    label = required(row, "labels")
    if isinstance(label, bool) or label not in (0, 1):
        raise RowError("bad_label", "labels", f"expected 0 or 1, got {label!r}")
    a, b = (text_of(required(row, name), name) for name in ("human_ref_A", "human_ref_B"))
    pair = (a, b) if label == 1 else (b, a)
    meta = {"subreddit": row.get("domain"), "score_ratio": row.get("score_ratio")}
    return Judged(_text(row, "history"), (pair,), group=_name(row, "post_id"), meta=meta)


def hellaswag(row: Row, *, seed: int = 0) -> Judged:
    """The right ending over one of the wrong ones, the same for the same row and seed.

    The other wrong endings are kept in `meta["other_rejected"]`, so that best-of-n can be scored. Contexts cut
    from one source (a video, an article) form one group.
    """
    context, endings = _text(row, "ctx"), required(row, "endings")
    if not isinstance(endings, list) or len(endings) < 2:
        raise RowError("wrong_type", "endings", "expected a list of at least 2 endings")
    right = _ending(required(row, "label"), len(endings))
    wrong = [text_of(ending, "endings") for i, ending in enumerate(endings) if i != right]
    draw = random.Random(f"{seed}/{row.get('ind', '')}/{context}").randrange(len(wrong))
    meta: dict[str, Any] = {"other_rejected": wrong[:draw] + wrong[draw + 1 :]}
    if row.get("activity_label"):
        meta["activity"] = row["activity_label"]
    pair = (text_of(endings[right], "endings"), wrong[draw])
    return Judged(context, (pair,), group=_name(row, "source_id"), meta=meta)


def _ending(label: Any, num_endings: int) -> int:
    """The index of the right ending, which the hub's rows hold as text and leave empty where it is unknown."""
    shown = str(label)
    if isinstance(label, bool) or not shown.isdecimal() or int(shown) >= num_endings:
        raise RowError("bad_label", "label", f"expected the index of an ending, got {label!r}")
    return int(shown)


def dahoas(row: Row) -> Judged:
    """As it is: `prompt`, `chosen`, `rejected`."""
    return explicit(row)


def _text(row: Row, name: str) -> str:
    return text_of(required(row, name), name)


def _name(row: Row, name: str) -> str:
    return "" if row.get(name) is None else str(row[name])


def _shape(needs: str, read: Callable[[Row], Judged], domain: str) -> Shape:
    return Shape(frozenset(needs.split()), read, domain=domain)


BENCHMARKS: Mapping[str, Shape] = {
    "anthropic_hh": _shape("chosen rejected", anthropic_hh, "anthropic"),
    "shp": _shape("history human_ref_A human_ref_B labels", shp, "shp"),
    "hellaswag": _shape("ctx endings label", hellaswag, "hellaswag"),
    "dahoas": _shape("prompt chosen rejected", dahoas, "dahoas"),
}


@dataclass(frozen=True, slots=True)
class Oasst:
    """Pairs from message trees. `fate` says of every message read, by its id, what became of it."""

    preferences: list[Preference]
    fate: Mapping[str, str]
    num_ties: int = 0

    @property
    def num_messages(self) -> int:
        return len(self.fate)

    @property
    def messages(self) -> Mapping[str, int]:
        """How many messages had each fate."""
        return Counter(self.fate.values())


def oasst(rows: Iterable[Row], *, lang: str = "en") -> Oasst:
    """Ranked replies of OpenAssistant trees as pairs: rank 0 is best, all pairs with different ranks.

    Takes the flat message rows (`message_id`, `parent_id`, `message_tree_id`, `text`, `role`, `lang`, `rank`,
    `deleted`, `review_result`) of whole trees, in any order. `Oasst.messages` counts

    - `used`: assistant replies that stand in a pair;
    - `prompter`: turns of people, which only serve as prompts;
    - `deleted`, `rejected_in_review`, `other_language`, `unranked`: replies left out for that reason;
    - `broken_context`: replies below a message that is missing, deleted, rejected or in another language;
    - `alone`: replies without a ranked sibling of another rank (single replies and ties).
    """
    messages = {row["message_id"]: row for row in rows}
    fate = {name: _fate(row, messages, lang) for name, row in messages.items()}
    replies: dict[str, list[Row]] = {}
    for name, row in messages.items():
        if not fate[name]:
            replies.setdefault(row["parent_id"], []).append(row)
    preferences: list[Preference] = []
    num_ties = 0
    for parent, siblings in replies.items():
        ranked = sorted(siblings, key=lambda row: row["rank"])
        both = list(itertools.combinations(ranked, 2))
        differing = [(better, worse) for better, worse in both if better["rank"] != worse["rank"]]
        num_ties += len(both) - len(differing)
        prompt = tuple(_turn(row) for row in _path(messages[parent], messages))
        preferences += [_preference(prompt, better, worse, len(siblings)) for better, worse in differing]
        in_pairs = {row["message_id"] for pair in differing for row in pair}
        fate |= {row["message_id"]: "used" if row["message_id"] in in_pairs else "alone" for row in siblings}
    return Oasst(preferences, fate, num_ties)


def _fate(row: Row, messages: Mapping[str, Row], lang: str) -> str:
    """Why a message gives no reply to compare, or an empty string if it does."""
    if row["role"] == "prompter":
        return "prompter"
    if fault := _fault(row, lang):
        return fault
    if row.get("rank") is None:
        return "unranked"
    path = _path(messages.get(row["parent_id"]), messages)
    complete = bool(path) and path[0]["parent_id"] is None
    return "" if complete and not any(_fault(turn, lang) for turn in path) else "broken_context"


def _fault(row: Row, lang: str) -> str:
    if row.get("deleted"):
        return "deleted"
    if row.get("review_result") is False:
        return "rejected_in_review"
    return "" if row["lang"] == lang else "other_language"


def _path(row: Row | None, messages: Mapping[str, Row]) -> list[Row]:
    """The messages from the root, or from the first one that is there, down to `row`."""
    path: list[Row] = []
    while row is not None:
        path.append(row)
        row = messages.get(row["parent_id"])
    return path[::-1]


def _turn(row: Row) -> Message:
    return (user if row["role"] == "prompter" else assistant)(row["text"])


def _preference(prompt: tuple[Message, ...], better: Row, worse: Row, num_siblings: int) -> Preference:
    return Preference(
        prompt=prompt,
        chosen=(_turn(better),),
        rejected=(_turn(worse),),
        domain="oasst",
        id=f"{better['message_id']}>{worse['message_id']}",
        group=str(better["message_tree_id"]),
        meta={"k": num_siblings, "rank_chosen": better["rank"], "rank_rejected": worse["rank"]},
    )
