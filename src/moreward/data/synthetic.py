"""Preferences with a known answer, written by a generator: the embedded default data.

A response is drawn from a level 0..3 of each of six capabilities, and every level shows in its wording. A domain
judges by its own weights over the same capabilities, and the signs disagree: what stories reward, support punishes.
So no single linear rule over the capabilities fits all domains, one rule per domain fits exactly, and the true
reward of every response is known.

The phrases stand in `synthetic.yaml` and are a small grammar: `[a|b]` is one of the alternatives, `[3..9]` a number in
that range, `{thing}` a word of the topic. Most phrases of a capability serve all domains, so the same words earn reward
here and lose it there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from moreward.errors import ConfigError
from moreward.types import Preference, text_key

DOMAINS: tuple[str, ...] = ("support", "stories", "code_review", "medical", "cooking")
CAPABILITIES: tuple[str, ...] = ("brevity", "warmth", "caution", "precision", "imagery", "structure")
MAX_LEVEL = 3

MIN_MARGIN = 0.5
"""Pairs whose true rewards are closer than this are not drawn: their order would hang on nearly nothing."""

MAX_PAIRS_PER_DOMAIN = 20_000
"""Over all splits together. The grammar holds more than twice the distinct prompts that this needs."""

AMBIGUOUS_SHARE = 0.05
"""Share of prompts that two domains could have been asked, so that even a perfect router misses some."""

_MIN_WORDS, _MAX_WORDS = 10, 60


def _weights(*values: float) -> Mapping[str, float]:
    return MappingProxyType(dict(zip(CAPABILITIES, values, strict=True)))


WEIGHTS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        # brevity, warmth, caution, precision, imagery, structure
        "support": _weights(1.2, 0.6, -0.4, 0.5, -1.1, 0.3),
        "stories": _weights(-1.0, 0.5, -0.6, -0.9, 1.4, -0.8),
        "code_review": _weights(0.9, -0.9, -0.7, 1.3, -0.5, 0.4),
        "medical": _weights(-0.3, 0.6, 1.5, -1.2, -0.4, -0.5),
        "cooking": _weights(-0.6, -0.5, -0.9, 0.8, 0.5, 1.1),
    }
)
"""What one level of each capability is worth to a domain."""


def true_reward(levels: Mapping[str, float], domain: str) -> float:
    """The reward that the domain's own rule gives a response with these capability levels: weights · levels."""
    if domain not in WEIGHTS:
        raise ConfigError(f"Unknown domain {domain!r}. Known: {', '.join(DOMAINS)}.")
    return sum(weight * levels[name] for name, weight in WEIGHTS[domain].items())


def generate(
    num_pairs_per_domain: int, *, seed: int = 0, noise: float = 0.0, domains: Sequence[str] = DOMAINS
) -> list[Preference]:
    """Preferences of each domain in turn (row 0 of every domain, row 1, ...): the same seed, the same bytes.

    `noise` is the share of pairs per domain, in 0..1 and rounded to whole pairs, that are told the wrong way round.
    A domain's rows depend on no other domain, and a larger number only adds rows (though noise falls on others).

    `meta` holds `capabilities_chosen` and `capabilities_rejected` (levels 0..3 by name), `flipped`, `true_margin`
    (true reward of chosen minus rejected, so negative where flipped) and `ambiguous` (two domains fit the prompt).

    Raises:
        ConfigError: more than MAX_PAIRS_PER_DOMAIN pairs, a noise outside 0..1, an unknown or repeated domain.
    """
    return generate_splits(num_pairs_per_domain, 0, 0, seed=seed, noise=noise, domains=domains)["train"]


def generate_splits(
    num_train: int,
    num_val: int,
    num_test: int,
    *,
    seed: int = 0,
    noise: float = 0.0,
    domains: Sequence[str] = DOMAINS,
) -> dict[str, list[Preference]]:
    """`train`, `val` and `test` with so many pairs per domain and no prompt in common; `noise` in train only.

    Rows, `meta` and errors are as in `generate`, and `train` equals what `generate` gives.
    """
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    _check(sizes, noise, domains)
    by_split: dict[str, list[list[Preference]]] = {split: [] for split in sizes}
    for domain in domains:
        rng = random.Random(f"{seed}/{domain}")
        taken: set[str] = set()
        for split, num_pairs in sizes.items():
            by_split[split].append(_draw_pairs(domain, num_pairs, taken, rng))
        by_split["train"][-1] = _flip(by_split["train"][-1], noise, random.Random(f"{seed}/{domain}/noise"))
    return {split: list(chain.from_iterable(zip(*columns, strict=True))) for split, columns in by_split.items()}


def capability_pairs(
    preferences: Sequence[Preference],
    *,
    noise: float = 0.0,
    seed: int = 0,
    capabilities: Sequence[str] = CAPABILITIES,
) -> list[Preference]:
    """For each generated pair and each capability whose levels differ, which response shows more of it.

    More is not better: a domain's `WEIGHTS` may be negative. `noise` is the probability with which each label is told
    the wrong way round, drawn by `seed`, the pair and the capability. `meta` says `flipped` and the levels.

    Raises:
        ConfigError: a noise outside 0..1, an unknown capability, a pair that `generate` did not make.
    """
    faults = [] if 0 <= noise <= 1 else [f"noise: a share between 0 and 1 (got {noise})"]
    faults += [
        f"capabilities: {c!r} is none of {', '.join(CAPABILITIES)}" for c in capabilities if c not in CAPABILITIES
    ]
    faults += [f"{p.name}: has no levels of capabilities" for p in preferences if "capabilities_chosen" not in p.meta][
        :5
    ]
    if faults:
        raise ConfigError(faults)
    return [
        _about(pair, name, noise, seed)
        for pair in preferences
        for name in capabilities
        if pair.meta["capabilities_chosen"][name] != pair.meta["capabilities_rejected"][name]
    ]


def _about(pair: Preference, capability: str, noise: float, seed: int) -> Preference:
    levels = [pair.meta[f"capabilities_{side}"][capability] for side in ("chosen", "rejected")]
    flipped = random.Random(f"{seed}/{pair.id}/{capability}").random() < noise
    as_it_is = pair if (levels[0] > levels[1]) != flipped else pair.swapped()
    return replace(
        as_it_is, id=f"{pair.id}/{capability}", capability=capability, meta={"levels": levels, "flipped": flipped}
    )


def _check(sizes: Mapping[str, int], noise: float, domains: Sequence[str]) -> None:
    faults = [f"num_{split}: must be at least 0 (got {size})" for split, size in sizes.items() if size < 0]
    if sum(sizes.values()) > MAX_PAIRS_PER_DOMAIN:
        asked = sum(sizes.values())
        faults.append(f"pairs per domain: at most {MAX_PAIRS_PER_DOMAIN} over all splits (got {asked}); ask for fewer")
    if not 0 <= noise <= 1:
        faults.append(f"noise: a share between 0 and 1 (got {noise})")
    unknown = [domain for domain in domains if domain not in DOMAINS]
    if unknown or len(set(domains)) < len(domains):
        faults.append(f"domains: each at most once, of {', '.join(DOMAINS)} (got {', '.join(domains)})")
    if faults:
        raise ConfigError(faults)


@dataclass(frozen=True, slots=True)
class _Topic:
    """What a prompt is about, and two steps of an answer: plain, then what makes it precise, then exact."""

    thing: str
    first: tuple[str, str, str]
    second: tuple[str, str, str]
    plural: bool = False

    def words(self, domain: str) -> dict[str, str]:
        number = {"it": "them", "is": "are", "has": "have"} if self.plural else {"it": "it", "is": "is", "has": "has"}
        return {"thing": self.thing, "expert": _EXPERT[domain], **number}


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    levels: Mapping[str, int]


def _draw_pairs(domain: str, num_pairs: int, taken: set[str], rng: random.Random) -> list[Preference]:
    """Pairs with true labels, one to three per prompt; their prompts are added to `taken`."""
    pairs: list[Preference] = []
    while len(pairs) < num_pairs:
        ambiguous = rng.random() < AMBIGUOUS_SHARE
        topic, prompt = _draw_ambiguous_prompt(domain, rng) if ambiguous else _draw_prompt(domain, rng)
        if prompt in taken:
            continue
        taken.add(prompt)
        used: set[str] = set()
        for _ in range(min(rng.choice((1, 2, 3)), num_pairs - len(pairs))):
            better, worse = _draw_answers(domain, topic, used, rng)
            pairs.append(_preference(domain, prompt, better, worse, ambiguous=ambiguous))
    return pairs


def _draw_prompt(domain: str, rng: random.Random) -> tuple[_Topic, str]:
    topic = rng.choice(_TOPICS[domain])
    return topic, _expand(rng.choice(_PROMPTS[domain]) + _TAIL, topic.words(domain), rng)


def _draw_ambiguous_prompt(domain: str, rng: random.Random) -> tuple[_Topic, str]:
    """A prompt that one other domain could have been asked in the same words.

    A hash shares such prompts out, so none is asked in both domains and splits of one need not know of the other.
    """
    while True:
        topic = rng.choice(_SHARED_TOPICS[domain])
        prompt = _expand(rng.choice(_SHARED_PROMPTS[topic.thing]) + _TAIL, {}, rng)
        owners = [name for name in DOMAINS if any(other.thing == topic.thing for other in _SHARED_TOPICS[name])]
        if owners[int(text_key(prompt), 16) % len(owners)] == domain:
            return topic, prompt


def _draw_answers(domain: str, topic: _Topic, used: set[str], rng: random.Random) -> tuple[_Answer, _Answer]:
    """The better and the worse of two answers whose texts are not in `used`, to which they are added."""
    while True:
        first, second = _draw_answer(domain, topic, rng), _draw_answer(domain, topic, rng)
        margin = true_reward(first.levels, domain) - true_reward(second.levels, domain)
        if abs(margin) < MIN_MARGIN or used & {first.text, second.text}:
            continue
        used |= {first.text, second.text}
        return (first, second) if margin > 0 else (second, first)


def _draw_answer(domain: str, topic: _Topic, rng: random.Random) -> _Answer:
    while True:
        levels = {name: rng.randint(0, MAX_LEVEL) for name in CAPABILITIES}
        text = _write(domain, topic, levels, rng)
        if _MIN_WORDS <= len(text.split()) <= _MAX_WORDS:
            return _Answer(text, levels)


def _write(domain: str, topic: _Topic, levels: Mapping[str, int], rng: random.Random) -> str:
    """An answer on the topic in which each capability shows at its level."""

    def say(part: str, capability: str) -> str:
        level = levels[capability]
        return rng.choice(_PHRASES[part][level] + _OWN[domain].get(part, _NONE)[level])

    words = topic.words(domain)
    words["first"], words["second"] = _steps(domain, topic, levels["precision"], rng)
    words["image"] = say("image", "imagery")
    imagery = rng.choice(_IMAGE_FRAMES[domain]) if words["image"] else ""
    core, caution = say("core", "structure"), say("caution", "caution")
    middle = rng.choice(((imagery, core, caution), (core, imagery, caution), (core, caution, imagery)))
    opening = (say("greeting", "warmth"), say("intro", "brevity"))
    ending = (say("outro", "brevity"), say("farewell", "warmth"))
    return _expand(" ".join(part for part in (*opening, *middle, *ending) if part), words, rng)


def _steps(domain: str, topic: _Topic, precision: int, rng: random.Random) -> tuple[str, str]:
    if precision == 0:
        first, second = (rng.choice(phrases).format(**topic.words(domain)) for phrases in _VAGUE[domain])
    elif precision == 1:
        first, second = topic.first[0], topic.second[0]
    else:
        first, second = (f"{step[0]} {step[precision - 1]}" for step in (topic.first, topic.second))
    return first, second


def _preference(domain: str, prompt: str, better: _Answer, worse: _Answer, *, ambiguous: bool) -> Preference:
    return Preference(
        prompt=prompt,
        chosen=better.text,
        rejected=worse.text,
        domain=domain,
        id=f"{domain}-{text_key(prompt, better.text, worse.text)}",
        group=text_key(prompt),
        meta={
            "capabilities_chosen": better.levels,
            "capabilities_rejected": worse.levels,
            "flipped": False,
            "true_margin": true_reward(better.levels, domain) - true_reward(worse.levels, domain),
            "ambiguous": ambiguous,
        },
    )


def _flip(pairs: list[Preference], noise: float, rng: random.Random) -> list[Preference]:
    flipped = set(rng.sample(range(len(pairs)), round(noise * len(pairs))))
    return [_swapped(pair) if row in flipped else pair for row, pair in enumerate(pairs)]


def _swapped(pair: Preference) -> Preference:
    meta = {
        **pair.meta,
        "capabilities_chosen": pair.meta["capabilities_rejected"],
        "capabilities_rejected": pair.meta["capabilities_chosen"],
        "flipped": True,
        "true_margin": -pair.meta["true_margin"],
    }
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, meta=meta)


def _expand(template: str, words: Mapping[str, str], rng: random.Random) -> str:
    """Fill the slots, settle every bracket and start each sentence with a capital."""

    def settle(bracket: re.Match[str]) -> str:
        low, dots, high = bracket[1].partition("..")
        return str(rng.randint(int(low), int(high))) if dots else rng.choice(bracket[1].split("|"))

    text = re.sub(r"\[([^\]]*)\]", settle, template.format(**words))
    return re.sub(r"(^|[.!?] |(?:Step|Part) \d: |\d\) )([a-z])", lambda start: start[1] + start[2].upper(), text)


# The phrases. `_PHRASES[part][level]` serve every domain and `_OWN[domain][part][level]` add to them.


def _frozen(value: Any) -> Any:
    """Lists of a YAML file as tuples, and a topic as what it is."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if not isinstance(value, dict):
        return value
    read = {key: _frozen(inner) for key, inner in value.items()}
    return _Topic(**read) if "thing" in read else MappingProxyType(read)


_READ = _frozen(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")))
_PHRASES: Mapping[str, tuple[tuple[str, ...], ...]] = _READ["phrases"]
_OWN: Mapping[str, Mapping[str, tuple[tuple[str, ...], ...]]] = _READ["own"]
_NONE: tuple[tuple[str, ...], ...] = ((), (), (), ())
_EXPERT: Mapping[str, str] = _READ["experts"]
_IMAGE_FRAMES: Mapping[str, tuple[str, ...]] = _READ["image_frames"]
_VAGUE: Mapping[str, tuple[tuple[str, ...], ...]] = _READ["vague"]
_TOPICS: Mapping[str, tuple[_Topic, ...]] = _READ["topics"]
_SHARED_TOPICS: Mapping[str, tuple[_Topic, ...]] = _READ["shared_topics"]
_TAIL: str = _READ["tail"]
_PROMPTS: Mapping[str, tuple[str, ...]] = _READ["prompts"]
_SHARED_PROMPTS: Mapping[str, tuple[str, ...]] = _READ["shared_prompts"]
