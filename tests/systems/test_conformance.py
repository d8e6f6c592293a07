"""What every recipe must be, whatever it computes: found by name, so that a new recipe is tested with no edit here.

Each recipe is trained once per `tune` on a tiny BERT and eight pairs; every test then looks at that run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moreward.config import resolve
from moreward.data.batches import conversation_batch, encode_pairs, pair_batch, side
from moreward.evals.accuracy import evaluate
from moreward.nn.backbone import Backbone
from moreward.nn.experts import Standardize
from moreward.registry import find_recipe, recipe_names
from moreward.runs import read_model
from moreward.scoring import Scorer, load
from moreward.systems._base import RoutedSystem, Stage, System
from moreward.train.runner import Pairs, Work, train_on
from moreward.types import Batch, Conversation, Preference, RoutedReward

CASES = [
    (name, tune)
    for name in recipe_names()
    for tune in find_recipe(name).tunes
    if not find_recipe(name).made_by  # imported experts are not trained: tests/systems/test_strangers.py
]
LEARNING_RATES = {"full": 1e-3, "lora": 2e-3, "frozen": 1e-2}
NUM_STEPS = 90
RAW_TOLERANCE = 2e-6
"""Of a raw reward: padding and batch size change the order in which float32 sums are taken, and nothing else."""


@dataclass(frozen=True)
class Move:
    """What one stage did: every tensor of the system, and every expert's rewards, before and after it."""

    stage: Stage
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]]
    judged: tuple[Tensor | None, Tensor | None]
    may_move: set[str]


@dataclass(frozen=True)
class Trained:
    run: Path
    scorer: Scorer
    few: list[Preference]
    moves: list[Move] = field(default_factory=list)

    @property
    def system(self) -> System:
        return self.scorer.system

    @property
    def batch(self) -> Batch:
        return batch_of(self.scorer, self.few)


@pytest.fixture(scope="module")
def train_case(
    pairs: Sequence[Preference], tiny_backbone: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, str]], Trained]:
    made: dict[tuple[str, str], Trained] = {}

    def get(case: tuple[str, str]) -> Trained:
        if case not in made:
            out = tmp_path_factory.mktemp("runs") / "-".join(case)
            made[case] = train_once(*case, handful(pairs, case[0]), tiny_backbone("bert"), out)
        return made[case]

    return get


def handful(pairs: Sequence[Preference], recipe: str) -> list[Preference]:
    """Four pairs of each domain, four prompts a domain. Domains disagree where there is an expert for each; a single
    model on a frozen random trunk could not tell them apart, so there both prefer the short answer."""
    few = [p for domain in ("short", "long") for p in [q for q in pairs if q.domain == domain][:8:2]]
    if issubclass(find_recipe(recipe), RoutedSystem):
        return few
    return [
        replace(p, chosen=min(p.chosen, p.rejected, key=len), rejected=max(p.chosen, p.rejected, key=len)) for p in few
    ]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def trained(request: pytest.FixtureRequest, train_case: Callable[[tuple[str, str]], Trained]) -> Trained:
    return train_case(request.param)


def train_once(recipe: str, tune: str, few: list[Preference], backbone: Path, out: Path) -> Trained:
    """Train through the product's own door, looking at the system around every stage."""
    config = resolve(
        {
            "recipe": recipe,
            "tune": tune,
            "backbone": str(backbone),
            "pooling": "mean",  # a random pooler says the same of every text
            "out": str(out),
            "data": {"max_length": 96},
            "train": {
                "epochs": NUM_STEPS,
                "batch_size": 8,
                "learning_rate": LEARNING_RATES[tune],
                "weight_decay": 0.0,  # so that what moves was moved by a gradient
                "schedule": "constant",
                "device": "cpu",
            },
        }
    )
    moves: list[Move] = []
    fit_stage = Work._fit_stage

    def watched(work: Work, stage: Stage, *args: Any) -> dict[str, Any]:
        encoded = encode_pairs(work.encoder, few, work.domains, on_long="drop")
        batch = pair_batch(encoded.pairs, work.encoder.pad_id)
        before = tensors_of(work.system), judged_by_each(work.system, batch)
        report = fit_stage(work, stage, *args)
        after = tensors_of(work.system), judged_by_each(work.system, batch)
        moves.append(Move(stage, (before[0], after[0]), (before[1], after[1]), names_to_move(work.system, stage)))
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "_fit_stage", watched)
        run = train_on(config, Pairs(few, []))
    return Trained(run, load(run, device="cpu"), few, moves)


def tensors_of(system: System) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in system.state_dict().items()}


def names_to_move(system: System, stage: Stage) -> set[str]:
    """Under every name that they have: modules may be shared."""
    mine = {id(p) for p in stage.learn}
    if stage.standardize is not None:
        mine |= {id(b) for b in stage.standardize.buffers()}
    return {k for k, v in system.state_dict(keep_vars=True).items() if id(v) in mine}


@torch.no_grad()
def judged_by_each(system: System, batch: Batch) -> Tensor | None:
    """`reward_NE` of every expert, each in a forward of its own; None where a recipe has no expert per domain."""
    if not isinstance(system, RoutedSystem):
        return None
    was_training = system.training
    system.eval()
    alone = [system.judge(batch, torch.full((len(batch), 1), e)) for e in range(len(system.domains))]
    system.train(was_training)
    return torch.cat(alone, dim=1)


def batch_of(scorer: Scorer, preferences: Sequence[Preference]) -> Batch:
    encoded = encode_pairs(scorer.encoder, preferences, scorer.domains, on_long="drop")
    return pair_batch(encoded.pairs, scorer.encoder.pad_id)


def conversations_of(scorer: Scorer, items: Sequence[Conversation]) -> Batch:
    return conversation_batch(
        [scorer.encoder.conversation(item) for item in items], [-1] * len(items), scorer.encoder.pad_id
    )


def standardizers(system: nn.Module) -> list[Standardize]:
    return [m for m in system.modules() if isinstance(m, Standardize)]


@contextmanager
def raw_rewards(system: nn.Module) -> Iterator[None]:
    """Without any expert's zero and unit: the unit of tiny random models is far below 1, and would blow up rounding."""
    kept = [(s, s.mean.clone(), s.std.clone()) for s in standardizers(system)]
    for one, _, _ in kept:
        one.reset()
    try:
        yield
    finally:
        for one, mean, std in kept:
            one.mean.copy_(mean)
            one.std.copy_(std)


def sides(preferences: Sequence[Preference]) -> list[Conversation]:
    return [side(p, which) for p in preferences for which in ("chosen", "rejected")]


def judged(preferences: Sequence[Preference], scorer: Scorer, sign: float = 1.0) -> tuple[list[RoutedReward], ...]:
    """Rewards of chosen and of rejected, as the evaluation wants them; `sign` -1 negates the system."""
    rewards = [RoutedReward(reward=sign * r.reward) for r in scorer.score(sides(preferences))]
    return rewards[::2], rewards[1::2]


def test_there_are_recipes() -> None:
    assert {"baseline", "base_lora", "more", "rodos", "arliss"} <= {name for name, _ in CASES}


def test_one_finite_reward_per_conversation(trained: Trained) -> None:
    with torch.no_grad():
        output = trained.system(trained.batch)
    assert output.reward_N.shape == (16,)
    assert output.reward_N.dtype == torch.float32
    assert torch.isfinite(output.reward_N).all()
    if output.routing is not None:
        torch.testing.assert_close(output.routing.weights_NK.sum(1), torch.ones(16))


def test_it_fits_a_handful_of_pairs_and_its_negation_gets_none_right(trained: Trained) -> None:
    assert evaluate(trained.few, *judged(trained.few, trained.scorer)).micro.accuracy == 1.0
    assert evaluate(trained.few, *judged(trained.few, trained.scorer, sign=-1.0)).micro.accuracy == 0.0


@settings(max_examples=8)
@given(rows=st.lists(st.integers(0, 15), min_size=1, max_size=10))
def test_a_reward_does_not_depend_on_its_batch_mates(trained: Trained, rows: list[int]) -> None:
    items = sides(trained.few)
    with raw_rewards(trained.system), torch.no_grad():
        together = trained.system(conversations_of(trained.scorer, [items[r] for r in rows])).reward_N
        alone = [trained.system(conversations_of(trained.scorer, [items[r]])).reward_N for r in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=RAW_TOLERANCE, atol=RAW_TOLERANCE)


def test_the_scorer_keeps_the_order_of_its_items(trained: Trained) -> None:
    items = sides(trained.few)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(1)).tolist()
    straight = [r.reward for r in trained.scorer.score(items)]
    shuffled = [r.reward for r in trained.scorer.score([items[i] for i in order])]
    assert shuffled == pytest.approx([straight[i] for i in order], rel=1e-4, abs=1e-4)


RESPONSES = (
    "No.",
    "It is calm.",
    "The capital of France is Paris, and there is more to say of it: it is old and large.",
)


def logits_for(scorer: Scorer, prompt: str, response: str) -> Tensor | None:
    """The router's logits for one conversation in a batch of its own."""
    with torch.no_grad():
        routing = scorer.system(conversations_of(scorer, [Conversation(prompt=prompt, response=response)])).routing
    return None if routing is None else routing.logits_NE[0]


def test_a_router_over_domains_never_sees_the_response(trained: Trained) -> None:
    if not isinstance(trained.system, RoutedSystem):
        pytest.skip("no router over domains")
    logits = [logits_for(trained.scorer, trained.few[0].prompt, response) for response in RESPONSES]
    assert all(torch.equal(one, logits[0]) for one in logits)
    other_prompt = logits_for(trained.scorer, trained.few[-1].prompt, RESPONSES[0])
    assert not torch.equal(other_prompt, logits[0]), "a router that sees nothing would pass the test above"
    batch = trained.batch
    experts_NK = trained.system.route(batch).experts_NK
    assert torch.equal(experts_NK[:8], experts_NK[8:])


def test_more_routes_by_the_prompt_when_told_so(train_case: Callable[[tuple[str, str]], Trained]) -> None:
    scorer, few = train_case(("more", "full")).scorer, train_case(("more", "full")).few
    assert not torch.equal(*(logits_for(scorer, few[0].prompt, r) for r in RESPONSES[:2]))
    system: Any = scorer.system
    told = system.config
    system.config = told.model_copy(update={"gate_on": "prompt"})
    try:
        logits = [logits_for(scorer, few[0].prompt, r) for r in RESPONSES]
    finally:
        system.config = told
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_each_stage_moves_what_it_may_and_nothing_else(trained: Trained) -> None:
    assert trained.moves
    for move in trained.moves:
        before, after = move.tensors
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        assert changed <= move.may_move, f"{move.stage.name} moved {sorted(changed - move.may_move)[:5]}"
        matrices = {k for k in move.may_move if before[k].dim() > 1}
        assert matrices <= changed, f"{move.stage.name} left {sorted(matrices - changed)[:5]} where it was"


def trunk_names(system: System) -> set[str]:
    """The transformers' own tensors, adapters not included, under every name that they have."""
    return {
        f"{path}.{name}"
        for path, module in system.named_modules(remove_duplicate=False)
        if isinstance(module, Backbone)
        for name in module.state_dict()
        if name.startswith("model.")
    }


def test_the_transformer_itself_moves_only_under_full_tuning(trained: Trained) -> None:
    names = trunk_names(trained.system)
    first, last = trained.moves[0].tensors[0], trained.moves[-1].tensors[1]
    assert names <= first.keys()
    moved = {k for k in names if not torch.equal(first[k], last[k])}
    assert bool(moved) == (trained.system.config.tune == "full")


def test_every_parameter_above_the_transformer_is_learned_by_some_stage(trained: Trained) -> None:
    learned = set().union(*(move.may_move for move in trained.moves))
    above = {k for k, _ in trained.system.named_parameters(remove_duplicate=False)} - trunk_names(trained.system)
    assert above
    assert above <= learned


def test_no_stage_touches_the_rewards_of_an_expert_that_is_not_its_own(trained: Trained) -> None:
    if not isinstance(trained.system, RoutedSystem):
        pytest.skip("no expert per domain")
    for number, move in enumerate(trained.moves):
        before_NE, after_NE = move.judged
        assert before_NE is not None
        assert after_NE is not None
        changed = [e for e in range(before_NE.shape[1]) if not torch.equal(before_NE[:, e], after_NE[:, e])]
        assert changed == ([number] if number < len(trained.system.domains) else [])


def test_standardised_rewards_have_zero_mean_and_unit_spread_over_their_own_pairs(trained: Trained) -> None:
    for move in trained.moves:
        if move.stage.standardize is None:
            continue
        batch = batch_of(trained.scorer, [p for p in trained.few if move.stage.select(p)])
        move.stage.module.eval()
        with torch.no_grad():
            reward_N = move.stage.module(batch).reward_N.double()
        assert float(reward_N.mean()) == pytest.approx(0.0, abs=1e-3)
        assert float(reward_N.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_pair_accuracy_is_the_same_without_standardisation(trained: Trained) -> None:
    with torch.no_grad():
        output = trained.system(trained.batch)
        if len(standardizers(trained.system)) > 1 and output.routing.experts_NK.shape[1] > 1:
            pytest.skip("several standardised experts are mixed: another zero and unit is another mixture")
        with raw_rewards(trained.system):
            raw = trained.system(trained.batch)
    assert torch.equal(raw.chosen_B > raw.rejected_B, output.chosen_B > output.rejected_B)
    assert not torch.equal(raw.reward_N, output.reward_N)


FRESH = """
import json, sys
from moreward.scoring import load
runs, items = json.load(sys.stdin)
json.dump([[r.reward for r in load(run, device="cpu").score(items)] for run in runs], sys.stdout)
"""


def test_every_saved_run_gives_the_same_rewards_in_a_fresh_process(
    train_case: Callable[[tuple[str, str]], Trained],
) -> None:
    all_trained = [train_case(case) for case in CASES]
    items = [{"prompt": c.prompt, "response": c.response} for c in sides(all_trained[0].few)]
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps([[str(t.run) for t in all_trained], items]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert fresh.returncode == 0, fresh.stderr
    for case, trained, rewards in zip(CASES, all_trained, json.loads(fresh.stdout), strict=True):
        assert rewards == [r.reward for r in trained.scorer.score(items)], case


def test_a_saved_tensor_that_is_missing_or_of_another_shape_is_refused_by_name(trained: Trained) -> None:
    system, _, _ = read_model(trained.run)
    tensors = {k: v.clone() for k, v in system.saved_tensors().items()}
    name = max(tensors)
    missing = {k: v for k, v in tensors.items() if k != name}
    assert system.load_tensors(missing) == [f"tensor {name!r} is missing"]
    assert system.load_tensors({**tensors, "foreign": torch.zeros(1)}) == ["tensor 'foreign' is not of this system"]
    (fault,) = system.load_tensors({**tensors, name: torch.zeros(7, 7, 7)})
    assert name in fault
    assert system.load_tensors(tensors) == []
