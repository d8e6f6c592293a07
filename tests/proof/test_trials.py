"""A whole small experiment: equal budgets, resumed work, the same pairs for all, a page that says what was found."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from moreward.cli import app
from moreward.data.split import linked_groups
from moreward.data.synthetic import generate
from moreward.errors import ConfigError, DataError, MissingExtraError, RunError
from moreward.proof.controls import plan
from moreward.proof.experiment import Experiment, config_of, read_experiment
from moreward.proof.findings import Versus, check_controls, conclude, find
from moreward.proof.report import Report, run_experiment
from moreward.proof.trials import Trials, describe
from moreward.proof.words import headline, more_needed, render
from moreward.train.runner import Pairs
from moreward.train.track import Silent
from moreward.types import Preference

Tiny = Callable[[str], Path]


def given(backbone: Path, out: Path) -> dict[str, Any]:
    return {
        "name": "A small experiment",
        "out": str(out),
        "seeds": 2,
        "data": {
            "synthetic": {"train": 16, "val": 4, "test": 12, "domains": ["support", "stories"]},
        },
        "settings": {
            "backbone": str(backbone),
            "tune": "frozen",
            "data": {"max_length": 96, "on_long": "truncate"},
            "train": {"epochs": 1, "batch_size": 8, "learning_rate": 0.02},
        },
        "systems": {"one": {"recipe": "baseline"}, "mix": {"recipe": "rodos"}},
        "printed": [
            {
                "title": "Table 9",
                "measure": "accuracy",
                "columns": ["support", "Average"],
                "rows": {"mix": {"support": [0.7, 0.01], "Average": 0.6}, "absent": {"support": 0.5}},
            }
        ],
    }


def written(told: dict[str, Any], file: Path) -> str:
    file.write_text(yaml.safe_dump(told), encoding="utf-8")
    return str(file)


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny) -> Experiment:
    folder = tmp_path_factory.mktemp("experiment")
    return read_experiment(written(given(tiny_backbone("bert"), folder / "out"), folder / "e.yaml"))


@pytest.fixture(scope="module")
def report(experiment: Experiment) -> Report:
    return run_experiment(experiment, reporter=Silent(), say=lambda said: None)


CASES = [
    ("rodos", "frozen", {}),
    ("rodos", "full", {}),
    ("arliss", "lora", {}),
    ("more", "full", {"num_experts": 3}),
    ("more", "frozen", {"num_experts": 4, "top_k": 1}),
    ("shared_expert", "lora", {}),
    ("shared_expert", "frozen", {"own_head": "mlp"}),
    ("ensemble", "lora", {"num_members": 3}),
    ("armorm", "frozen", {"gate_width": 16}),
    ("quantile", "full", {}),
    ("dmoerm", "lora", {}),
]


@pytest.mark.parametrize(("recipe", "tune", "system"), CASES)
def test_single_models_have_the_budgets_of_the_mixture_as_near_as_can_be(
    recipe: str, tune: str, system: dict[str, Any], tiny_backbone: Tiny, tmp_path: Path
) -> None:
    told = given(tiny_backbone("bert"), tmp_path / "out")
    told["settings"] |= {"tune": tune, "train": {"epochs": 2}}
    told["systems"] = {"mix": {"recipe": recipe, "system": system}}
    experiment = read_experiment(written(told, tmp_path / "e.yaml"))
    whole = [Preference(prompt=f"q{i}", chosen="a", rejected="b", domain="ab"[i % 2]) for i in range(40)]
    labelled = [*whole, *(replace(p, capability=c) for p in whole for c in "xy")]
    configs = {"mix": config_of(experiment, "mix", {"train": ["x"]})}
    chosen = plan(experiment, configs, lambda config: Pairs(labelled if config.recipe == "dmoerm" else whole, []))
    mixture, controls = chosen.budgets["mix"], chosen.controls["mix"]
    plain = next(p for p in chosen.systems if p.label == controls["training"])
    step = chosen.budgets[plain.label].trained / int(plain.config.system.get("rank", 1))
    slack = {"total": step / 2 + 1, "active": step / 2 + 1, "training": len(whole) / 2}
    if recipe == "more":  # one dense layer as wide: all but the gate and offsets
        slack |= dict.fromkeys(("total", "active"), 0.01 * mixture.total)
    assert set(controls) == set(slack)
    for kind, label in controls.items():
        assert next(p for p in chosen.systems if p.label == label).is_single
        assert abs(chosen.budgets[label].of(kind) - mixture.of(kind)) <= slack[kind], kind


def test_single_models_on_several_backbones_are_told_apart_by_backbone(tiny_backbone: Tiny, tmp_path: Path) -> None:
    told = given(tiny_backbone("bert"), tmp_path / "out")
    roberta = tiny_backbone("roberta")
    told["systems"] = {"mix": {"recipe": "rodos"}, "other": {"recipe": "rodos", "backbone": str(roberta)}}
    experiment = read_experiment(written(told, tmp_path / "e.yaml"))
    configs = {label: config_of(experiment, label, {"train": ["x"]}) for label in told["systems"]}
    pairs = [Preference(prompt=f"q{i}", chosen="a", rejected="b", domain="ab"[i % 2]) for i in range(40)]
    controls = plan(experiment, configs, lambda config: Pairs(pairs, [])).controls
    assert controls["mix"]["active"] == "single, frozen"
    assert controls["other"]["active"] == f"single, frozen, {roberta.name}"


def test_members_of_an_averaged_single_model_are_runs_of_other_seeds(report: Report) -> None:
    total = report.findings.controls["mix"]["total"]
    assert report.findings.systems[total].members == 2
    folders = {folder.name for folder in (report.folder / "runs").iterdir()}
    assert {"one-seed0", "one-seed1", "one-seed100003", "one-seed100004"} <= folders


def test_it_is_not_trained_twice_and_what_is_missing_is(report: Report, experiment: Experiment) -> None:
    heard = Heard()
    again = Trials(experiment, reporter=heard)
    assert report.num_trained == len(list(again.runs()))
    assert again.train() == 0
    find(again)
    assert heard.said == [], "rewards are kept too"
    run = next(run for run in again.runs() if run.folder.name == "mix-seed1")
    before = (run.folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run.folder)
    assert Trials(experiment, reporter=heard).train() == 1
    assert (run.folder / "model" / "model.safetensors").read_bytes() == before
    assert heard.said[0] == "[1/1] mix-seed1"


def test_a_finished_run_of_another_configuration_is_refused_and_named(
    report: Report, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    told = given(tiny_backbone("bert"), report.folder)
    told["settings"]["train"]["learning_rate"] = 0.01
    with pytest.raises(RunError, match=r"mix-seed0: finished, but of another configuration \(train.learning_rate"):
        Trials(read_experiment(written(told, tmp_path / "e.yaml"))).train()


def test_an_unfinished_run_of_another_configuration_is_told_before_anything_is_trained(
    tiny_backbone: Tiny, tmp_path: Path
) -> None:
    told = given(tiny_backbone("bert"), tmp_path / "out")
    trials = Trials(read_experiment(written(told, tmp_path / "e.yaml")))
    last = list(trials.runs())[-1]
    (last.folder / "checkpoints").mkdir(parents=True)
    other = last.config.model_copy(update={"pooling": "first"}).model_dump(mode="json")
    (last.folder / "config.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")
    with pytest.raises(RunError, match=f"{last.folder.name}: unfinished, but of another configuration"):
        trials.train()
    assert [folder.name for folder in (tmp_path / "out" / "runs").iterdir()] == [last.folder.name]


def test_rewards_of_other_test_pairs_are_asked_again(report: Report, tiny_backbone: Tiny, tmp_path: Path) -> None:
    rows = (report.folder / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    fewer = tmp_path / "test.jsonl"
    fewer.write_text("".join(rows[:-4]), encoding="utf-8")
    told = given(tiny_backbone("bert"), shutil.copytree(report.folder, tmp_path / "out"))
    told["data"] = {name: str(report.folder / "data" / f"{name}.jsonl") for name in ("train", "val")}
    told["data"]["test"] = str(fewer)
    found = find(Trials(read_experiment(written(told, tmp_path / "e.yaml"))), num_resamples=50)
    assert found.num_pairs == {"stories": 10, "support": 10}


def test_numbers_are_those_that_the_kept_rewards_give(report: Report, experiment: Experiment) -> None:
    trials = Trials(experiment)
    accuracies = []
    for seed in (0, 1):
        kept = json.loads((report.folder / "rewards" / f"mix-seed{seed}.json").read_text(encoding="utf-8"))
        right = np.array([chosen[0] > rejected[0] for chosen, rejected in kept["rewards"]])
        domains = np.array([p.domain for p in trials.test])
        accuracies.append({d: right[domains == d].mean() for d in ("stories", "support")})
    found = report.findings.systems["mix"]
    for domain in ("stories", "support"):
        assert found.accuracy[domain].mean == pytest.approx(np.mean([a[domain] for a in accuracies]))
        assert found.accuracy[domain].interval.low <= found.accuracy[domain].mean
    assert found.mean.seeds == pytest.approx([np.mean(list(a.values())) for a in accuracies])
    assert found.mean.spread == pytest.approx(np.std(found.mean.seeds, ddof=1))
    versus = next(v for v in report.findings.versus if v.domain is None and "active" in v.kinds)
    other = report.findings.systems[versus.single]
    assert versus.difference == pytest.approx(found.mean.mean - other.mean.mean)
    assert report.findings.num_pairs == {"stories": 12, "support": 12}
    assert report.findings.num_groups["stories"] <= len(set(linked_groups(trials.test)))


def test_holms_correction_runs_over_every_test_of_the_report(report: Report) -> None:
    found = report.findings
    order = sorted(found.versus, key=lambda v: v.p_value)
    assert found.num_tests == len(order) == 3 * len({v.single for v in order})
    largest = 0.0
    for i, test in enumerate(order):
        largest = max(largest, min(1.0, test.p_value * (len(order) - i)))
        assert test.p_holm == pytest.approx(largest)


def test_a_mixture_helps_only_where_it_beats_every_equal_budget(report: Report) -> None:
    one = report.findings.versus[0]

    def test(verdict: Any, difference: float) -> Versus:
        return replace(one, verdict=verdict, difference=difference)

    better, worse, open_ = test("better", 0.1), test("worse", -0.1), test("no difference shown", 0.02)
    assert conclude("mix", "a", [better, better]).word == "helps"
    assert conclude("mix", "a", [better, open_]).word == "cannot be told"
    assert conclude("mix", "a", [better, worse, open_]).word == "hurts"
    assert conclude("mix", "a", [better, open_]).versus is open_
    with pytest.raises(RunError, match=r"no single model of equal budget beside mix \(equal training\)"):
        check_controls({"mix": {"total": "one", "active": "one"}}, ["mix"])


def test_the_words_say_the_numbers(report: Report) -> None:
    found = report.findings
    text = render(found)
    assert headline(found, "mix") in " ".join(text.split())
    for one in found.conclusions:
        assert f"{100 * one.versus.difference:+.1f} points" in " ".join(text.split())
        if one.word == "cannot be told" and one.versus.power.more_pairs:
            assert f"{one.versus.power.more_pairs:,} more pairs" in more_needed(one.versus)
    assert "Table 9" not in text, "published tables are the caller's"
    assert "Table 9" in (report.folder / "report.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        links = [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.outside += [link for link in links if not link.startswith(("#", "data:"))]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_says_what_was_found(report: Report) -> None:
    html = (report.folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.outside == []
    assert not re.search(r"@import|url\((?!#)", html)
    assert page.tags.count("svg") == len(list((report.folder / "figures").glob("*.svg"))) >= 5
    text = " ".join(" ".join(page.text).split())
    assert headline(report.findings, "mix") in text
    assert all(one.word in text for one in report.findings.conclusions)
    assert "Table 9 (ours | printed)" in text
    assert ".7000 ±.0100" in text
    told = json.loads((report.folder / "report.json").read_text(encoding="utf-8"))
    assert told["systems"]["mix"]["mean"]["mean"] == report.findings.systems["mix"].mean.mean
    for file in (report.folder / "figures").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_command_runs_it_and_a_dry_run_trains_nothing(report: Report, tiny_backbone: Tiny, tmp_path: Path) -> None:
    told = given(tiny_backbone("bert"), report.folder)
    file = written(told, tmp_path / "e.yaml")
    done = CliRunner().invoke(app, ["compare", file, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["name"] == "A small experiment"
    dry = CliRunner().invoke(app, ["compare", file, f"out={tmp_path / 'new'}", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "missing: " in dry.stdout
    assert not (tmp_path / "new" / "runs").exists()
    wrong = CliRunner().invoke(app, ["compare", file, "--data", "x.jsonl"])
    assert isinstance(wrong.exception, ConfigError)
    assert "--data: of runs" in str(wrong.exception)


def test_test_pairs_that_were_trained_on_are_refused(tiny_backbone: Tiny, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}", "domain": "ab"[i % 2]} for i in range(20)]
    files = {}
    for name, some in (("train", rows[:16]), ("test", rows[14:])):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    told = given(tiny_backbone("bert"), tmp_path / "out")
    told["data"] = {name: str(file) for name, file in files.items()}
    trials = Trials(read_experiment(written(told, tmp_path / "e.yaml")))
    with pytest.raises(DataError, match="stand on two sides of a split"):
        trials.train()
    assert not (tmp_path / "out" / "runs").exists(), "told before anything is trained"


def test_without_matplotlib_nothing_is_trained(
    tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = read_experiment(written(given(tiny_backbone("bert"), tmp_path / "out"), tmp_path / "e.yaml"))
    with pytest.raises(MissingExtraError, match=r"moreward\[report\]"):
        run_experiment(told, reporter=Silent(), say=lambda said: None)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_learns_from_ratings_is_compared_with_one_that_does_not_and_known_again(
    tiny_backbone: Tiny, tmp_path: Path
) -> None:
    told = given(tiny_backbone("bert"), tmp_path / "out")
    pairs = generate(16, domains=("support", "stories"))
    rows = [
        {
            "prompt": p.prompt,
            "response": getattr(p, which),
            "ratings": {"brevity": p.meta[f"capabilities_{which}"]["brevity"]},
            "scale": [0, 3],
        }
        for p in pairs
        for which in ("chosen", "rejected")
    ]
    (tmp_path / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = {"data": {"ratings": str(tmp_path / "ratings.jsonl")}, "system": {"gate_width": 8}}
    told |= {"seeds": 1, "systems": {"one": {"recipe": "baseline"}, "mix": {"recipe": "armorm", **own}}}
    experiment = read_experiment(written(told, tmp_path / "e.yaml"))
    assert Trials(experiment).train() == 3, "the mixture, the single model, and one trained as long"
    assert Trials(experiment).train() == 0


def test_labels_of_capabilities_are_for_the_recipe_that_uses_them(tiny_backbone: Tiny, tmp_path: Path) -> None:
    told = given(tiny_backbone("bert"), tmp_path / "out")
    rows = [
        {"prompt": f"q{i}", "chosen": f"a{i} {c}", "rejected": f"b{i}", "domain": "ab"[i % 2], "capability": c}
        for i in range(20)
        for c in ("", "x")
    ]
    for name, some in (("train", rows), ("test", [{**r, "prompt": f"t{r['prompt']}"} for r in rows[:8]])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    told["data"] = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    told["systems"]["mix"] = {"recipe": "dmoerm"}
    trials = Trials(read_experiment(written(told, tmp_path / "e.yaml")))
    assert {p.capability for p in trials.pairs(trials.configs["mix"]).train} == {"", "x"}
    assert (
        {p.capability for p in trials.pairs(trials.configs["one"]).train} == {p.capability for p in trials.test} == {""}
    )
    assert trials.plan.budgets["mix"].trained > trials.plan.budgets["one"].trained


def test_a_named_single_model_that_is_too_small_is_refused(
    tiny_backbone: Tiny, tmp_path: Path, experiment: Experiment
) -> None:
    told = given(tiny_backbone("bert"), tmp_path / "out")
    told["systems"]["small"] = {"recipe": "baseline", "system": {"head": "linear"}}
    told["controls"] = {"mix": {"total": "small", "active": "one", "training": "one"}}
    small = read_experiment(written(told, tmp_path / "e.yaml"))
    pairs = Pairs([Preference(prompt=f"q{i}", chosen="a", rejected="b", domain="ab"[i % 2]) for i in range(20)], [])
    configs = {label: config_of(small, label, {"train": ["x"]}) for label in small.labels}
    with pytest.raises(ConfigError, match=r"controls.mix.training: 'one' has 20 pairs seen, the mixture 40"):
        plan(small, configs, lambda config: pairs)
    assert "mix is compared with: equal total:" in "\n".join(describe(Trials(experiment)))
