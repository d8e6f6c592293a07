"""Preferences with a known answer, written by a generator: the embedded default data.

A response is drawn from a level 0..3 of each of six capabilities, and every level shows in its wording. A domain
judges by its own weights over the same capabilities, and the signs disagree: what stories reward, support punishes.
So no single linear rule over the capabilities fits all domains, one rule per domain fits exactly, and the true
reward of every response is known.

The phrases are a small grammar: `[a|b]` is one of the alternatives, `[3..9]` a number in that range, `{thing}` a
word of the topic. Most phrases of a capability serve all domains, so the same words earn reward here and lose it there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType

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


# The phrases. `_PHRASES[part][level]` serve every domain and `_OWN[domain][part][level]` add to them; "" says nothing,
# which is a level's wording too. Warmth speaks in greeting and farewell, brevity in intro and outro.

_PHRASES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "greeting": (
        (
            "[This was|All of this was] [explained|answered] before[, more than once|, so keep up|, so read closely].",
            "[Nothing new here|There is nothing special here], so [pay attention|listen this time|I will be blunt].",
            "[I have little time for this|I will say this only once], so [listen|read closely|keep up].",
            "[Again|Really]? [You could have looked this up|Everybody else knows this].",
        ),
        ("",),
        (
            "[Thanks|Thank you] for asking[, glad to help|, happy to help|, good to hear from you].",
            "[Of course|Gladly|With pleasure], [here you are|let me help|let us look together].",
            "[It is good|Nice] to hear from you[| again].",
            "[Good question|Fair question], [and I am glad to help|happy to help].",
        ),
        (
            "[Oh, what|What] a [lovely|wonderful|delightful] thing to ask, [dear friend|my dear|my friend]!",
            "[It makes me so happy|I am so happy|What a joy] that you [asked|came to me], [dear friend|my dear]!",
            "[Thank you from the heart|A thousand thanks] for asking, [dear friend|my dear|my friend]!",
            "[Dear friend|My dear], [of course I will help|how wonderful that you asked|it is a joy to help you]!",
        ),
    ),
    "farewell": (
        ("",),
        ("",),
        ("",),
        (
            "[Big hugs|Warm hugs|All my love] to everyone at home!",
            "[You are doing wonderfully|I am always here for you|I am cheering for you]!",
            "[Do write again|Come back any time], [dear friend|my dear|I love hearing from you]!",
        ),
    ),
    "intro": (
        (
            "[Now, there|Well, there] is [a good deal|quite a lot] to say here, so let us [take our time|not hurry].",
            "[Before I begin|Before we start], a word on [the whole matter|all this], for it [has many sides|is long].",
            "[As so often|As with most things], there is a [long answer|long tale] to it, so [settle in|bear with me].",
        ),
        (
            "[Now, there|Well, there] is [a good deal|quite a lot] to say [about this|here].",
            "[Before I begin|Before we start], a word on [the whole matter|all this].",
            "[As so often|As with most things], there is a [long answer|long tale] to it.",
        ),
        ("[Well, let us see|So, let us begin|Now then|All right, here goes|Let me think].",),
        ("",),
    ),
    "outro": (
        (
            "[One could say|There is] [much|a lot] more, of course, but that is [roughly all|the heart of it].",
            "[And so on|And so forth], as one [could|might] add [for quite a while|at some length].",
            "[In other words|To say it once more], [all of this|the above] holds, [more or less|by and large].",
        ),
        ("",),
        ("",),
        ("",),
    ),
    "caution": (
        (
            "[Trust me|Believe me], there is [no doubt about this|absolutely no doubt|nothing to question here].",
            "[I am|You can be] [completely|absolutely|one hundred percent] [certain|sure] of [this|that].",
            "[Nobody needs|There is no need] to [check|question|doubt] [this|any of it].",
        ),
        ("",),
        (
            "[This may|It might] [not fit every case|be a little different for you].",
            "[I think|I believe] [that is how it usually goes|this is right in most cases].",
            "[Perhaps|Maybe] take it slowly and [see how it goes|watch what happens].",
        ),
        (
            "[I cannot be sure from here|I may well be wrong], so please [ask|check with] {expert} [first|to be safe].",
            "If [anything seems off|you feel unsure|anything worries you], please [stop and |]speak to {expert}.",
            "[I am only guessing|This is only a guess], so [talk to|go and see] {expert} [first|before you decide].",
        ),
    ),
    "image": (
        ("",),
        (
            "[an old friend|a slow dance|a walk in the park|a warm blanket]",
            "[a quiet Sunday|an open window|a familiar tune|a calm evening]",
        ),
        (
            "a [paper|copper|yellow] lantern [swaying|drifting] over dark water",
            "a [red|little|runaway] kite [tugging|dancing] above the rooftops",
            "a [silver|sleepy] river [winding|wandering] through morning mist",
            "[fresh snow|soft rain] [falling|settling] on an empty garden",
        ),
        (
            "a moonlit [harbour|garden] where paper lanterns [whisper|giggle] to the [tide|fireflies]",
            "a [silver|golden] river [humming|singing] lullabies to the sleepy [willows|otters]",
            "a [tiny|merry] orchestra of crickets [tuning up|waltzing] beneath a velvet sky",
            "a meadow of giggling poppies under a [butter-yellow|honey-coloured] moon",
        ),
    ),
    "core": (
        (
            "{second}, [oh, and|but wait,] before that {first}.",
            "{second}, [no, hold on|sorry, no], {first} before any of that.",
            "{second}, [or rather|I mean], {first}, and then the other thing.",
        ),
        ("{first}, and {second}.", "{first}. {second}.", "{first}, and also {second}."),
        (
            "First, {first}. [Then|Next|After that], {second}.",
            "[To begin with|To start], {first}. [Finally|Lastly|At the end], {second}.",
        ),
        (
            "Step 1: {first}. Step 2: {second}.",
            "Part 1: {first}. Part 2: {second}.",
            "1) {first}. 2) {second}.",
            "[In two steps|In two parts|In order]: 1) {first}. 2) {second}.",
        ),
    ),
}

_NONE: tuple[tuple[str, ...], ...] = ((), (), (), ())

_OWN: Mapping[str, Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "support": {
        "greeting": (
            ("[Please read the help page|The help page says this] before you write [to us|next time].",),
            (),
            ("[Sorry for the trouble|We are sorry about this], [let me help|I will help you].",),
            ("[We are so very sorry|I am truly sorry], dear friend, and [so glad you wrote|I am here for you]!",),
        ),
        "outro": (
            ("This and [a lot|much] more can be found [all over our pages|in our many guides], of course.",),
            (),
            (),
            (),
        ),
    },
    "stories": {
        "greeting": (
            ("[No more questions|Sit still and be quiet], for I will say this only once.",),
            (),
            ("[Gladly, come closer|Of course, little one|With pleasure, sit with me].",),
            ("[Come here, my darling|Snuggle in, my dear|Cuddle up, my little friend], what a joy to tell you this!",),
        ),
        "intro": (
            (
                "[Once upon a time|Long, long ago], when nobody was in a hurry, there was a good deal to say.",
                "[Once, and it was long ago|In the old days], as tales begin, and this one is long, so settle in.",
            ),
            ("[Once upon a time|Long, long ago], [when nobody was in a hurry|as the old tales begin].",),
            (),
            (),
        ),
        "caution": (
            ("[Every word of this is certain|It is absolutely true, every word].",),
            (),
            ("[Perhaps|Maybe] it was [a little|slightly] different, [or so I think|I believe].",),
            ("[Please do not try this|Never go out alone at night], and [ask|check with] {expert} first, to be safe.",),
        ),
    },
    "code_review": {
        "greeting": (
            ("[This is sloppy|I have seen this mistake before|Read the style guide], so pay attention.",),
            (),
            ("[Thanks for the patch|Nice to see this patch], [happy to help|glad to look at it].",),
            ("[What a lovely patch|What a joy to read], my friend, and [thank you from the heart|well done]!",),
        ),
        "caution": (
            ("[Merge it after that|Anything else is wrong], I am [completely|absolutely] sure.",),
            (),
            ("I [think|believe] so, but [I did not run it|maybe I missed something].",),
            ("[I did not run this|I do not know this module], so please ask {expert} before you merge.",),
        ),
    },
    "medical": {
        "greeting": (
            ("[You worry too much|Other people have real problems], so listen this time.",),
            (),
            ("[Sorry to hear that|That sounds unpleasant], [let me help|happy to help].",),
            ("[I am so sorry to hear it|You poor thing], my dear, and [so glad you asked|I am here for you]!",),
        ),
        "caution": (
            ("[It is certainly harmless|Nobody needs a doctor for this], [trust me|believe me].",),
            (),
            ("[Bodies differ|It depends], so this [may|might] not [help everyone|fit every case].",),
            ("[Please see {expert}|Do call {expert}] if it [gets worse|lasts], for I cannot be sure from here.",),
        ),
    },
    "cooking": {
        "greeting": (
            ("[Everybody can cook this|My children can do this], so pay attention.",),
            (),
            ("[Good choice|That is a nice plan], [happy to help|let us look together].",),
            ("[Oh, how delicious|What a wonderful plan], my dear, I [am so happy|can smell it already]!",),
        ),
        "caution": (
            ("[It never fails|It always works], I am [completely|absolutely] certain.",),
            (),
            ("[Ovens differ|Tastes differ], so perhaps [it may take longer|try a little first].",),
            ("[I have not tried it|I only guess], so maybe ask {expert} first, to be safe.",),
        ),
    },
}

_EXPERT = {
    "support": "our technicians",
    "stories": "a grown-up",
    "code_review": "the maintainers",
    "medical": "a doctor",
    "cooking": "a trained cook",
}

_IMAGE_FRAMES = {
    "support": (
        "[Once|As soon as] {thing} {is} sorted, [your day|everything] will feel like {image}.",
        "[Picture|Imagine] {image}: so [calm|easy] will life be after {thing}.",
    ),
    "stories": (
        "[The night|The whole sky|Every corner of the world] [was|seemed|felt] like {image}.",
        "[All around|Far below|Outside the window] there was something like {image}.",
    ),
    "code_review": (
        "[Done well|With some care|Once tidy], {thing} could read like {image}.",
        "[Picture|Imagine] {image}: that is how {thing} should [read|flow|feel].",
    ),
    "medical": (
        "[Close your eyes|Breathe slowly|Lie back] and [picture|imagine] {image}.",
        "[Soon|By and by], each [breath|hour] will feel like {image}.",
    ),
    "cooking": (
        "[Done well|Made with love|On a cold evening], {thing} {is} like {image}.",
        "[The smell alone|The first bite] [is|should be] like {image}.",
    ),
}

_VAGUE = {
    "support": (
        ("[look through|go over] the [usual|relevant] settings", "do something about {thing}"),
        ("try [it all|the whole thing] again at some point", "see whether something [changes|helps]"),
    ),
    "stories": (
        ("somebody wandered off, [nobody knows where|as one does in dreams]", "there was a whisper about {thing}"),
        ("something happened, [as things do|as in a dream]", "all was [well|good] in the end, somehow"),
    ),
    "code_review": (
        ("clean up [some of the logic|parts] in {thing}", "rework the [messy|odd] part a bit"),
        ("think about the [other|odd] cases [too|as well]", "make the rest somewhat [nicer|better]"),
    ),
    "medical": (
        ("do what [feels right|seems sensible]", "take things [somewhat easier|a bit slower]"),
        ("give your body some [time|rest]", "look after {thing} for a [while|bit]"),
    ),
    "cooking": (
        ("throw together [the usual things|whatever you have]", "mix [some of the usual|a bit of everything]"),
        ("do the rest of {thing} somehow", "leave {it} on the heat until [done|ready]"),
    ),
}

_TOPICS = {
    "support": (
        _Topic(
            "the late parcel",
            ("open the tracking page", "from the link in your shipping email", "and enter the [8..14]-digit code"),
            ("ask for a new slot", "through the green Redeliver button", "between [8..11] am and [2..6] pm"),
        ),
        _Topic(
            "the double charge",
            ("find both payments", "in your statement under Recent Activity", "of [12..95] dollars on your card"),
            ("request a refund", "with the Dispute link beside it", "of the second one within [3..9] working days"),
        ),
        _Topic(
            "the forgotten password",
            ("choose Reset", "just below the sign-in box", "and type the [4..8]-digit code"),
            ("set a new phrase", "that you use nowhere else", "of at least [10..18] characters"),
        ),
        _Topic(
            "the broken headset",
            ("unplug the cable", "at the base of the left cup", "for [10..60] seconds"),
            ("update the driver", "from the Downloads tab of the app", "to version [2..7].[1..9]"),
        ),
        _Topic(
            "the frozen tablet",
            ("hold the power button", "on the upper right edge", "for [10..30] seconds"),
            ("clear the stored files", "in Settings, under Storage", "until [2..6] gigabytes are free"),
        ),
        _Topic(
            "the missing invoice",
            ("open the billing tab", "at the top of your account page", "and pick number [1040..9900]"),
            ("download a copy", "with the small arrow on the right", "within the next [20..90] days"),
        ),
        _Topic(
            "the noisy printer",
            ("pull out the paper tray", "at the front of the machine", "and turn the screw [2..5] times"),
            ("wipe the rollers", "with a dry cloth from left to right", "for [1..3] minutes"),
        ),
        _Topic(
            "the weak wifi signal",
            ("move the router", "to an open shelf near the door", "at least [2..5] metres from the wall"),
            ("switch the channel", "on the Wireless page of the menu", "to number [1..11]"),
        ),
        _Topic(
            "the refund vouchers",
            ("open your wallet", "behind the gift icon in the app", "and enter all [10..16] characters"),
            ("apply the vouchers", "on the last page before you pay", "within [7..30] days"),
            plural=True,
        ),
        _Topic(
            "the cancelled tickets",
            ("find the booking", "in the list of past trips", "with number [2100..9800]"),
            ("pick another date", "from the calendar under Change", "up to [2..9] weeks ahead"),
            plural=True,
        ),
    ),
    "stories": (
        _Topic(
            "the fox who lost her shadow",
            ("the fox searched the orchard", "behind every crooked gate", "for exactly [31..58] minutes"),
            ("her shadow came home", "along the path of fallen pears", "at [6..9]:[10..55] in the evening"),
        ),
        _Topic(
            "the lighthouse that hummed",
            ("the keeper climbed the stairs", "past the room of old maps", "all [112..240] of them"),
            ("the lamp sang to the ships", "beyond the sleeping reef", "every [12..40] seconds"),
        ),
        _Topic(
            "the snail with a library",
            ("the snail lent out a book", "to the beetle beneath the fern", "of [40..320] pages"),
            ("the whole garden read", "in the shade of the rhubarb", "for [2..5] hours and [10..50] minutes"),
        ),
        _Topic(
            "the dragon who feared candles",
            ("the dragon hid", "under the bridge by the bakery", "for [3..9] days"),
            ("a girl lit one small candle", "on the highest step of the tower", "of [4..9] centimetres"),
        ),
        _Topic(
            "the moon and her lost button",
            ("the moon dropped a button", "into the pond behind the mill", "of [14..38] millimetres"),
            ("a frog sewed it back on", "with thread from a spider's web", "in [11..29] stitches"),
        ),
        _Topic(
            "the boy who planted an umbrella",
            ("the boy watered the umbrella", "beside his grandfather's beans", "with [2..9] litres a day"),
            ("a tree of rain grew tall", "over the dry little village", "to a height of [7..30] metres"),
        ),
        _Topic(
            "the clock that wanted a holiday",
            ("the clock packed a bag", "on the shelf above the stove", "weighing [2..6] kilograms"),
            ("it ticked along the beach", "between the shells and the crabs", "for [8..14] days"),
        ),
        _Topic(
            "the tailor of the north wind",
            ("the tailor cut a coat", "from a cloud over the valley", "of [5..17] metres"),
            ("the wind wore it to the dance", "in the square beside the well", "on the [11..28]th of March"),
        ),
        _Topic(
            "the bears who ran a train",
            ("the bears sold tickets", "at a window shaped like a leaf", "for [2..8] coins each"),
            ("the train left for the hills", "through the tunnel of blossom", "at [30..80] kilometres an hour"),
            plural=True,
        ),
        _Topic(
            "the socks that went to sea",
            ("the socks built a boat", "out of the old soap dish", "[22..48] centimetres long"),
            ("they found the island of buttons", "behind the bathroom door", "after [3..12] nights"),
            plural=True,
        ),
    ),
    "code_review": (
        _Topic(
            "the date parser",
            ("rename the index", "in the inner loop of parse_day", "on line [12..98]"),
            ("return early on empty input", "before the second branch", "at line [100..190]"),
        ),
        _Topic(
            "the retry loop",
            ("cap the attempts", "in the settings of send_once", "at [3..8] on line [20..90]"),
            ("add some delay", "between the calls in the except block", "of [100..900] milliseconds"),
        ),
        _Topic(
            "the cache class",
            ("drop the global dictionary", "at the top of store.py", "on line [2..19]"),
            ("evict the oldest entry", "inside the put method", "beyond [128..900] items, line [40..95]"),
        ),
        _Topic(
            "the config loader",
            ("check the keys", "before load_file returns", "on lines [30..49] to [50..70]"),
            ("name the wrong field", "in the message of the ValueError", "on line [71..99]"),
        ),
        _Topic(
            "the upload handler",
            ("close the stream", "in a finally block of receive", "on line [33..88]"),
            ("limit the file size", "before the first read call", "to [5..50] megabytes, line [12..30]"),
        ),
        _Topic(
            "the search query",
            ("bind the parameters", "in the where clause of find_users", "on line [40..77]"),
            ("add an index", "on the email column in the migration", "for the [2..9] million rows"),
        ),
        _Topic(
            "the queue worker",
            ("catch the narrow error", "around the call to handle_job", "on line [25..64]"),
            ("acknowledge the job", "after the commit, not before it", "on line [65..99], not [10..24]"),
        ),
        _Topic(
            "the price calculator",
            ("use whole cents", "in the total field of Basket", "on line [14..52]"),
            ("round the tax", "once, at the end of add_tax", "to [2..4] digits on line [53..97]"),
        ),
        _Topic(
            "the test fixtures",
            ("share the temporary folder", "through the session fixture", "on line [5..29]"),
            ("delete the sleep", "in the setup of test_sync", "of [2..9] seconds on line [30..80]"),
            plural=True,
        ),
        _Topic(
            "the error messages",
            ("print the given value", "in both raise statements of check", "on lines [18..40] and [41..70]"),
            ("say what is allowed", "in the docstring and the message", "in under [80..120] characters"),
            plural=True,
        ),
    ),
    "medical": (
        _Topic(
            "a sore throat",
            ("drink something warm", "in small sips between meals", "of [200..300] ml every [2..4] hours"),
            ("rest your voice", "whenever it begins to strain", "for [3..6] days"),
        ),
        _Topic(
            "a stiff neck",
            ("roll your shoulders", "back and down while sitting upright", "[8..20] times every hour"),
            ("put something warm on it", "where the muscle meets the shoulder", "for [12..20] minutes"),
        ),
        _Topic(
            "a mild sunburn",
            ("cool the skin", "with a damp cloth from the fridge", "for [10..20] minutes"),
            ("spread on some lotion", "from the shoulders to the wrists", "in doses of [5..15] ml"),
        ),
        _Topic(
            "a lasting cough",
            ("take a spoon of syrup", "after supper and before bed", "of [5..15] ml, [2..4] times a day"),
            ("raise your pillow", "so that the chest lies higher", "by [10..25] centimetres"),
        ),
        _Topic(
            "a twisted ankle",
            ("keep the foot up", "on a cushion above the hip", "for [20..45] minutes"),
            ("wrap it lightly", "from the toes towards the shin", "with [3..5] turns of bandage"),
        ),
        _Topic(
            "an upset stomach",
            ("eat something plain", "like rice, toast or a ripe banana", "of about [100..250] grams"),
            ("drink some water", "slowly, between the meals", "in doses of [50..150] ml every hour"),
        ),
        _Topic(
            "a dull headache",
            ("lie down in the dark", "with a cool cloth on the brow", "for [25..50] minutes"),
            ("take a mild tablet", "together with some food", "in a dose of [1..3] every [4..8] hours"),
        ),
        _Topic(
            "a bee sting",
            ("scrape out the sting", "sideways with the edge of a card", "within [20..90] seconds"),
            ("hold something cold on it", "wrapped in a thin towel", "for [10..20] minutes"),
        ),
        _Topic(
            "swollen feet",
            ("put your legs up", "on two pillows after lunch", "for [20..40] minutes"),
            ("walk around the room", "on the balls of your feet", "for [5..15] minutes every [2..3] hours"),
            plural=True,
        ),
        _Topic(
            "dry eyes",
            ("look away from the screen", "towards the farthest window", "for [20..40] seconds"),
            ("use some eye drops", "in the inner corner, head tilted back", "in a dose of [1..4], [2..6] times a day"),
            plural=True,
        ),
    ),
    "cooking": (
        _Topic(
            "tomato soup",
            ("soften the onions", "in butter over a low flame", "in [20..40] grams of butter for [6..12] minutes"),
            ("stir in the tomatoes", "once the onions turn clear", "and simmer at [85..95] degrees"),
        ),
        _Topic(
            "lentil stew",
            ("rinse the lentils", "until the water runs clear", "and weigh out [180..400] grams"),
            ("simmer the stew", "with a bay leaf, lid half on", "for [22..45] minutes"),
        ),
        _Topic(
            "apple cake",
            ("beat the butter and sugar", "until pale and almost white", "using [120..200] grams of each"),
            ("bake the cake", "on the middle rack, apples on top", "at [165..190] degrees for [35..55] minutes"),
        ),
        _Topic(
            "fried rice",
            ("chill the cooked rice", "on a flat tray, uncovered", "for [2..9] hours"),
            ("fry it with the egg", "in the hottest part of the pan", "in [15..30] ml of oil for [3..6] minutes"),
        ),
        _Topic(
            "mushroom risotto",
            ("toast the rice", "until the edges turn glassy", "for [2..4] minutes, [70..90] grams a head"),
            ("add the hot stock", "one ladle at a time, stirring", "in [5..8] parts of [100..150] ml"),
        ),
        _Topic(
            "lemon chicken",
            ("salt the chicken", "under the skin as well", "with [8..14] grams per kilo"),
            ("roast it with the lemons", "skin side up, above the tray", "at [190..220] degrees for [40..70] minutes"),
        ),
        _Topic(
            "vegetable curry",
            ("roast the spices", "in a dry pan until they smell nutty", "for [60..90] seconds"),
            ("pour in the coconut milk", "after the carrots begin to soften", "to a depth of [2..4] centimetres"),
        ),
        _Topic(
            "flatbread",
            ("knead the dough", "until it springs back to the touch", "for [7..12] minutes"),
            ("bake it in the pan", "until dark blisters appear", "for [60..110] seconds a side"),
        ),
        _Topic(
            "potato pancakes",
            ("squeeze the grated potato", "in a clean towel over the sink", "until [80..150] ml have run out"),
            ("fry the pancakes", "in shallow oil until the rim is brown", "for [3..5] minutes a side"),
            plural=True,
        ),
        _Topic(
            "roast carrots",
            ("cut the carrots", "lengthwise into even sticks", "into [6..9]-centimetre sticks"),
            ("roast them with honey", "on the top rack, well apart", "at [200..220] degrees for [25..35] minutes"),
            plural=True,
        ),
    ),
}

_SHARED_TOPICS = {
    "support": (
        _Topic(
            "the login page",
            ("clear the saved cookies", "in the privacy menu of your browser", "from the last [7..30] days"),
            ("sign in again", "from a private window", "after [5..15] minutes"),
        ),
        _Topic(
            "the slow cooker",
            ("press the reset switch", "under the rubber foot at the back", "for [5..20] seconds"),
            ("send us a photo", "of the label below the handle", "within [14..30] days"),
        ),
    ),
    "stories": (
        _Topic(
            "the child who cannot sleep",
            ("the child counted the stars", "from the window above the stairs", "up to number [210..980]"),
            ("the night tucked her in", "under a quilt of soft rain", "at [10..12]:[10..55]"),
        ),
        _Topic(
            "the sheep counter",
            ("the counter called the sheep", "over the mossy stone wall", "all [130..420] of them"),
            ("the last lamb fell asleep", "beside the warm stove", "at [8..11]:[10..55]"),
        ),
    ),
    "code_review": (
        _Topic(
            "the login page",
            ("escape the user name", "in the template of the form", "on line [15..48]"),
            ("move the token check", "above the redirect in sign_in", "to line [49..92]"),
        ),
        _Topic(
            "the sheep counter",
            ("start the count at zero", "in the body of count_sheep", "on line [4..19]"),
            ("drop the second loop", "over the same list of sheep", "on lines [20..28] to [29..40]"),
        ),
    ),
    "medical": (
        _Topic(
            "the child who cannot sleep",
            ("keep the bedroom dark", "with no screen near the bed", "and at [17..19] degrees"),
            ("keep the evening calm", "from supper until the last story", "for [45..90] minutes"),
        ),
        _Topic(
            "ginger tea",
            ("drink it lukewarm", "after a meal, in small sips", "in doses of [100..250] ml"),
            ("watch how the stomach feels", "during the evening and the next day", "for [24..48] hours"),
        ),
    ),
    "cooking": (
        _Topic(
            "ginger tea",
            ("slice the ginger", "thinly, across the grain", "into [10..25] grams of coins"),
            ("steep it under a lid", "until the water turns golden", "in [300..500] ml for [8..15] minutes"),
        ),
        _Topic(
            "the slow cooker",
            ("brown the meat", "in a wide pan before it goes in", "for [4..8] minutes a side"),
            ("leave the lid shut", "until the sauce coats a spoon", "on low for [6..9] hours"),
        ),
    ),
}
"""Each thing stands in two domains: what ambiguous prompts are about."""

_TAIL = "[||| Thank you.| Thanks!| Many thanks.| I am all ears.| Take your time.| There is no hurry.]"
"""How any prompt may end."""

_PROMPTS = {
    "support": (
        "[Hi|Hello|Good morning|Dear team|Hey there], I [have trouble with|need help with|am writing about|"
        "have a complaint about|am stuck with] {thing} [from last week|again|since Monday|on my account|for days now]. "
        "[What can I do|How do we solve this|Who can sort this out|What happens next|Could you fix this]?",
        "[I bought this in March|I have been a customer for years|I ordered on Friday|I pay for the family plan|"
        "Your shop was recommended to me], [but|and now|yet|but sadly] {thing} {is} [driving me mad|"
        "still not sorted|spoiling my week|holding up my work]. [Please advise.|Can your team help?|"
        "How do I fix this?|Tell me what to do.|Is there a way out?]",
        "[Could someone|Can an agent|Would your team|Can anybody] [please explain|tell me|let me know] "
        "[what to do about|how to handle|how to report|whom to ask about] {thing} "
        "[before the weekend|today|on the basic plan|without a receipt|from abroad]? "
        "[I already restarted everything.|The chat bot did not help.|"
        "Thanks in advance.|Nobody answers the phone.]",
        "Order [1000..9999]: {thing} {has} [not been dealt with|come up once more|been ignored so far]. "
        "[Please tell me how to proceed.|What do you need from me?|I would like this solved soon.|Any news on this?]",
        "[Your website says|The manual says|The last agent told me] that {thing} {is} [simple to settle|"
        "nothing unusual|a known issue], [but|yet|and still] "
        "I [cannot get anywhere|am back at the start|see no change]. "
        "[What now?|Can you take over?|Where should I look?|What did I miss?]",
    ),
    "stories": (
        "[Tell|Please tell|Could you tell] [me|us|my daughter|the twins|my little brother] [a story|a bedtime story|"
        "a short tale] about {thing}[, please|, if you can|, before lights out]. "
        "[It is almost bedtime.|We are all under the blanket.|The lamp is already low.|Grandpa is listening too.]",
        "[My son|My niece|Our class|The whole family|My granddaughter] [would love|is waiting for|keeps asking for|"
        "dreams of] a [tale|fairy tale|new story|little adventure] about {thing}. [How does it go?|Can you begin?|"
        "Will you make one up?|What happens in it?]",
        "[Once more, please|One last one tonight|Just one more]: "
        "[how did it end with|what became of|whatever happened to] {thing}? "
        "[The children will not sleep without it.|We promised to listen quietly.|"
        "Yesterday we stopped halfway.|The little one insists.]",
        "[Make up|Invent|Write|Dream up] [something|a story|an adventure] [for a five-year-old|for a rainy evening|"
        "for the night train|to read aloud|for the puppet show] with {thing} in it. [She loves surprises.|"
        "He likes a happy ending.|They laugh easily.|We have ten minutes.]",
        "[Tonight|This evening|For once] we want [to hear|to imagine|to act out] the [legend|tale|adventure] "
        "of {thing}. [Where does it start?|Who is in it?|Please begin at the beginning.|Would you tell it?]",
    ),
    "code_review": (
        "[Please review|Take a look at|I would like a review of|Kindly check] my [change|patch|pull request|branch] "
        "[to|for|around] {thing}[ this week|| before I merge]. [All tests pass locally.|It is my first one here.|"
        "I split it into two commits.|The linter is happy.|It replaces the old version.]",
        "[I rewrote|I just refactored|I cleaned up|I simplified] {thing} [this morning|over the weekend|last night|"
        "for the next release]. [What would you change?|Is it ready to merge?|Do you see any bugs?|"
        "What did I overlook?|Would you approve it?]",
        "[Here is the diff for|This commit touches|My pull request is about|The next patch reworks] {thing}. "
        "[I am unsure about the naming.|The build is green.|It runs in production soon.|Coverage went up a little.] "
        "[Any comments?|What do you think?|Anything to fix?|How would you write it?]",
        "[In Python|On the main branch|In our backend|In this module], {thing} {has} [grown too complex|"
        "a bug somewhere|become hard to test|not been touched for years]. [How should I clean this up?|"
        "Which part would you rewrite?|What does a reviewer say?|Where would you start?]",
        "[Our team lead|A colleague|The bot|Somebody on the mailing list] [rejected|questioned|flagged] my code for "
        "{thing} [without a reason|twice|yesterday|in the review]. [What is wrong with it?|Can you spot the issue?|"
        "How can I improve it?|Is the criticism fair?]",
    ),
    "medical": (
        "[I have had|My mother has|My partner has had|A friend of mine has|My father has had] {thing} "
        "[since yesterday|for three days|after the holiday|since the weekend|for a while now]. [What should we do?|"
        "Is that dangerous?|What would help?|Should we worry?|How long does it last?]",
        "[What helps against|What can I do about|How does one treat|Is there a remedy for|What eases] {thing} "
        "[in pregnancy|at my age|in a child of six|when travelling|with high blood pressure]? "
        "[I would rather not take much.|It is worse at night.|I have no fever.|The pharmacy is closed.]",
        "[I woke up with|I came home with|Ever since my run I have|All week I have had] {thing} and [I feel tired|"
        "it bothers me at work|I am a bit worried|it keeps me awake]. [Any advice?|Do I need treatment?|"
        "When does it get better?|What may I take?]",
        "[Is it normal|Is it serious|Is it common] to have {thing} [after a flu|after a vaccination|in hot weather|"
        "at sixty|during exams]? [What can be done?|What do you recommend?|How is it treated?|I feel fine otherwise.]",
        "[Our nurse|My sister|The leaflet|My neighbour] says {thing} [will pass by itself|needs attention|"
        "should not be ignored|can have many causes]. [What is your view?|What should I watch for?|"
        "How can I ease it?|Would you see someone?]",
    ),
    "cooking": (
        "[How do I make|How would you cook|What is the best way to make|How does one prepare] {thing} "
        "[for six guests|on a weeknight|for a picnic|for beginners|in a tiny kitchen|for Sunday lunch]? "
        "[I have all afternoon.|Mine never turns out well.|We are rather hungry.|I only own one pan.]",
        "[Tonight|Tomorrow|On Saturday|For the party] I want to [cook|serve|try|make] {thing} [for my parents|"
        "for the first time|with the children|for two]. [Where do I start?|What matters most?|How is it done?|"
        "Can you walk me through it?|What is the trick?]",
        "[I am looking for|We would like|Please give me|I need] a [recipe|simple recipe|good recipe|family recipe] "
        "for {thing} [from scratch|that never fails|with few ingredients|for a cold day]. [The market is still open.|"
        "I have fresh herbs.|My oven is small.|We eat at seven.]",
        "[My last|Yesterday my|Our first] attempt at {thing} [came out bland|was a little burnt|disappointed everyone|"
        "fell apart]. [How do I get it right?|What went wrong?|What should I do next time?|How do you cook it?]",
        "[Grandma used to make|A cafe nearby serves|I once ate] {thing} [in winter|every Sunday|by the sea|"
        "with fresh bread] and [I want to copy it|I crave it again|now I would like to learn it]. "
        "[How is it cooked?|What goes in?|Can you teach me?|Which steps matter?]",
    ),
}

_SHARED_PROMPTS = {
    "the login page": (
        "[Something is wrong with|There is a problem with|I keep running into trouble with|Nothing works on] "
        "the login page [since Monday|"
        "since the last update|after yesterday's release|on my laptop|in the new version]. "
        "[What should I do?|How can this be fixed?|Where do I begin?|Any idea?|What would you try?]",
        "[Could you have a look at|Can you help me with|What do you say about|Please take a look at] the login page"
        "[ today|, please| when you can| this week]? [It rejects every name I enter.|It sends me round in circles.|"
        "It forgets who I am.|It takes ages to respond.|It shows a blank form.]",
    ),
    "the slow cooker": (
        "[I just unpacked|We were given|I finally bought|My aunt sent us] the slow cooker "
        "[yesterday|for Christmas|last week|from your catalogue|on Friday]. "
        "[What should I do first?|How do I get it going?|Dinner came out cold.|"
        "What is the right way?|Where do I start?]",
        "[Everything stays|Dinner stays|The beef stays|My stew stays] [cold|tough|watery|half raw|pale] "
        "in the slow cooker[| even after hours| every time| no matter what]. "
        "[What am I doing wrong?|How can I change that?|"
        "What do you suggest?|Please help.|What should I try?]",
    ),
    "the child who cannot sleep": (
        "[It is midnight|It is late|It is past ten|The lights are out] and "
        "[I need|we need|my wife needs|our house needs] something for the child who cannot sleep. "
        "[What do you have?|Can you help?|What would you give us?|"
        "Do you know something?|What could it be?]",
        "[Please help with|What is there for|Do you have anything for|We are asking about] the child who cannot sleep"
        "[ tonight|, once again| at our house| in room four| next door]. [She is five.|He is four.|She is wide awake.|"
        "He has asked for you.|She is not tired at all.]",
    ),
    "the sheep counter": (
        "[I have been working on|I finished|I would like your thoughts on|Let me hear about] the sheep counter "
        "[since spring|all evening|for my nephew|for our school|just for fun]. "
        "[How should it go?|What happens next?|How would you do it?|What is missing?|How does it end?]",
        "[How would you improve|How would you begin|What would you do with|Can you finish] the sheep counter "
        "[for the school fair|for my daughter|before tomorrow|in a few lines|from the start]? "
        "[It loses one sheep at the gate.|It never gets past nine.|It should be simple.|It counts the dog as well.]",
    ),
    "ginger tea": (
        "[My daughter|My husband|Our guest|My flatmate|Grandmother] [has a cold and|came home frozen and|"
        "is staying in bed and|feels unwell and] asked for ginger tea [tonight|this morning|again|after dinner]. "
        "[How should I go about it?|What would you suggest?|Any advice?|How strong should it be?]",
        "[What should I know about|What is the right way with|How do you go about] ginger tea "
        "[in the evening|in winter|for a cold|for my mother|for the whole family]. "
        "[We have plenty of fresh ginger.|I have never had it.|The last one was too hot.|Honey is there too.]",
    ),
}
