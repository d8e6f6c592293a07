"""A whole small experiment: equal budgets, resumed work, the same pairs for all, a page that says what was found."""

from __future__ import annotations

import json
import re
import shutil
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
from moreward.errors import ConfigError, DataError, RunError
from moreward.proof.controls import plan
from moreward.proof.experiment import Experiment, config_of, read_experiment
from moreward.proof.findings import Versus, check_controls, conclude, find
from moreward.proof.report import Report, run_experiment
from moreward.proof.trials import Trials, describe
from moreward.proof.words import headline, more_needed, render
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


def test_single_models_have_the_budgets_of_the_mixture(report: Report) -> None:
    systems, controls = report.findings.systems, report.findings.controls["mix"]
    mixture = systems["mix"].budget
    assert set(controls) == {"total", "active", "training"}
    for kind, label in controls.items():
        assert systems[label].is_single
        assert systems[label].budget.of(kind) == pytest.approx(mixture.of(kind), rel=0.15), kind
    assert systems[controls["total"]].members == 2


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
    with pytest.raises(RunError, match=r"mix-seed0: a finished run of another configuration \(train.learning_rate"):
        Trials(read_experiment(written(told, tmp_path / "e.yaml"))).train()


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
        _ = trials.test


def test_a_named_single_model_that_is_too_small_is_refused(
    tiny_backbone: Tiny, tmp_path: Path, experiment: Experiment
) -> None:
    told = given(tiny_backbone("bert"), tmp_path / "out")
    told["systems"]["small"] = {"recipe": "baseline", "system": {"head": "linear"}}
    told["controls"] = {"mix": {"total": "small", "active": "one", "training": "one"}}
    small = read_experiment(written(told, tmp_path / "e.yaml"))
    pairs = [Preference(prompt=f"q{i}", chosen="a", rejected="b", domain="ab"[i % 2]) for i in range(20)]
    configs = {label: config_of(small, label, {"train": ["x"]}) for label in small.labels}
    with pytest.raises(ConfigError, match=r"controls.mix.training: 'one' has 20 pairs seen, the mixture 40"):
        plan(small, configs, pairs)
    assert "mix is compared with: equal total:" in "\n".join(describe(Trials(experiment)))
