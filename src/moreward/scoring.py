"""Scorer: the one door to rewards for library, command line, evaluation and everything later.

N conversations, P prompts, E experts, K experts used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from moreward.calibration import EVERYONE, Calibration, how_to_get_it, read_calibration, sigmoid
from moreward.config import DEVICE
from moreward.data.batches import Encoded, Encoder, conversation_batch, side
from moreward.errors import AbstainedError, ConfigError, DataError, MorewardError, NonFiniteError, RunError
from moreward.items import Item, as_conversation, as_text
from moreward.nn.experts import Standardize
from moreward.nn.features import FeatureStore
from moreward.runs import identity, model_folder, read_model
from moreward.systems._base import GatedSystem, GrowingSystem, System
from moreward.types import (
    Batch,
    Comparison,
    Conversation,
    Explanation,
    Preference,
    Rendered,
    Reward,
    Rewards,
    RoutedReward,
    Routing,
    Text,
    Uncertainty,
    concatenated,
)
from moreward.uncertainty import Caution, Weigh, disagreement, router_entropy

TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 16384}
"""What a processor's caches like best; on CPU more was slower (8,192: by 15 %)."""
GOLDEN_TOLERANCE = 1e-4
"""How far a reward may be from the stored one, in units of its expert."""
RAW_TOLERANCE = 1e-5
"""What rounding may do to a raw reward, relative to its size. An expert whose rewards hardly differ has a tiny unit,
which makes as much of rounding: with a standard deviation of 5e-4 a reward may be 0.02 off."""

Routes = dict[tuple[int, ...], Routing]
"""Routings of single prompts, by their tokens."""


def load(
    run: str | Path,
    *,
    device: str = "auto",
    backbone: str | None = None,
    check: bool = True,
    deterministic: bool = False,
    dtype: str = "fp32",
    conservative: float = 0.0,
    abstain: Mapping[str, float] | None = None,
    weigh: Weigh = "even",
) -> Scorer:
    """Load a trained run; the arguments are those of `Scorer.load`."""
    return Scorer.load(
        run,
        device=device,
        backbone=backbone,
        check=check,
        deterministic=deterministic,
        dtype=dtype,
        conservative=conservative,
        abstain=abstain,
        weigh=weigh,
    )


class Scorer:
    """Rewards of a trained system.

    Items are `Conversation`s, `(prompt, response)` tuples, or mappings with `prompt` and `response` and, where they
    have them, `id`, `domain`, `tools`, `chat_template_kwargs`, `meta`; texts are strings or lists of messages.
    Longer than the model's limit is an error, unless the run was trained with `data.on_long=truncate` or `on_long`
    says so here; then the start is cut off and the Reward says it.

    `deterministic`: a reward depends on its own text alone, to the last bit, whatever it is scored together with; each
    text is then a forward of its own. Otherwise rewards of one text may differ in the last digits between batches.

    `conservative` λ > 0 gives mean - λ · disagreement of the experts or members; 0 is the plain reward to the bit.
    `abstain` maps `out_of_domain`, `router_entropy` or `disagreement` to the largest value with which a reward is
    still given; beyond it `Reward.reward` is None and `abstained` says why. `weigh="gate"` counts each expert as the
    router weighs it. Both cost every expert's forward, or one more of the prompt, as far as they need them.
    ConfigError where the system cannot tell what is asked for, RunError where it would have to be fitted first.
    """

    def __init__(
        self,
        system: System,
        encoder: Encoder,
        card: Mapping[str, Any],
        *,
        identity: str = "",
        device: str = "auto",
        deterministic: bool = False,
        conservative: float = 0.0,
        abstain: Mapping[str, float] | None = None,
        weigh: Weigh = "even",
        calibration: Calibration | None = None,
        folder: Path | None = None,
    ) -> None:
        """`folder` is that of the model, where a calibration is looked for when it is first needed."""
        self.device = pick_device(device)
        self.deterministic = deterministic
        self.system = system.eval().to(self.device)
        self.encoder = encoder
        self.card = card
        self.identity = identity
        self.on_long: str = card["config"]["data"]["on_long"]
        for backbone in system.backbones():
            # Kept features would grow without end; evaluation asks for them itself.
            backbone.store = backbone.trunk_store = None
        self.folder = folder
        self._calibration = calibration
        self.be_cautious(Caution(conservative=conservative, abstain=abstain, weigh=weigh))

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        device: str = "auto",
        backbone: str | None = None,
        check: bool = True,
        deterministic: bool = False,
        dtype: str = "fp32",
        conservative: float = 0.0,
        abstain: Mapping[str, float] | None = None,
        weigh: Weigh = "even",
    ) -> Scorer:
        """`check` recomputes a few of the run's stored golden rewards and refuses on a difference. `dtype` bf16 halves
        the memory and on some processors the time, and changes rewards in the third digit; see `eval --dtype-check`.
        """
        if dtype not in ("fp32", "bf16"):
            raise ConfigError(f"dtype: {dtype!r} is not there; use fp32 or bf16")
        caution = Caution(conservative=conservative, abstain=abstain, weigh=weigh)
        system, encoder, card = read_model(run, backbone=backbone)
        # Another way to compute is another scorer: a job that was begun with one is not ended with the other.
        name = "/".join(
            [
                identity(model_folder(run)),
                *([dtype] if dtype != "fp32" else []),
                *(["deterministic"] if deterministic else []),
                *([caution.name] if caution.name else []),
            ]
        )
        scorer = cls(
            system,
            encoder,
            card,
            identity=name,
            device=device,
            deterministic=deterministic,
            conservative=conservative,
            abstain=abstain,
            weigh=weigh,
            folder=model_folder(run),
        )
        if check:
            scorer.check_golden(limit=4)
        if dtype == "bf16":
            for parameter in (p for part in system.backbones() for p in part.parameters()):
                parameter.data = parameter.data.to(torch.bfloat16)  # buffers, such as rotary frequencies, stay
        return scorer

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts by the domain that each was trained on, or by number inside a model; empty if none."""
        return self.system.expert_labels

    @property
    def domains(self) -> tuple[str, ...]:
        return self.system.domains

    @property
    def num_judges(self) -> int:
        """How many experts or members can be asked about one conversation; 0 where nobody can be asked apart."""
        return len(self.system.member_labels) or (len(self.experts) if isinstance(self.system, GatedSystem) else 0)

    def be_cautious(self, caution: Caution) -> None:
        """Refuses, before anything is scored, what this system cannot tell."""
        if caution.needs_disagreement and self.num_judges < 2:
            raise ConfigError(
                "conservative, abstain.disagreement: need experts or members that can disagree, and this run "
                f"({self.card['recipe']}) has one voice. Leave them out, or take a run of rodos, arliss or an ensemble."
            )
        if "router_entropy" in (caution.abstain or {}) and len(self.experts) < 2:
            raise ConfigError("abstain: router_entropy needs a router over two experts or more; this run has none")
        if caution.weigh == "gate" and not isinstance(self.system, GatedSystem):
            raise ConfigError("weigh: 'gate' needs a router over experts that judge apart; this run has none")
        if "out_of_domain" in (caution.abstain or {}):
            self.calibration()
        self.caution = caution

    def find_calibration(self) -> Calibration | None:
        """What was fitted when the run ended, or by `moreward calibrate`; None where nothing was. RunError where it is
        damaged or of another model."""
        if self._calibration is None and self.folder is not None:
            self._calibration = read_calibration(self.folder, model=identity(self.folder))
        return self._calibration

    def calibration(self) -> Calibration:
        """As `find_calibration`. RunError, which says how to get one, where there is none."""
        found = self.find_calibration()
        if found is None:
            raise RunError(
                f"{self.folder or 'this run'}: uncertainty is not available: nothing was fitted for it, as "
                f"by older versions or without held-out pairs. {how_to_get_it()}"
            )
        return found

    def score(
        self,
        items: Sequence[Item],
        *,
        explain: bool = False,
        uncertainty: bool = False,
        on_long: str | None = None,
        expert: str = "",
    ) -> list[Reward]:
        """One Reward per item, in order. `explain` adds every expert's standardised reward; `uncertainty` what speaks
        against trusting it, which asks every expert and reads the prompt once more. RunError where the latter was
        never fitted. `expert` names the one that judges, whatever the router says."""
        told = self.score_each(items, explain=explain, uncertainty=uncertainty, on_long=on_long, expert=expert)
        for one in told:
            if isinstance(one, MorewardError):
                raise one
        return cast(list[Reward], told)

    def score_each(
        self,
        items: Sequence[Item],
        *,
        explain: bool = False,
        uncertainty: bool = False,
        on_long: str | None = None,
        expert: str = "",
    ) -> list[Reward | MorewardError]:
        """As `score`, but an item that gets no reward gets the reason in its place, and the others their rewards."""
        if uncertainty:
            self.calibration()
        if expert:
            self.expert_number(expert)
        cautious = uncertainty or self.caution.is_needed
        told = self._plain_each(items, explain=explain, uncertain=cautious, on_long=on_long, expert=expert)
        if not cautious:
            return told
        told = [self.caution.applied(one) if isinstance(one, Reward) else one for one in told]
        if uncertainty:
            return told
        return [replace(one, uncertainty=None) if isinstance(one, Reward) else one for one in told]

    def expert_number(self, name: str) -> int:
        """Its place among `experts`. ConfigError where no expert of this name can be asked alone."""
        if not isinstance(self.system, GatedSystem):
            raise ConfigError(f"expert: this run ({self.card['recipe']}) has no experts that can be asked one by one")
        if name not in self.experts:
            raise ConfigError(f"expert: {name!r} is not there. The run has: {', '.join(self.experts)}.")
        return self.experts.index(name)

    def probabilities(self, pairs: Sequence[Preference | tuple[Text, Text, Text]]) -> list[float]:
        """Calibrated probability that the first response of each pair, (prompt, first, second) or a Preference, is the
        better one: σ(difference of plain rewards / temperature of the expert that spoke), that of all pairs where two
        spoke. RunError where no temperature was fitted."""
        calibration = self.calibration()
        items: list[Item] = []
        for pair in pairs:
            if isinstance(pair, Preference):
                items += [side(pair, "chosen"), side(pair, "rejected")]
            else:
                prompt, first, second = pair
                items += [(prompt, first), (prompt, second)]
        rewards = self._plain(items)
        return [_probability(a, b, calibration) for a, b in zip(rewards[::2], rewards[1::2], strict=True)]

    def _plain(self, items: Sequence[Item], *, on_long: str | None = None) -> list[Reward]:
        """Rewards before any caution. Raises what an item gets in place of its reward."""
        told = self._plain_each(items, on_long=on_long)
        for one in told:
            if isinstance(one, MorewardError):
                raise one
        return cast(list[Reward], told)

    def _plain_each(
        self,
        items: Sequence[Item],
        *,
        explain: bool = False,
        uncertain: bool = False,
        on_long: str | None = None,
        expert: str = "",
    ) -> list[Reward | MorewardError]:
        """Rewards before any caution, or the reason why there is none."""
        told: dict[int, Reward | MorewardError] = {}
        known: dict[int, tuple[Conversation | Rendered, Encoded]] = {}
        for i, item in enumerate(items):
            try:
                conversation = as_conversation(item, i)
                known[i] = (conversation, self._encode_one(conversation, i, on_long or self.on_long))
            except DataError as error:
                told[i] = error
        # Equal texts are computed once: two rows of one batch could differ in the last bit.
        first_with: dict[Encoded, int] = {}
        firsts = {i: first_with.setdefault(encoded, i) for i, (_, encoded) in known.items()}
        once = sorted(first_with.values())
        routes: Routes = {}
        found: dict[int, Reward | MorewardError] = {}
        for rows, batch in self._batches([known[i][0] for i in once], [known[i][1] for i in once]):
            rewards = self._rewards_each(batch, routes, explain, uncertain, expert)
            found |= {once[row]: reward for row, reward in zip(rows, rewards, strict=True)}
        for i, (conversation, encoded) in known.items():
            one = found[firsts[i]]
            told[i] = _named(one, conversation.id, encoded) if isinstance(one, Reward) else one
        return [told[i] for i in range(len(items))]

    def _rewards_each(
        self, batch: Batch, routes: Routes, explain: bool, uncertain: bool, expert: str
    ) -> Sequence[Reward | MorewardError]:
        """Of a batch; where a reward is not finite, row by row, so that the other rows get theirs."""
        try:
            return self._rewards(batch, routes, explain, uncertain, expert)
        except NonFiniteError as error:
            if len(batch) == 1:
                return [error]
            alone = [batch.rows(torch.tensor([n], device=self.device)) for n in range(len(batch))]
            return [self._rewards_each(one, routes, explain, uncertain, expert)[0] for one in alone]

    def batch(self, items: Sequence[Item]) -> Batch:
        """Items as one batch of tokens, for those who call `system` itself; limits as in `score`."""
        conversations = [as_conversation(item, i) for i, item in enumerate(items)]
        encoded = self._encode(conversations, self.on_long)
        return conversation_batch(encoded, [-1] * len(encoded), self.encoder.pad_id).to(self.device)

    def rank(self, prompt: Text, responses: Sequence[Text]) -> list[int]:
        """Indices of the responses, best first; equal rewards keep their order."""
        return self.compare(prompt, responses).order

    def best_of_n(self, prompt: Text, responses: Sequence[Text]) -> int:
        """Index of the best response. AbstainedError where the scorer abstained from all of them."""
        compared = self.compare(prompt, responses)
        best = compared.order[0]
        if compared.rewards[best].reward is None:
            raise AbstainedError(f"no best response: {compared.rewards[best].abstained}")
        return best

    def compare(
        self, prompt: Text, responses: Sequence[Text], *, explain: bool = False, uncertainty: bool = False
    ) -> Comparison:
        """Rewards, order and pairwise preference probabilities of responses to one prompt: σ(r_i - r_j), with
        `uncertainty` the calibrated ones of `probabilities`. Without it a response that has no reward has none of
        these either: its row and column are of 0.5."""
        if not responses:
            raise DataError("compare: at least one response is needed (got 0)")
        rewards = self.score([(prompt, r) for r in responses], explain=explain, uncertainty=uncertainty)
        values = [r.reward for r in rewards]
        order = sorted(range(len(rewards)), key=lambda i: (values[i] is None, -(values[i] or 0.0)))
        if uncertainty:
            calibration = self.calibration()
            return Comparison(rewards, order, [[_probability(a, b, calibration) for b in rewards] for a in rewards])
        given = torch.tensor([[v is not None for v in values]])
        known = torch.tensor([v or 0.0 for v in values], dtype=torch.float64)
        apart = (known[:, None] - known[None, :]).where(given & given.T, 0.0)
        return Comparison(rewards, order, apart.sigmoid().tolist())

    def score_routes(self, items: Sequence[Conversation], *, seed: int = 0) -> list[RoutedReward]:
        """Each reward under the system's router, an oracle and a random router, with no expert computed twice."""
        encoded = self._encode(items, self.on_long)
        # Equal texts are computed once, so that a pair made equal by truncation is a tie and not decided by rounding.
        first_with: dict[tuple[Encoded, str], int] = {}
        firsts = [
            first_with.setdefault((e, item.domain), i) for i, (e, item) in enumerate(zip(encoded, items, strict=True))
        ]
        once = sorted(first_with.values())
        found: dict[int, RoutedReward] = {}
        routes: Routes = {}
        for rows, batch in self._batches([items[i] for i in once], [encoded[i] for i in once]):
            for row, routed in zip(rows, self._routed(batch, routes, seed), strict=True):
                e = encoded[once[row]]
                found[once[row]] = RoutedReward(**routed, num_tokens=e.num_tokens, truncated=e.truncated)
        return [found[first] for first in firsts]

    def keep_features(self, store: FeatureStore) -> None:
        """Let frozen backbones look their vectors up in `store`; nothing happens where the backbone was trained."""
        if self.system.config.tune == "frozen":
            for backbone in self.system.backbones():
                backbone.store = store

    def golden(self, items: Sequence[Conversation]) -> list[dict[str, Any]]:
        """What these items get now, every expert included, to be stored and checked later."""
        return [
            {
                "prompt": item.prompt,
                "response": item.response,
                "reward": self._plain([item], on_long="truncate")[0].number,
                "experts": self._each_expert(item),
            }
            for item in items
        ]

    def _each_expert(self, item: Conversation) -> dict[str, float]:
        """Of a system with an expert per domain, each of them."""
        if not isinstance(self.system, GatedSystem):
            return {}
        told = self.each_part(item)
        return {name: told[name] for name in self.experts}

    @torch.no_grad()
    def each_part(self, item: Conversation) -> dict[str, float]:
        """Each expert, member or objective in a forward of its own, so that the bits do not depend on how many there
        are; empty where a recipe has none."""
        if not isinstance(self.system, GrowingSystem):
            return {}
        batch = conversation_batch(self._encode([item], "truncate"), [-1], self.encoder.pad_id).to(self.device)
        return self.system.each_part(batch)

    def check_golden(self, limit: int | None = None) -> float:
        """Recompute stored golden rewards; returns the largest difference. RunError beyond what rounding can do."""
        largest = 0.0
        for stored in self.card["golden"][:limit]:
            item = Conversation(prompt=as_text(stored["prompt"]), response=as_text(stored["response"]))
            now = self._plain([item], on_long="truncate")[0]
            difference = abs(now.number - stored["reward"])
            if difference > self.allowed(now.weights):
                raise RunError(
                    f"golden rewards differ by {difference:.2g}: this model does not compute what it computed when it "
                    "was trained. Is the tokenizer or the backbone another version?"
                )
            largest = max(largest, difference)
        return largest

    def allowed(self, experts: Iterable[str]) -> float:
        """How far apart two computations of a reward may be: the rounding of a raw reward in units of the experts
        that give it, by their domains, the coarsest counting. Without experts per domain, of all parts."""
        system = self.system
        if isinstance(system, GatedSystem):
            name_of = dict(zip(system.expert_labels, system.expert_names, strict=True))
            used = [(system.standardizer(name), system.raw_size(name)) for name in map(name_of.__getitem__, experts)]
        else:
            parts = [module for module in system.modules() if isinstance(module, Standardize)]
            used = [(part, max(1.0, abs(float(part.mean)))) for part in parts]
        rounding = [RAW_TOLERANCE * size / float(unit.std) for unit, size in used]
        return max([GOLDEN_TOLERANCE, *rounding])

    def _encode(self, items: Sequence[Conversation | Rendered], on_long: str) -> list[Encoded]:
        return [self._encode_one(item, i, on_long) for i, item in enumerate(items)]

    def _encode_one(self, item: Conversation | Rendered, i: int, on_long: str) -> Encoded:
        try:
            encoded = self.encoder.conversation(item)
        except DataError as error:
            raise DataError(f"items[{i}]: {error}") from error
        if encoded.truncated and on_long != "truncate":
            name = f"items[{i}] ({item.id})" if item.id else f"items[{i}]"
            raise DataError(
                f"{name}: {self.encoder.too_long(encoded)}. Shorten it, or allow truncation (on_long='truncate', "
                "--truncate)."
            )
        return encoded

    def _batches(
        self, items: Sequence[Conversation | Rendered], encoded: Sequence[Encoded]
    ) -> Iterator[tuple[list[int], Batch]]:
        """Rows for one forward each, up to a number of tokens: in order of arrival where nothing is padded, else rows
        of similar length together."""
        # For the oracle router, which takes the expert of the row's domain: experts may have names of their own.
        labels = self.experts if isinstance(self.system, GatedSystem) else self.domains
        domain_of = {name: i for i, name in enumerate(labels)}
        for rows in self._chunks(encoded):
            domains = [domain_of.get(items[r].domain, -1) for r in rows]
            batch = conversation_batch([encoded[r] for r in rows], domains, self.encoder.pad_id)
            yield rows, batch.to(self.device)

    def _chunks(self, encoded: Sequence[Encoded]) -> list[list[int]]:
        if self.deterministic:
            return [[row] for row in range(len(encoded))]
        budget = TOKENS_PER_FORWARD[self.device.type]
        if all(backbone.family is not None for backbone in self.system.backbones()):
            shared = all(backbone.shares_prefixes for backbone in self.system.backbones())
            return _in_order(encoded, budget, prompts_once=shared)
        return _by_length(encoded, budget)

    def _routing(self, batch: Batch, routes: Routes) -> Routing:
        """Where each conversation goes; a prompt that stands in `routes` is not read again."""
        assert isinstance(self.system, GatedSystem)
        prompts = [
            tuple(ids[:length])
            for ids, length in zip(batch.prompt_ids_PT.tolist(), batch.prompt_mask_PT.sum(1).tolist(), strict=True)
        ]
        new = [p for p, prompt in enumerate(prompts) if prompt not in routes]
        if new:
            unread = replace(batch, prompt_ids_PT=batch.prompt_ids_PT[new], prompt_mask_PT=batch.prompt_mask_PT[new])
            routing = self.system.route_prompts(unread)
            routes |= {prompts[p]: routing.rows(torch.tensor([i])) for i, p in enumerate(new)}
        return concatenated([routes[prompt] for prompt in prompts]).rows(batch.prompt_of_N)

    def _sent_to(self, expert: str, batch: Batch, routing: Routing | None) -> Routing:
        """The whole weight on one expert. Logits are the router's, for what it would have said, or 0 if unasked."""
        shape = (len(batch), len(self.experts))
        experts_N1 = torch.full((len(batch), 1), self.expert_number(expert), device=self.device)
        return Routing(
            experts_NK=experts_N1,
            weights_NK=torch.ones_like(experts_N1, dtype=torch.float32),
            logits_NE=torch.zeros(shape, device=self.device) if routing is None else routing.logits_NE,
        )

    @torch.no_grad()
    def _rewards(
        self, batch: Batch, routes: Routes, explain: bool, uncertain: bool = False, expert: str = ""
    ) -> list[Reward]:
        if isinstance(self.system, GatedSystem):
            # A named expert needs no router, which reads every prompt; doubts hold the router's entropy all the same.
            routing = None if expert and not uncertain else self._routing(batch, routes)
            output = self.system(batch, self._sent_to(expert, batch, routing) if expert else routing)
        else:
            output = self.system(batch)
        _refuse_non_finite(output.reward_N)
        if not uncertain:
            told = self._told(batch, output, explain)
            return [replace(reward, router_entropy=None) for reward in told] if expert else told
        told = self._told(batch, output, explain=True)
        doubts = self._doubts(batch, output, told)
        unasked: dict[str, Any] = {} if explain else {"expert_rewards": {}, "parts": {}, "part_rewards": {}}
        unasked |= {"router_entropy": None} if expert else {}
        return [replace(reward, uncertainty=doubt, **unasked) for reward, doubt in zip(told, doubts, strict=True)]

    def _doubts(self, batch: Batch, output: Rewards, told: Sequence[Reward]) -> list[Uncertainty]:
        """What speaks against each reward; `told` holds every expert's reward."""
        logits_NE = output.routing.logits_NE if output.routing is not None and len(self.experts) > 1 else None
        gate = (
            logits_NE.double().softmax(-1).tolist() if logits_NE is not None and self.caution.weigh == "gate" else None
        )
        apart = self.num_judges > 1  # objectives that are parts of one reward do not disagree
        entropy = router_entropy(logits_NE).tolist() if logits_NE is not None else [None] * len(told)
        found = [
            Uncertainty(
                mean=reward.number,
                disagreement=disagreement([*reward.expert_rewards.values()], gate and gate[n]) if apart else None,
                router_entropy=entropy[n],
            )
            for n, reward in enumerate(told)
        ]
        calibration = self.find_calibration()
        return found if calibration is None else self._placed(batch, calibration, found, told)

    def _placed(
        self, batch: Batch, calibration: Calibration, found: Sequence[Uncertainty], told: Sequence[Reward]
    ) -> list[Uncertainty]:
        """With what was fitted: where the prompt lies, and the temperature."""
        space = calibration.space
        hidden_PD = self.system.backbones()[0](batch.prompt_ids_PT, batch.prompt_mask_PT)
        distance_P, nearest_P = space.distances(hidden_PD).min(1)
        distances, nearest = distance_P.tolist(), nearest_P.tolist()
        return [
            replace(
                doubt,
                distance=distances[p],
                nearest=space.domains[nearest[p]],
                out_of_domain=space.share_nearer(distances[p]),
                temperature=calibration.temperature(reward.expert),
            )
            for doubt, reward, p in zip(found, told, batch.prompt_of_N.tolist(), strict=True)
        ]

    @torch.no_grad()
    def read_prompts(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """`hidden_PD` that the first backbone, without adapters, gives the token ids of prompts."""
        encoded = [Encoded(ids, ids, 0) for ids in prompts]
        hidden_PD = torch.zeros(len(prompts), self.system.backbones()[0].hidden_size)
        for rows in self._chunks(encoded):
            batch = conversation_batch([encoded[r] for r in rows], [-1] * len(rows), self.encoder.pad_id)
            batch = batch.to(self.device)
            read = self.system.backbones()[0](batch.prompt_ids_PT, batch.prompt_mask_PT)
            hidden_PD[rows] = read[batch.prompt_of_N].cpu()
        return hidden_PD

    def _told(self, batch: Batch, output: Rewards, explain: bool) -> list[Reward]:
        """The rewards of an output as users see them."""
        values = output.reward_N.tolist()
        if members := self.system.member_labels:
            assert output.expert_reward_NK is not None
            told_NK = output.expert_reward_NK.tolist() if explain else [() for _ in values]
            return [
                Reward(reward=value, expert_rewards=dict(zip(members, told, strict=False)))
                for value, told in zip(values, told_NK, strict=True)
            ]
        made_of = (self.system.explained(batch, output) if explain else []) or [Explanation()] * len(values)
        if not self.experts or output.routing is None:
            return [
                Reward(reward=value, parts=made.parts, part_rewards=made.part_rewards)
                for value, made in zip(values, made_of, strict=True)
            ]
        experts_NK, weights_NK = output.routing.experts_NK.tolist(), output.routing.weights_NK.tolist()
        everyone: list[list[float]] = [[] for _ in values]
        if explain and isinstance(self.system, GatedSystem):
            reward_NE = self.system.judge(batch, self._all_experts(batch))
            assert output.expert_reward_NK is not None
            # The experts used have spoken already; a second computation could differ in the last digit.
            everyone = reward_NE.scatter(1, output.routing.experts_NK, output.expert_reward_NK).tolist()
        elif explain and output.expert_reward_NK is not None and output.expert_reward_NK.shape[1] == len(self.experts):
            # All were used, so all have spoken.
            everyone = output.expert_reward_NK.gather(1, output.routing.experts_NK.argsort(1)).tolist()
        entropies: list[float | None] = [None] * len(values)
        if len(self.experts) > 1:
            entropies = list(router_entropy(output.routing.logits_NE).tolist())
        return [
            Reward(
                reward=value,
                expert=self.experts[experts[0]],
                weights={self.experts[e]: w for e, w in zip(experts, weights, strict=True)},
                expert_rewards=dict(zip(self.experts, every, strict=False)),
                parts=made.parts,
                part_rewards=made.part_rewards,
                router_entropy=entropy,
            )
            for value, experts, weights, every, made, entropy in zip(
                values, experts_NK, weights_NK, everyone, made_of, entropies, strict=True
            )
        ]

    def _all_experts(self, batch: Batch) -> Tensor:
        return torch.arange(len(self.experts), device=self.device).expand(len(batch), -1)

    @torch.no_grad()
    def _routed(self, batch: Batch, routes: Routes, seed: int) -> list[dict[str, Any]]:
        if not isinstance(self.system, GatedSystem):
            every = bool(self.system.member_labels)  # members have all spoken anyway
            return [
                {"reward": r.number, "expert": r.expert, "expert_rewards": r.expert_rewards}
                for r in self._rewards(batch, routes, explain=every)
            ]
        routing = self._routing(batch, routes)
        k = routing.experts_NK.shape[1]
        known_N = batch.domain_N >= 0
        oracle_N = torch.where(known_N, batch.domain_N, routing.experts_NK[:, 0])
        wanted_NJ = torch.cat(
            [routing.experts_NK, oracle_N[:, None], self._random_experts(batch, seed)[:, None]], dim=1
        )
        reward_NJ = judge_once(self.system, batch, wanted_NJ, len(self.experts))
        _refuse_non_finite(reward_NJ)
        reward_N = (reward_NJ[:, :k] * routing.weights_NK).sum(1)
        return [
            {
                "reward": float(reward_N[n]),
                "expert": self.experts[int(routing.experts_NK[n, 0])],
                "oracle": float(reward_NJ[n, k]) if known_N[n] else None,
                "random": float(reward_NJ[n, k + 1]),
            }
            for n in range(len(batch))
        ]

    def _random_experts(self, batch: Batch, seed: int) -> Tensor:
        """One expert per prompt by a hash of its tokens, so that it does not depend on the batch."""
        drawn = [
            int.from_bytes(
                hashlib.blake2b(f"{seed}/{ids[mask.bool()].tolist()}".encode(), digest_size=6).digest(), "big"
            )
            for ids, mask in zip(batch.prompt_ids_PT.cpu(), batch.prompt_mask_PT.cpu(), strict=True)
        ]
        random_P = torch.tensor(drawn, device=self.device) % len(self.experts)
        return random_P[batch.prompt_of_N]


def _in_order(encoded: Sequence[Encoded], budget: int, *, prompts_once: bool) -> list[list[int]]:
    """Neighbours up to `budget` tokens; with `prompts_once` a prompt that the row before has too is not counted."""
    chunks: list[list[int]] = []
    num_tokens = 0
    for row, e in enumerate(encoded):
        before = encoded[row - 1] if row else e
        whole = prompts_once and row > 0 and not (e.truncated or before.truncated)
        shares = whole and before.prompt_ids == e.prompt_ids
        size = len(e.ids) - (len(e.prompt_ids) if shares else 0)
        if not chunks or num_tokens + size > budget:
            chunks.append([])
            num_tokens, size = 0, len(e.ids)
        chunks[-1].append(row)
        num_tokens += max(size, 1)
    return chunks


def _by_length(encoded: Sequence[Encoded], budget: int) -> list[list[int]]:
    """Rows of similar length, up to `budget` tokens with their padding."""
    chunks: list[list[int]] = []
    for row in sorted(range(len(encoded)), key=lambda i: (len(encoded[i].ids), encoded[i].prompt_ids)):
        if not chunks or (len(chunks[-1]) + 1) * len(encoded[row].ids) > budget:
            chunks.append([])
        chunks[-1].append(row)
    return chunks


def judge_once(system: GatedSystem, batch: Batch, wanted_NJ: Tensor, num_experts: int) -> Tensor:
    """`reward_NJ` of the experts wanted for each row, each pair of row and expert computed once."""
    rows_NJ = torch.arange(len(batch), device=wanted_NJ.device)[:, None].expand_as(wanted_NJ)
    pairs, place_M = (rows_NJ * num_experts + wanted_NJ).flatten().unique(return_inverse=True)
    rows_M, experts_M1 = pairs // num_experts, (pairs % num_experts)[:, None]
    reward_M = system.judge(batch.rows(rows_M), experts_M1)[:, 0]
    return reward_M[place_M].view(wanted_NJ.shape)


def pick_device(name: str, *, key: str = "device") -> torch.device:
    """`auto` is the GPU where there is one. ConfigError, under the name of the setting `key`, for a device that is
    not there."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    known = re.fullmatch(DEVICE, name)
    if known is None or (name != "cpu" and int((known[1] or ":0")[1:]) >= num_gpus):
        gpus = " or cuda" + (f", cuda:0 to cuda:{num_gpus - 1}" if num_gpus > 1 else "") if num_gpus else ""
        why = "" if num_gpus else "; PyTorch sees no CUDA device (a driver? a build of PyTorch with CUDA?)"
        raise ConfigError(f"{key}: {name!r} is not there; use auto, cpu{gpus}{why}")
    return torch.device(name)


def _named(reward: Reward, name: str, encoded: Encoded) -> Reward:
    return replace(reward, num_tokens=encoded.num_tokens, truncated=encoded.truncated, id=name)


def _probability(first: Reward, second: Reward, calibration: Calibration) -> float:
    """That the first is the better one, by rewards before any caution."""
    a, b = (one.number if one.uncertainty is None else one.uncertainty.mean for one in (first, second))
    expert = first.expert if first.expert == second.expert else EVERYONE
    return float(sigmoid(np.array((a - b) / calibration.temperature(expert))))


def _refuse_non_finite(reward: Tensor) -> None:
    if not bool(torch.isfinite(reward).all()):
        raise NonFiniteError("the model gave a reward that is NaN or infinite; its weights or its input are damaged")
