"""Members of an ensemble and objectives of ArmoRM come and go; those that stay do not move by a bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moreward.cli import app
from moreward.data.synthetic import generate
from moreward.errors import ConfigError
from moreward.growth.change import Change, extend, remove_expert, replace_expert
from moreward.growth.history import history
from moreward.scoring import load
from moreward.train.ensemble import ensemble
from moreward.train.runner import train
from moreward.types import Preference
from trained import card, given, trained, weights, write_pairs

Tiny = Callable[[str], Path]
RATED = ("brevity", "warmth", "imagery")


def same_but_for(run: Path, made: Change, names: Sequence[str]) -> None:
    """Every tensor under one of `names` is in both, to the bit; and so is what each says of the golden texts."""
    assert made.golden_difference == 0.0
    assert made.num_golden == len(names) * len(card(run)["golden"]) > 0
    old, new = weights(run), weights(made.run)
    for name in names:
        mine = [k for k in old if f".{name}." in k]
        assert mine
        assert all(torch.equal(old[k], new[k]) for k in mine), name


# ---------------------------------------------------------------- ensembles


@pytest.mark.parametrize("tune", ["lora", "frozen", "full"])
def test_a_member_is_added_replaced_and_removed(
    tune: str, tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    run = trained(tmp_path / "runs", tiny_backbone, pairs, "ensemble", "bert", f"tune={tune}", "system.num_members=2")
    data = write_pairs(tmp_path / "new.jsonl", pairs[10:])
    more = extend(run, "third", [str(data)], out=tmp_path / "more")
    same_but_for(run, more, ["member-0", "member-1"])
    other = replace_expert(more.run, "member-0", [str(data)], out=tmp_path / "other")
    same_but_for(more.run, other, ["member-1", "third"])
    less = remove_expert(other.run, "member-1", out=tmp_path / "less")
    same_but_for(other.run, less, ["member-0", "third"])
    assert [s["stage"] for s in card(more.run)["stages"]] == ["third"]
    assert [s["stage"] for s in card(other.run)["stages"]] == ["member-0"]
    assert card(less.run)["stages"] == []
    was, now = weights(more.run), weights(other.run)
    assert any(not torch.equal(was[k], now[k]) for k in was if ".member-0." in k)
    assert not any(".member-1." in k for k in weights(less.run))
    item = ("In the short style, tell me about maps.", "It is calm.")
    reward = load(less.run).score([item], explain=True)[0]
    assert set(reward.expert_rewards) == {"member-0", "third"}
    assert reward.reward == pytest.approx(sum(reward.expert_rewards.values()) / 2, abs=1e-5)
    told = [one.change for one in history(less.run)]
    assert told == ["trained", "extend third", "replace member-0", "remove member-1"]
    assert load(less.run).check_golden() == 0.0


def test_what_an_ensemble_cannot_do_is_refused(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    words = ("tune=frozen", "system.num_members=2")
    run = trained(tmp_path / "runs", tiny_backbone, pairs, "ensemble", "bert", *words)
    data = str(write_pairs(tmp_path / "new.jsonl", pairs[:8]))
    with pytest.raises(ConfigError, match=r"member 'member-0' exists\. The run has: member-0, member-1"):
        extend(run, "member-0", [data], out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"member 'x' does not exist\. The run has: member-0, member-1"):
        remove_expert(run, "x", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="would be alone"):
        remove_expert(run, "member-0", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="of small letters, digits"):
        extend(run, "Not a name", [data], out=tmp_path / "out")
    with pytest.raises(ConfigError, match="--old-data: nothing of an ensemble is refitted"):
        extend(run, "third", [data], old_data=[data], out=tmp_path / "out")
    single = trained(tmp_path / "single", tiny_backbone, pairs, "baseline", "bert", "tune=frozen")
    made = ensemble([run, single], pairs[:8], out=tmp_path / "of-runs")
    with pytest.raises(ConfigError, match="made again from others of them: moreward ensemble"):
        extend(made.run, "third", [data], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- ArmoRM


def test_objectives_that_are_domains_come_go_and_are_given_anew(
    tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = ("system.gate_width=16", "system.debias=length")
    run = train(given("armorm", tiny_backbone("bert"), data, tmp_path / "run", *words))
    asking = [
        replace(
            p, prompt=f"Question? {p.prompt}", chosen=p.chosen.replace(".", "?"), rejected=p.chosen, domain="asking"
        )
        for p in pairs[:16]
    ]
    new = write_pairs(tmp_path / "asking.jsonl", asking)
    turned = write_pairs(
        tmp_path / "turned.jsonl",
        [replace(p.swapped(), prompt=f"Once more: {p.prompt}") for p in pairs if p.domain == "short"],
    )
    more = extend(run, "asking", [str(new)], out=tmp_path / "more")
    same_but_for(run, more, ["long", "short"])
    assert [s["stage"] for s in card(more.run)["stages"]] == ["objective/asking", "debias", "gate"]
    other = replace_expert(more.run, "short", [str(turned)], out=tmp_path / "other")
    same_but_for(more.run, other, ["long", "asking"])
    assert not torch.equal(*(weights(r)["probes.probes.short.weight"] for r in (more.run, other.run)))
    less = remove_expert(other.run, "long", out=tmp_path / "less")
    same_but_for(other.run, less, ["short", "asking"])
    reward = load(less.run).score([("A prompt.", "An answer.")], explain=True)[0]
    assert set(reward.expert_rewards) == {"short", "asking"}
    assert sum(reward.parts.values()) == pytest.approx(reward.reward, abs=1e-5)


def test_objectives_that_are_rated_come_and_go(tiny_backbone: Tiny, tmp_path: Path) -> None:
    some = generate(12, domains=("support", "stories"))

    def ratings(path: Path, names: Sequence[str]) -> Path:
        rows = [
            {
                "prompt": pair.prompt,
                "response": getattr(pair, which),
                "ratings": {name: pair.meta[f"capabilities_{which}"][name] for name in names},
                "scale": [0, 3],
            }
            for pair in some
            for which in ("chosen", "rejected")
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    data = write_pairs(tmp_path / "pairs.jsonl", some)
    first = ratings(tmp_path / "first.jsonl", RATED[:2])
    own = (f"data.ratings={first}", "system.gate_width=16", "data.max_length=128", "data.on_long=truncate")
    run = train(given("armorm", tiny_backbone("bert"), data, tmp_path / "run", *own))
    later = ratings(tmp_path / "later.jsonl", RATED[2:])
    more = extend(run, "imagery", [str(later)], out=tmp_path / "more")
    same_but_for(run, more, RATED[:2])
    assert card(more.run)["config"]["system"]["objectives"] == list(RATED)
    assert bool(weights(more.run)["probes.probes.imagery.weight"].any())
    solved = card(more.run)["stages"][0]["solved"]
    assert set(solved) == {"imagery"}, "only what is new is fitted"
    less = remove_expert(more.run, "brevity", out=tmp_path / "less")
    same_but_for(more.run, less, RATED[1:])
    assert [s["stage"] for s in card(less.run)["stages"]] == ["gate"]
    with pytest.raises(ConfigError, match="remove it, then add it"):
        replace_expert(more.run, "warmth", [str(later)], out=tmp_path / "out")
    with pytest.raises(ConfigError, match="not rated in"):
        extend(more.run, "wit", [str(later)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_names_a_member_by_expert(tiny_backbone: Tiny, pairs: Sequence[Preference], tmp_path: Path) -> None:
    words = ("tune=frozen", "system.num_members=2")
    run = trained(tmp_path / "runs", tiny_backbone, pairs, "ensemble", "bert", *words)
    data = write_pairs(tmp_path / "new.jsonl", pairs)
    told = ["extend", str(run), "--expert", "third", "--data", str(data), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "(bit-identical)" in done.output
    assert "change, paired" in done.output
