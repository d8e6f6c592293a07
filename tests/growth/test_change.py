"""An expert replaced or removed, the line of versions, and the way back: who stays does not move by a bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moreward.cli import app
from moreward.errors import ConfigError, RunError
from moreward.growth.change import Change, extend, plan, remove_expert, replace_expert
from moreward.growth.history import history, roll_back
from moreward.runs import identity, model_folder
from moreward.scoring import load
from moreward.types import Preference
from trained import card, digests, edit_card, trained, weights, write_pairs

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def three(pairs: Sequence[Preference]) -> list[Preference]:
    """A third domain: questions are better than statements."""
    asking = [
        replace(
            p,
            prompt=p.prompt.replace("In the short style", "In a question"),
            chosen=p.chosen.replace("It is", "Is it").replace(".", "?"),
            rejected=p.chosen,
            domain="asking",
            id=f"asking-{i}",
        )
        for i, p in enumerate(pairs[:16])
    ]
    return [*pairs, *asking]


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory, pairs: Sequence[Preference]) -> Path:
    """`short` turned round, about other things."""
    turned = [
        replace(p, prompt=f"Once more: {p.prompt}", chosen=p.rejected, rejected=p.chosen, id=f"turned-{p.id}")
        for p in pairs
        if p.domain == "short"
    ]
    return write_pairs(tmp_path_factory.mktemp("data") / "turned.jsonl", turned)


@pytest.fixture(scope="module")
def run_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny, three: list[Preference]
) -> Callable[[str], Path]:
    """A run of three domains, made once a recipe."""
    known: dict[str, Path] = {}

    def get(recipe: str) -> Path:
        if recipe not in known:
            known[recipe] = trained(tmp_path_factory.mktemp("runs"), tiny_backbone, three, recipe, "bert", "seed=8")
        return known[recipe]

    return get


@pytest.fixture(scope="module")
def changed(
    run_of: Callable[[str], Path], other_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Change]:
    folder = tmp_path_factory.mktemp("changed")
    known: dict[tuple[str, str], Change] = {}

    def get(recipe: str, kind: str) -> Change:
        if (recipe, kind) not in known:
            run, out = run_of(recipe), folder / f"{recipe}-{kind}"
            known[recipe, kind] = (
                replace_expert(run, "short", [str(other_data)], out=out)
                if kind == "replace"
                else remove_expert(run, "short", out=out)
            )
        return known[recipe, kind]

    return get


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [(recipe, kind) for recipe in ("arliss", "rodos", "shared_expert") for kind in ("replace", "remove")],
)
def test_who_stays_does_not_move_by_a_bit(
    recipe: str, kind: str, changed: Callable[[str, str], Change], run_of: Callable[[str], Path]
) -> None:
    run = run_of(recipe)
    before = digests(run)
    made = changed(recipe, kind)
    assert digests(run) == before, "the old run is untouched"
    old, new = load(run), load(made.run)
    left = tuple(d for d in old.experts if kind == "replace" or d != "short")
    assert new.experts == left
    stay = [d for d in left if d != "short"]
    assert (made.golden_difference, made.num_golden) == (0.0, len(stay) * len(card(run)["golden"]))
    items = [(g["prompt"], g["response"]) for g in card(run)["golden"]]
    for name in stay:
        told = [[r.expert_rewards[name] for r in scorer.score(items, explain=True)] for scorer in (old, new)]
        # explained rewards ride in one batch, whose size differs with the number of experts
        assert told[0] == pytest.approx(told[1], abs=2e-3)
    tensors = [weights(run), weights(made.run)]
    for name in stay:
        mine = [k for k in tensors[0] if f".{name}." in k]
        assert mine
        assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in mine)
    of_short = {k for k in tensors[0] if ".short." in k}
    assert of_short
    if kind == "remove":
        assert not of_short & tensors[1].keys()
    else:
        assert any(not torch.equal(tensors[0][k], tensors[1][k]) for k in of_short)


def test_the_replaced_expert_has_learned_the_new_pairs(
    changed: Callable[[str, str], Change], run_of: Callable[[str], Path]
) -> None:
    made = changed("arliss", "replace")
    assert {p.domain for p in made.new_val} == {"short"}
    assert all(p.prompt.startswith("Once more") for p in made.new_val)
    assert "short" not in {p.domain for p in made.old_val}
    old, new = load(run_of("arliss")), load(made.run)

    def margin(scorer: Any) -> float:
        told = [
            [r.number for r in scorer.score([(p.prompt, text) for p in made.new_val], expert="short")]
            for text in ("It is calm.", "People come back to it year after year, and it is calm and bright and old.")
        ]
        return float(sum(told[1]) - sum(told[0]))

    assert margin(old) * margin(new) < 0 or margin(new) > margin(old), "it was turned round"


def test_the_data_of_a_changed_run_is_known_to_the_next_change(
    changed: Callable[[str, str], Change], other_data: Path, tmp_path: Path
) -> None:
    made = changed("arliss", "remove")
    assert set(card(made.run)["data"]["train_pairs"]) == {"long", "asking"}
    back = extend(made.run, "short", [str(other_data)], out=tmp_path / "back")
    assert load(back.run).experts == ("asking", "long", "short")
    assert back.golden_difference == 0.0
    kinds = [(c["kind"], c["domain"]) for c in card(back.run)["changes"]]
    assert kinds == [("remove", "short"), ("extend", "short")]
    told = history(back.run)
    assert [one.change for one in told] == ["trained", "remove short", "extend short"]
    assert [len(one.domains) for one in told] == [3, 2, 3]
    assert not any(one.state for one in told)


# ---------------------------------------------------------------- history and the way back


def test_going_back_gives_the_version_before_byte_for_byte(
    changed: Callable[[str, str], Change], run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = changed("arliss", "replace")
    before = digests(made.run)
    back = roll_back(made.run, tmp_path / "back")
    assert identity(model_folder(back)) == identity(model_folder(run_of("arliss")))
    assert digests(back / "model") == digests(run_of("arliss") / "model")
    assert digests(made.run) == before
    load(back)
    with pytest.raises(RunError, match="exists; name a new folder"):
        roll_back(made.run, back)
    with pytest.raises(RunError, match="there is none before it"):
        roll_back(run_of("arliss"), tmp_path / "none")


def test_a_parent_that_is_gone_or_another_is_told(changed: Callable[[str, str], Change], tmp_path: Path) -> None:
    made = changed("rodos", "remove")
    old = Path(card(made.run)["parent"]["run"])
    child = Path(shutil.copytree(made.run, tmp_path / "child"))
    file = child / "model" / "moreward.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "parent": {**told["parent"], "run": str(tmp_path / "absent")}}))
    assert [one.state for one in history(child)] == ["the folder is gone", ""]
    with pytest.raises(RunError, match="cannot go back to it: the folder is gone"):
        roll_back(child)
    file.write_text(json.dumps({**told, "parent": {"run": str(old), "model": "0" * 64}}))
    assert [one.state for one in history(child)] == ["another model is there now", ""]
    with pytest.raises(RunError, match="another model is there now"):
        roll_back(child)
    # both moved: the parent is found beside its child
    shutil.copytree(old, tmp_path / "absent")
    file.write_text(json.dumps({**told, "parent": {**told["parent"], "run": str(tmp_path / "nowhere" / "absent")}}))
    assert [one.state for one in history(child)] == ["", ""]


# ---------------------------------------------------------------- runs of earlier versions, runs without texts


def test_a_run_extended_by_an_earlier_version_can_be_changed(
    run_of: Callable[[str], Path], other_data: Path, tmp_path: Path, pairs: Sequence[Preference]
) -> None:
    loud = [replace(p, prompt=f"Loud! {p.prompt}", domain="loud", id=f"loud-{p.id}") for p in pairs[:16]]
    data = write_pairs(tmp_path / "loud.jsonl", loud)
    first = extend(run_of("arliss"), "loud", [str(data)], out=tmp_path / "first", changes={"max_steps": 1})

    def as_it_was(told: dict[str, Any]) -> dict[str, Any]:
        [change] = told.pop("changes")
        return {**told, "additions": [{"domain": change["domain"], "data": change["data"]}]}

    shutil.rmtree(first.run / "model" / "calibration", ignore_errors=True)  # it belongs to the old card
    edit_card(first.run, as_it_was)
    assert [one.change for one in history(first.run)] == ["trained", "extend loud"]
    made = remove_expert(first.run, "asking", out=tmp_path / "second", changes={"max_steps": 1})
    assert made.golden_difference == 0
    assert [(c["kind"], c["domain"]) for c in card(made.run)["changes"]] == [("extend", "loud"), ("remove", "asking")]
    assert [one.change for one in history(made.run)] == ["trained", "extend loud", "remove asking"]


def test_without_golden_texts_it_is_said_that_nothing_was_compared(
    run_of: Callable[[str], Path], other_data: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_of("arliss"), tmp_path / "run"))
    shutil.rmtree(run / "model" / "calibration", ignore_errors=True)  # it belongs to the old card
    edit_card(run, lambda told: {**told, "golden": []})
    words = ["--domain", "short", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["remove", str(run), *words])
    assert done.exit_code == 2
    assert "NOTHING WAS COMPARED" in done.output
    assert "data.val" in done.output
    assert "identical" not in done.output
    assert load(tmp_path / "out").experts == ("asking", "long")


# ---------------------------------------------------------------- planned, refused


def test_a_plan_refuses_a_folder_that_holds_a_run(run_of: Callable[[str], Path], changed: Any) -> None:
    taken = changed("arliss", "remove").run
    with pytest.raises(RunError, match="holds a finished run"):
        plan("remove", run_of("arliss"), "short", out=taken)
    done = CliRunner().invoke(
        app, ["remove", str(run_of("arliss")), "--domain", "short", "--dry-run", "--out", str(taken)]
    )
    assert "holds a finished run" in str(done.exception)


def test_a_plan_says_what_would_be_trained_and_writes_nothing(
    run_of: Callable[[str], Path], other_data: Path, tmp_path: Path, changed: Callable[[str, str], Change]
) -> None:
    run = run_of("arliss")
    planned = plan("replace", run, "short", [str(other_data)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = card(changed("arliss", "replace").run)["stages"]
    assert [(s.stage, s.parameters) for s in planned] == [(s["stage"], s["parameters_trained"]) for s in done]
    assert all(0 < s["pairs"] <= p.pairs for s, p in zip(done, planned, strict=True)), "some are longer than allowed"
    assert all(s["steps"] <= p.steps for s, p in zip(done, planned, strict=True))
    assert all(p.seconds is not None and p.seconds > 0 for p in planned)
    assert [s.stage for s in plan("remove", run, "short")] == ["router"]


@pytest.mark.parametrize(
    ("domain", "said"),
    [("loud", "'loud' does not exist. The run has: asking, long, short"), (" ", "--domain: is empty")],
)
def test_a_domain_that_is_not_there_is_refused(
    domain: str, said: str, run_of: Callable[[str], Path], other_data: Path, tmp_path: Path
) -> None:
    for change in (
        lambda: remove_expert(run_of("arliss"), domain, out=tmp_path / "out"),
        lambda: replace_expert(run_of("arliss"), domain, [str(other_data)], out=tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=said):
            change()
    assert not (tmp_path / "out").exists()


def test_the_last_two_experts_stay(changed: Callable[[str, str], Change], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would be alone, and a mixture has two experts or more"):
        remove_expert(changed("arliss", "remove").run, "asking", out=tmp_path / "out")


def test_the_commands(run_of: Callable[[str], Path], other_data: Path, tmp_path: Path) -> None:
    run, out = str(run_of("arliss")), str(tmp_path / "out")

    def said(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == code, done.output
        return done.output

    told = said("remove", run, "--domain", "asking", "--out", out, "--dry-run")
    assert told.startswith("would train router:")
    told = said("replace", run, "--domain", "short", "--data", str(other_data), "--out", out)
    assert "largest change 0 (bit-identical)" in told
    assert "short (replaced)" in told
    assert re.search(r"[+-]\d+\.\d \[-\d+\.\d, \+\d+\.\d\]", told), "the difference has an interval of its own"
    assert "Before:" in told
    assert "given another expert" in told
    assert said("history", out).splitlines()[-1].endswith("replace short; 3 domains: asking, long, short")
    assert json.loads(said("history", out, "--json"))[0]["change"] == "trained"
    assert "rolled back" in said("rollback", out, "--out", str(tmp_path / "back"))
    assert "does not exist" in str(CliRunner().invoke(app, ["remove", run, "--domain", "x"]).exception)
