"""DMoERM with capability points: three phases per task, on tiny backbones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from statistics import pstdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moreward.config import deviations, resolve
from moreward.data.batches import Encoder, encode_pairs, pair_batch, side
from moreward.data.formats import convert
from moreward.errors import ConfigError, DataError
from moreward.evals.accuracy import evaluate
from moreward.growth.change import extend, remove_expert, replace_expert
from moreward.nn.backbone import Backbone, load_tokenizer
from moreward.nn.losses import PairwiseLoss
from moreward.scoring import Scorer, load
from moreward.systems.dmoerm import BASELINE, DmoermConfig, Recipe
from moreward.train.runner import Pairs, Work, train, train_on
from moreward.types import Preference, RoutedReward
from train.test_together import Watched, fit_of
from trained import card, given, weights, write_pairs

DOMAINS = ("long", "short")
POINTS = ("size", "tone")
RATES = {"full": 1e-3, "lora": 5e-3, "frozen": 1e-2}


def labelled(pairs: Sequence[Preference], points: Sequence[str] = POINTS) -> list[Preference]:
    """The pairs, and for each of the first prompts of a domain one that judges a point: the second the other way."""
    of_points = [
        replace(p if n % 2 == 0 else p.swapped(), capability=point, id=f"{p.id}/{point}")
        for n, point in enumerate(points)
        for p in pairs
    ]
    return [*pairs, *of_points]


@pytest.fixture(scope="module")
def run_of(
    pairs: Sequence[Preference], tiny_backbone: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, list[Any]]]:
    made: dict[Any, tuple[Path, list[Any]]] = {}

    def get(tune: str, **system: Any) -> tuple[Path, list[Any]]:
        key = (tune, *sorted(system.items()))
        if key not in made:
            made[key] = train_watched(
                labelled(pairs), tiny_backbone("bert"), tmp_path_factory.mktemp(tune), tune, system
            )
        return made[key]

    return get


def train_watched(pairs: list[Preference], backbone: Path, out: Path, tune: str, system: dict[str, Any]):
    """A short run, with what each stage found, was given and moved."""
    config = resolve(
        {
            "recipe": "dmoerm",
            "tune": tune,
            "backbone": str(backbone),
            "pooling": "mean",
            "out": str(out / "run"),
            "data": {"max_length": 96},
            "train": {"epochs": 1, "batch_size": 8, "learning_rate": RATES[tune], "device": "cpu"},
            "system": {"fusion_learning_rate": 1e-2, "rank": 4, **system},
        }
    )
    seen, fit_stage = [], Work._fit_stage

    def watched(work: Work, stage, *args):
        before = {k: v.clone() for k, v in work.system.state_dict().items()}
        report = fit_stage(work, stage, *args)
        after = work.system.state_dict()
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        mine = {id(p) for p in (*stage.learn, *stage.keep)}
        for one in (stage.standardize, *stage.standardizers):
            mine |= {id(b) for b in one.buffers()} if one is not None else set()
        may = {k for k, v in work.system.state_dict(keep_vars=True).items() if id(v) in mine}
        chosen = [p.preference for p in work.train.pairs if stage.select(p.preference)]
        seen.append((stage.name, moved, may, chosen))
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "_fit_stage", watched)
        return train_on(config, Pairs(pairs, [])), seen


CASES = [("full", {}), ("frozen", {}), ("lora", {"fuse": "rewards"}), ("lora", {"train_together": True})]


@pytest.mark.parametrize(("tune", "system"), CASES)
def test_three_phases_each_move_what_they_may_and_see_what_is_theirs(tune, system, run_of) -> None:
    _, seen = run_of(tune, **system)
    inner = lambda d: [f"expert/{d}", f"point/{d}--size", f"point/{d}--tone", f"fusion/{d}"]  # noqa: E731
    names = [*inner("long"), *inner("short"), "router"]
    if system.get("train_together"):
        names = ["expert/long", "expert/short", "points", "fusion/long", "fusion/short", "router"]
    assert [name for name, *_ in seen] == names
    chosen_by = {name: chosen for name, _, _, chosen in seen}
    for name, moved, may, chosen in seen:
        assert moved, name
        assert moved <= may, (name, sorted(moved - may)[:3])
        if name.startswith(("expert", "point/")):
            assert any(f".heads.{name.partition('/')[2]}.layers." in k for k in moved), name
        assert chosen, name
        assert all(bool(p.capability) == name.startswith("point") for p in chosen), name
    for domain in DOMAINS:
        first, third = chosen_by[f"expert/{domain}"], chosen_by[f"fusion/{domain}"]
        assert (len(first), len(third)) == (12, 8), "60 and 40 % of 20 pairs, of two to a prompt"
        assert {p.prompt for p in first}.isdisjoint(p.prompt for p in third)


@pytest.mark.parametrize(("tune", "system"), CASES)
def test_an_explanation_sums_to_the_reward_and_names_every_point(tune, system, run_of, pairs) -> None:
    scorer = load(run_of(tune, **system)[0], device="cpu")
    items = [side(p, "chosen") for p in pairs[::8]]
    plain, explained = scorer.score(items), scorer.score(items, explain=True)
    for reward, alone in zip(explained, plain, strict=True):
        assert reward.expert in DOMAINS
        assert set(reward.expert_rewards) == set(DOMAINS)
        assert list(reward.parts) == [*POINTS, BASELINE]
        assert sum(reward.parts.values()) == pytest.approx(reward.reward, abs=1e-9)
        assert list(reward.part_rewards) == list(POINTS)
        assert reward.reward == pytest.approx(alone.reward, abs=1e-3)
        assert (alone.parts, alone.part_rewards) == ({}, {})
    for task in {r.expert for r in explained}:
        baselines = [r.parts[BASELINE] for r in explained if r.expert == task]
        assert baselines == pytest.approx([baselines[0]] * len(baselines), abs=2e-3), "it does not depend on the text"


def test_what_caution_takes_off_is_in_no_part_and_parts_are_told_only_when_asked_for(run_of, pairs) -> None:
    scorer = load(run_of("frozen")[0], device="cpu", conservative=0.5)
    item = side(pairs[0], "chosen")
    (plain,), (told,) = scorer.score([item]), scorer.score([item], explain=True)
    assert (plain.parts, plain.part_rewards, plain.expert_rewards) == ({}, {}, {})
    taken_off = 0.5 * pstdev(told.expert_rewards.values())
    assert taken_off > 0.01
    assert sum(told.parts.values()) == pytest.approx(told.reward + taken_off, abs=1e-6)


@pytest.mark.parametrize(("tune", "system"), CASES)
def test_rewards_do_not_depend_on_batch_mates_and_oracle_and_random_routers_work(tune, system, run_of, pairs) -> None:
    scorer = load(run_of(tune, **system)[0], device="cpu")
    items = [replace(side(p, which), domain=p.domain) for p in pairs[::14] for which in ("chosen", "rejected")]
    together = [r.reward for r in scorer.score(items)]
    assert together == pytest.approx([scorer.score([item])[0].reward for item in items], abs=2e-3)
    for item, routed in zip(items, scorer.score_routes(items), strict=True):
        spoken = scorer.score([item], explain=True)[0].expert_rewards
        assert routed.oracle == pytest.approx(spoken[item.domain], abs=2e-3)


def system_of(folder: Path, **settings: Any) -> Recipe:
    torch.manual_seed(0)
    told = {"capabilities": dict.fromkeys(DOMAINS, POINTS), "rank": 4, "dropout": 0.0, **settings}
    system = Recipe(DmoermConfig(**told), Backbone.load(str(folder)), DOMAINS)
    for backbone in system.backbones():
        backbone.without_dropout()
    return system


def test_capability_experts_start_as_their_tasks_model(tiny_backbone, pairs) -> None:
    for tune in ("full", "lora", "frozen"):
        system = system_of(tiny_backbone("bert"), tune=tune).eval()
        encoder = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 96)
        batch = pair_batch(encode_pairs(encoder, pairs[:4], DOMAINS, on_long="drop").pairs, 0)
        with torch.no_grad():
            for parameter in (*system.expert_parameters("long"), *system.expert_parameters("short")):
                parameter.add_(torch.randn_like(parameter) * 0.05)  # as after phase 1
            system._start(*system.points)
            said = [system.members(batch, torch.full((8,), e)) for e in range(6)]
        for expert, task in ((2, 0), (3, 0), (4, 1), (5, 1)):
            torch.testing.assert_close(said[expert], said[task])
        assert not torch.allclose(said[0], said[1])


def test_all_experts_of_all_rows_run_in_one_pass(tiny_backbone, pairs) -> None:
    system = system_of(tiny_backbone("bert")).eval()
    encoder = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 96)
    batch = pair_batch(encode_pairs(encoder, pairs[:3], DOMAINS, on_long="drop").pairs, 0)
    backbone, calls = system.backbones()[0], []
    backbone.register_forward_hook(lambda _m, given, _out: calls.append(given[2].tolist()))
    system.routed.experts(batch, torch.tensor([0, 1, 0, 1, 1, 0]))
    assert calls == [[2, 3, 4, 5, 2, 3, 4, 5, 4, 5, 2, 3]]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_training_points_together_gives_each_the_gradient_of_training_it_alone(tune, tiny_backbone, pairs, tmp_path):
    encoder = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 128)
    some = [p for p in labelled(pairs) if p.capability]
    some = [p for n, p in enumerate(some) if n % 7 in (0, 1, 4)]  # not the same number of each
    rows = encode_pairs(encoder, some, DOMAINS, on_long="truncate").pairs
    settings = {"max_grad_norm": 0.05, "accumulate": 2}

    def stages(together: bool) -> tuple[Recipe, list[Any]]:
        system = system_of(tiny_backbone("bert"), tune=tune, train_together=together)
        for backbone in (b for b in system.backbones() if b.bank is not None):
            for name in backbone.bank.names:
                for matrix in backbone.bank.adapters[name].B.values():
                    torch.nn.init.normal_(matrix, std=0.05)
        assert system.meet([*pairs, *some]) == []
        return system, [s for s in system.stages(PairwiseLoss()) if s.name.startswith("point")]

    system, (stage,) = stages(together=True)
    joint: Watched = fit_of(system, stage, rows, tmp_path / "together", **settings)
    for number in range(4):
        system, alone_stages = stages(together=False)
        stage = alone_stages[number]
        mine = [row for row in rows if stage.select(row.preference)]
        alone = fit_of(system, stage, mine, tmp_path / f"{number}", **settings)
        assert alone.raw
        largest = max(float(g.abs().max()) for g in alone.raw.values())
        for kind in ("raw", "clipped"):
            for name, grad in getattr(alone, kind).items():
                assert float((getattr(joint, kind)[name] - grad).abs().max()) <= 5e-5 * largest, name
        assert alone.raw.keys() < joint.raw.keys()


def test_experts_stand_still_while_the_fusion_learns(tiny_backbone, pairs) -> None:
    system = system_of(tiny_backbone("bert"), dropout=0.5)
    system.meet(labelled(pairs))
    stage = next(s for s in system.stages(PairwiseLoss()) if s.name == "fusion/long")
    stage.module.train()
    assert stage.module.training
    assert system.routed.experts.fusions["long"].training
    assert not any(module.training for module in system.members.modules())
    system.train()
    assert all(module.training for module in system.members.modules()), "the next stage has its dropout"


def test_capability_experts_that_are_adapters_are_peft_directories(run_of) -> None:
    folder = run_of("lora", fuse="rewards")[0] / "model" / "experts"
    assert {d.name for d in folder.iterdir()} == {*DOMAINS, *(f"{d}--{p}" for d in DOMAINS for p in POINTS)}
    assert not (run_of("full")[0] / "model" / "experts").exists()


def test_a_task_is_added_with_its_points_and_the_old_ones_do_not_move(tmp_path, run_of, pairs) -> None:
    old = write_pairs(tmp_path / "old.jsonl", labelled(pairs))
    asking = [replace(p, domain="asking", prompt=f"May I ask: {p.prompt}") for p in pairs[:20]]
    new = write_pairs(tmp_path / "new.jsonl", labelled(asking, ["courtesy"]))
    run, _ = run_of("lora", fuse="rewards")
    grown = extend(run, "asking", [str(new)], old_data=[str(old)], out=tmp_path / "grown")
    assert not any(p.capability for p in (*grown.old_val, *grown.new_val))
    assert grown.new_val
    assert grown.golden_difference == 0.0
    assert card(grown.run)["config"]["system"]["capabilities"] == {
        "asking": ["courtesy"],
        **{d: list(POINTS) for d in DOMAINS},
    }
    reward = load(grown.run, device="cpu").score([side(asking[0], "chosen")], explain=True)[0]
    assert set(reward.expert_rewards) == {*DOMAINS, "asking"}


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_task_is_replaced_with_other_points_or_removed_and_the_others_do_not_move(
    tune, tmp_path, run_of, pairs
) -> None:
    old = write_pairs(tmp_path / "old.jsonl", labelled(pairs))
    asking = [replace(p, domain="asking", prompt=f"May I ask: {p.prompt}") for p in pairs[:20]]
    new = write_pairs(tmp_path / "new.jsonl", labelled(asking, ["courtesy"]))
    run, _ = run_of(tune, fuse="rewards")
    grown = extend(run, "asking", [str(new)], old_data=[str(old)], out=tmp_path / "grown")
    # From here on the old pairs are not at hand: the run was trained on pairs in memory.
    other = write_pairs(tmp_path / "other.jsonl", labelled(asking, ["wit", "rhyme"]))
    made = replace_expert(grown.run, "asking", [str(other)], out=tmp_path / "replaced")
    less = remove_expert(made.run, "long", out=tmp_path / "less")
    for step in (made, less):
        assert step.golden_difference == 0.0
        assert step.num_golden > 0
        assert step.replayed is not None
    points = card(less.run)["config"]["system"]["capabilities"]
    assert points == {"asking": ["rhyme", "wit"], "short": list(POINTS)}
    before, after = weights(grown.run), weights(less.run)
    mine = {k for k in before if ".short." in k or ".short--" in k}
    assert mine
    assert all(torch.equal(before[k], after[k]) for k in mine)
    assert not any(".long." in k or ".long--" in k or "courtesy" in k for k in after)
    reward = load(less.run, device="cpu").score([side(asking[0], "chosen")], expert="asking", explain=True)[0]
    assert set(reward.expert_rewards) == {"asking", "short"}
    assert set(reward.part_rewards) == {"rhyme", "wit"}


@pytest.mark.parametrize(("tune", "fuse"), [("lora", "rewards"), ("frozen", "rewards"), ("full", "states")])
def test_a_point_comes_is_given_anew_and_goes_and_no_other_moves(tune, fuse, tmp_path, pairs, tiny_backbone) -> None:
    data = write_pairs(tmp_path / "old.jsonl", labelled(pairs))
    words = (f"tune={tune}", f"system.fuse={fuse}", "system.rank=4", "data.max_length=96", "pooling=mean")
    run = train(given("dmoerm", tiny_backbone("bert"), data, tmp_path / "run", *words))
    rows = [p for p in pairs if p.domain == "short"]
    wit = write_pairs(tmp_path / "wit.jsonl", [replace(p, capability="wit", id=f"{p.id}/wit") for p in rows])
    tone = write_pairs(tmp_path / "tone.jsonl", [replace(p.swapped(), id=f"{p.id}/turned") for p in rows])
    more = extend(run, "short/wit", [str(wit)], out=tmp_path / "more")
    other = replace_expert(more.run, "short/tone", [str(tone)], out=tmp_path / "other")
    less = remove_expert(other.run, "short/size", out=tmp_path / "less")
    trained_then = [[s["stage"] for s in card(made.run)["stages"]] for made in (more, other, less)]
    assert trained_then == [
        ["point/short--wit", "fusion/short"],
        ["point/short--tone", "fusion/short"],
        ["fusion/short"],
    ]
    golden = len(card(run)["golden"])
    stay = [  # the other task and its points, and the points of the task
        ["long", "long/size", "long/tone", "short/size", "short/tone"],
        ["long", "long/size", "long/tone", "short/size", "short/wit"],
        ["long", "long/size", "long/tone", "short/tone", "short/wit"],
    ]
    assert [(made.golden_difference, made.num_golden) for made in (more, other, less)] == [
        (0.0, len(names) * golden) for names in stay
    ]
    assert card(less.run)["config"]["system"]["capabilities"]["short"] == ["tone", "wit"]
    old, new = weights(more.run), weights(other.run)
    assert any(not torch.equal(old[k], new[k]) for k in old if ".short--tone." in k)
    reward = load(less.run, device="cpu").score([side(rows[0], "chosen")], expert="short", explain=True)[0]
    assert set(reward.part_rewards) == {"tone", "wit"}
    with pytest.raises(ConfigError, match="capability 'short/size' does not exist"):
        remove_expert(less.run, "short/size", out=tmp_path / "none")
    with pytest.raises(ConfigError, match="--data judges size, tone"):
        extend(run, "short/wit", [str(data)], out=tmp_path / "none")
    last = remove_expert(less.run, "short/tone", out=tmp_path / "last")
    with pytest.raises(ConfigError, match="has no other point than 'wit'"):
        remove_expert(last.run, "short/wit", out=tmp_path / "none")


def test_a_run_killed_between_phases_goes_on_and_ends_with_the_same_bits(
    run_of, pairs, tiny_backbone, tmp_path
) -> None:
    whole, seen = run_of("frozen")
    left, fit_stage = [name for name, *_ in seen][:3], Work._fit_stage

    def cut(work: Work, stage, *args):
        if not left:
            raise KeyboardInterrupt
        assert stage.name == left.pop(0)
        return fit_stage(work, stage, *args)

    config = resolve({**card(whole)["config"], "out": str(tmp_path / "run")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "_fit_stage", cut)
        with pytest.raises(KeyboardInterrupt):
            train_on(config, Pairs(labelled(pairs), []))
    again = train_on(config, Pairs(labelled(pairs), []))
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize(("tune", "system"), CASES)
def test_a_saved_run_gives_the_rewards_that_it_gave_when_it_was_trained(tune, system, run_of) -> None:
    assert load(run_of(tune, **system)[0], device="cpu").check_golden() == 0.0


def test_every_task_starts_from_the_pretrained_tensors(tiny_backbone) -> None:
    stored = load_file(tiny_backbone("bert") / "model.safetensors")
    for backbone in system_of(tiny_backbone("bert"), tune="full").backbones():
        tensors = backbone.model.state_dict()
        assert len(backbone.pretrained) > 20
        for name in backbone.pretrained:
            assert torch.equal(tensors[name], stored.get(name, stored.get(f"bert.{name}"))), name


def test_names_and_starts_of_adapters_do_not_depend_on_the_order_of_points(tiny_backbone) -> None:
    for tune in ("full", "lora"):
        orders = [dict.fromkeys(DOMAINS, points) for points in (POINTS, POINTS[::-1])]
        first, second = (system_of(tiny_backbone("bert"), tune=tune, capabilities=one).state_dict() for one in orders)
        assert first.keys() == second.keys()
        adapters = [name for name in first if "--" in name and "heads" not in name]
        assert adapters
        assert all(torch.equal(first[name], second[name]) for name in adapters)


def test_rows_of_the_router_of_tasks_and_of_points_in_one_forward_equal_them_apart(tiny_backbone, pairs) -> None:
    system = system_of(tiny_backbone("bert")).eval()
    (backbone,) = system.backbones()
    for adapter in backbone.bank.adapters.values():
        for matrix in adapter.B.values():
            torch.nn.init.normal_(matrix, std=0.05)
    encoder = Encoder(load_tokenizer(str(tiny_backbone("bert"))), 96)
    batch = pair_batch(encode_pairs(encoder, pairs[:3], DOMAINS, on_long="drop").pairs, 0)
    member_N = torch.arange(6)  # two tasks, four points
    prompts = (batch.prompt_ids_PT, batch.prompt_mask_PT)
    missing = batch.ids_NT.shape[1] - prompts[0].shape[1]
    wide = [torch.nn.functional.pad(one, (0, missing)) for one in prompts]
    router_P = torch.full((len(prompts[0]),), system.routed.router.adapter)

    both = [torch.cat(one) for one in zip(wide, (batch.ids_NT, batch.mask_NT), strict=True)]
    together = backbone(*both, torch.cat([router_P, member_N]))
    apart = torch.cat([backbone(*prompts, router_P), system.members.read(batch, member_N)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    weight = torch.randn(apart.shape, generator=torch.Generator().manual_seed(1))
    learned = list(backbone.bank.parameters())
    grads = [torch.autograd.grad((one * weight).sum(), learned) for one in (together, apart)]
    for name, a, b in zip(dict(backbone.bank.named_parameters()), *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert all(float(g.abs().max()) > 0 for g in grads[0])


def test_points_are_those_configured_and_else_those_of_the_data(pairs) -> None:
    rows = labelled(pairs)
    assert Recipe.settle(DmoermConfig(), rows).capabilities == dict.fromkeys(DOMAINS, POINTS)
    told = DmoermConfig(points={"long": {"tone": "How it sounds."}})
    assert Recipe.settle(told, rows).capabilities == {"long": ("tone",), "short": POINTS}
    assert (
        len(Recipe.settle(DmoermConfig(points="dmoerm"), [replace(pairs[0], domain="chat")]).capabilities["chat"]) == 5
    )
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        Recipe.settle(DmoermConfig(points="gone.yaml"), rows)


def test_what_the_points_lack_is_all_told_before_training(tiny_backbone, pairs) -> None:
    system = system_of(tiny_backbone("bert"), capabilities={"long": (*POINTS, "wit"), "short": ("size",)})
    whole = [p for p in pairs if p.domain == "long"][:1]
    of_points = [p for p in labelled(pairs) if p.capability]
    remarks = system.meet([*whole, *of_points])
    assert remarks == ["short: 20 pairs not used: tone is none of its points"]
    with pytest.raises(DataError) as told:
        system.stages(PairwiseLoss())
    assert "domain long: no pair judges its point wit" in str(told.value)
    assert "domain long: no pair of the whole response is left" in str(told.value)
    assert "domain short: no pair of the whole response is left" in str(told.value)


@pytest.mark.parametrize("share", [0.6, 0.25])
def test_phases_1_and_3_share_a_tasks_prompts_in_the_named_fractions(share, tiny_backbone, pairs) -> None:
    many = [
        replace(p, prompt=f"{n} {p.prompt}", id=f"{n}/{p.id}")
        for n in range(5)
        for p in pairs
        for _ in range(1 + n % 3)
    ]
    system = system_of(tiny_backbone("bert"), task_share=share)
    system.meet([*many, *(p for p in labelled(pairs) if p.capability)])
    for domain in DOMAINS:
        shares, mine = system.shares[domain], [p for p in many if p.domain == domain]
        largest = 6  # pairs of one prompt
        assert len(shares.first) + len(shares.third) == len({id(p) for p in mine})
        assert abs(len(shares.first) - share * len(mine)) <= largest
        prompts = [{p.prompt for p in one.values()} for one in (shares.first, shares.third)]
        assert prompts[0].isdisjoint(prompts[1])


def test_a_ranked_row_becomes_all_its_pairs_with_rank_1_best_and_ties_skipped() -> None:
    said = {"a": 2, "b": 1, "c": 2, "d": 3}
    completions = [{"rank": r, "completion": [{"role": "assistant", "content": c}]} for c, r in said.items()]
    row = {"context": [{"role": "user", "content": "Q"}], "completions": completions, "capability": "tone"}
    made = convert(row)
    assert words_of(made) == {("b", "a"), ("b", "c"), ("b", "d"), ("a", "d"), ("c", "d")}
    assert {p.capability for p in made} == {"tone"}
    for order in permutations(completions):
        assert words_of(convert({**row, "completions": list(order)})) == words_of(made)


def test_the_negated_rank_gets_every_pair_of_a_ranked_row_right_and_the_rank_none() -> None:
    completions = [{"rank": r, "completion": [{"role": "assistant", "content": str(r)}]} for r in (3, 1, 2, 2)]
    made = [
        replace(p, domain="d")
        for p in convert({"context": [{"role": "user", "content": "Q"}], "completions": completions})
    ]
    for sign, accuracy in ((-1.0, 1.0), (1.0, 0.0)):
        chosen, rejected = (
            [RoutedReward(reward=sign * float(words[side])) for words in map(words_in, made)] for side in (0, 1)
        )
        measures = evaluate(made, chosen, rejected).micro
        assert (measures.accuracy, measures.num_pairs) == (accuracy, 5)


def words_in(preference: Preference) -> tuple[str, str]:
    return preference.chosen[-1]["content"], preference.rejected[-1]["content"]


def words_of(preferences: Sequence[Preference]) -> set[tuple[str, str]]:
    return set(map(words_in, preferences))


def test_equal_states_are_refused_and_the_papers_settings_hold() -> None:
    with pytest.raises(ConfigError, match="fuse=states on a frozen backbone needs head=mlp"):
        resolve({"recipe": "dmoerm", "tune": "frozen", "system": {"head": "linear"}})
    paper = resolve({"recipe": "dmoerm", "preset": "paper"})
    told = paper.system
    assert (told["rank"], told["alpha"], told["dropout"], tuple(told["targets"])) == (
        32,
        32,
        0.05,
        ("q_proj", "v_proj"),
    )
    assert [told[f"{n}_learning_rate"] for n in ("task", "point", "fusion", "router")] == [1e-7, 5e-5, 1e-6, 1e-5]
    assert deviations(paper) == []


def test_the_papers_shape_has_an_adapter_per_point_on_a_model_per_task(tiny_backbone, pairs) -> None:
    system = system_of(tiny_backbone("qwen2"), tune="full", rank=32, targets=("q_proj", "v_proj"))
    assert len(system.backbones()) == 3, "one a task, and the router's"
    assert all(b.bank.names == [f"{d}--{p}" for p in POINTS] for d, b in zip(DOMAINS, own(system), strict=True))
    assert {n.rsplit(".", 1)[-1] for n in own(system)[0].bank.shapes} == {"q_proj", "v_proj"}
    active = system.num_active_parameters()
    router, task = sum(p.numel() for p in system.routed.router.parameters()), system._task_parameters(0)
    assert active == router + sum(p.numel() for p in task)


def own(system: Recipe) -> list[Any]:
    return list(system.members.backbones.values())


def test_scorer_is_what_evaluation_enters(run_of) -> None:
    scorer: Scorer = load(run_of("lora", fuse="rewards")[0], device="cpu")
    assert scorer.experts == DOMAINS
    assert card(run_of("lora", fuse="rewards")[0])["data"]["remarks"] == []
