"""The command line: what a user types, sees and gets as exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import moreward
from moreward import cli
from moreward.data.batches import tokenizer_sha256
from moreward.data.synthetic import DOMAINS
from moreward.evals.run import evaluate_run
from moreward.nn.backbone import load_tokenizer
from moreward.registry import recipe_names
from moreward.scoring import load
from moreward.types import Preference
from trained import card, digests, given, write_pairs

SOURCE = Path(moreward.__file__).resolve().parents[1]
COMMANDS = [["demo"], ["train"], ["eval"], ["compare"], ["score"], ["extend"], ["list"], ["data"], ["data", "check"]]
COMMANDS[-3:-3] = [["ensemble"], ["merge"], ["fold"], ["distil"], ["price"]]
COMMANDS += [["data", "label"]]
Tiny = Callable[[str], Path]
Make = Callable[..., Path]


class Typed:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def error(self) -> str:
        """The one message of a command that refused."""
        assert self.err.startswith("error: "), self.err
        assert "Traceback" not in self.err
        return self.err.removeprefix("error: ").rstrip("\n")


Type = Callable[..., Typed]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """Run the command in this process, as `moreward` does."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: object) -> Typed:
        monkeypatch.setattr(sys, "argv", ["moreward", *map(str, words)])
        code: Any = 0
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capsys.readouterr()
        return Typed(code, out, err)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, pairs: Sequence[Preference]) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs)


def flat(tree: dict[str, Any], prefix: str = "") -> list[str]:
    words: list[str] = []
    for key, value in tree.items():
        words += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"]
    return words


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_each_command_fits_one_screen(command: list[str], option: str, typed: Type) -> None:
    said = typed(*command, option)
    assert said.code == 0
    assert len(said.out.splitlines()) <= 40
    assert "Usage: " in said.out


def test_every_command_is_in_the_help_and_says_what_it_does(typed: Type) -> None:
    said = typed("--help").out
    for command in COMMANDS[:-1]:
        assert re.search(rf"│ {command[0]} +\w+", said), command


def test_a_command_that_does_not_exist_is_refused(typed: Type) -> None:
    said = typed("trian")
    assert said.code == 2
    assert "trian" in said.err


# ---------------------------------------------------------------- data check


def test_sound_data_passes_the_check(data: Path, typed: Type) -> None:
    said = typed("data", "check", data)
    assert said.code == 0
    assert "long" in said.out
    assert "short" in said.out


def test_faulty_data_fails_the_check(pairs: Sequence[Preference], tmp_path: Path, typed: Type) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    with data.open("a") as file:
        file.write('{"prompt": "p", "chosen": 3, "rejected": "b", "domain": "long"}\n{"prompt": "p"\n')
    said = typed("data", "check", data)
    assert said.code == 1
    assert "pairs.jsonl:41" in said.out
    assert "pairs.jsonl:42" in said.out


def test_the_check_as_json_parses_and_counts(data: Path, tiny_backbone: Tiny, typed: Type) -> None:
    said = typed("data", "check", data, "--json", "--backbone", tiny_backbone("bert"), "--max-length", 64)
    told = json.loads(said.out)
    assert json.dumps(told).count("too_long") + json.dumps(told).count("truncated") > 0
    assert {"long", "short"} <= set(told["domains"])
    marks = {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "pad_is_eos": False}
    assert told["tokenizer"] == marks | {"sha256": tokenizer_sha256(load_tokenizer(str(tiny_backbone("bert"))))}


def test_data_that_is_not_there_is_refused(tmp_path: Path, typed: Type) -> None:
    said = typed("data", "check", tmp_path / "none.jsonl")
    assert (said.code, "none.jsonl" in said.error()) == (3, True)


# ---------------------------------------------------------------- train


def test_train_eval_compare_score_extend_work_one_after_another(
    tiny_backbone: Tiny, data: Path, pairs: Sequence[Preference], tmp_path: Path, typed: Type
) -> None:
    run, single = tmp_path / "run", tmp_path / "single"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(given("arliss", tiny_backbone("bert"), data, run, "seed=5")))
    said = typed("train", config, "train.max_steps=3", "seed=6")
    assert (said.code, said.out) == (0, f"trained: {run}\nnext:    moreward eval {run} --data TEST.jsonl\n")
    assert card(run)["config"]["seed"] == 6
    assert card(run)["config"]["train"]["max_steps"] == 3
    assert "Traceback" not in said.err
    assert typed("train", *flat(given("baseline", tiny_backbone("bert"), data, single))).code == 0

    told = typed("eval", run, "--data", data, "--baseline", single)
    assert told.code == 0
    assert all(word in told.out for word in ("long", "short", "oracle", "(baseline)", "Parameters stored"))
    compared = typed("compare", run, single, "--data", data, "--markdown")
    assert compared.code == 0
    assert "| " in compared.out
    assert all(name in compared.out for name in ("run", "single"))

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": p.prompt, "response": p.chosen}) + "\n" for p in pairs[:5]))
    scored = typed("score", run, source, "-o", tmp_path / "out.jsonl", "--explain")
    assert (scored.code, scored.out) == (0, "")
    assert "5 rows: 5 rewards, 0 bad" in scored.err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    wanted = load(run).score([(p.prompt, p.chosen) for p in pairs[:5]], explain=True)
    assert [line["reward"] for line in lines] == pytest.approx([r.reward for r in wanted], abs=2e-3)
    assert [set(line["expert_rewards"]) for line in lines] == [{"long", "short"}] * 5

    calm = write_pairs(
        tmp_path / "calm.jsonl", [replace(p, domain="calm", prompt=f"Calm: {p.prompt}") for p in pairs[:16]]
    )
    extended = typed("extend", run, "--domain", "calm", "--data", calm, "--out", tmp_path / "more")
    assert extended.code == 0, extended.err
    assert "largest change 0 (bit-identical)" in extended.out
    assert f"extended: {tmp_path / 'more'}" in extended.out
    assert load(tmp_path / "more").experts == ("long", "short", "calm")


def test_training_faults_are_lines_and_not_tracebacks(data: Path, tmp_path: Path, typed: Type) -> None:
    said = typed("train", "recipe=arlis", f"data.train={data}", f"out={tmp_path / 'run'}", "train.epohcs=2")
    assert said.code == 2
    lines = said.err.splitlines()
    assert len(lines) == 2
    assert "error: train.epohcs: unknown key. Did you mean 'epochs'?" in lines[0]
    assert "error: recipe: unknown recipe 'arlis'. Did you mean 'arliss'?" in lines[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["nowhere.yaml", "seed", "=2"])
def test_a_word_that_is_no_configuration_is_refused(word: str, typed: Type) -> None:
    said = typed("train", word)
    assert said.code == 2
    assert word in said.error()


def test_data_that_is_mostly_bad_stops_with_its_own_code(tiny_backbone: Tiny, tmp_path: Path, typed: Type) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "chosen": "", "rejected": "b"}\n' * 3)
    said = typed("train", *flat(given("baseline", tiny_backbone("bert"), bad, tmp_path / "run")))
    assert said.code == 3
    assert "3 of 3 rows are bad" in said.error()


def test_a_row_that_breaks_training_stops_with_a_message(
    make: Make, tiny_backbone: Tiny, data: Path, tmp_path: Path, typed: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moreward.nn.losses.F.logsigmoid", lambda x: x * float("nan"))
    said = typed("train", *flat(given("baseline", tiny_backbone("bert"), data, tmp_path / "run")))
    assert said.code == 2
    assert "the loss is not finite; weights are as before this step. Rows: " in said.err
    assert "Traceback" not in said.err


def test_a_finished_run_is_not_trained_again(make: Make, typed: Type) -> None:
    run = make()
    before = digests(run)
    said = typed("train", run / "config.yaml")
    assert said.code == 2
    assert "holds a finished run" in said.error()
    assert digests(run) == before


# ---------------------------------------------------------------- eval and compare


def test_eval_as_json_holds_the_numbers_of_the_evaluation(
    make: Make, data: Path, pairs: Sequence[Preference], typed: Type
) -> None:
    said = typed("eval", make(), "--data", data, "--json", "--seed", 3, "--baseline", make("baseline"))
    assert said.code == 0
    told = json.loads(said.out)
    result = evaluate_run(load(make()), pairs, seed=3)
    for domain in ("long", "short"):
        for key in ("accuracy", "oracle", "random"):
            wanted = getattr(result.evaluation.domains[domain], key)
            assert told["evaluation"]["domains"][domain][key] == pytest.approx(wanted)
    assert told["routing"]["accuracy"] == pytest.approx(result.routing.accuracy)
    assert told["too_long"] == {}
    assert told["comparison"] is not None


def test_eval_says_which_pairs_were_too_long(
    make: Make, pairs: Sequence[Preference], tmp_path: Path, typed: Type
) -> None:
    rows = [replace(pairs[0], chosen="so on " * 90), *pairs[1:]]
    data = write_pairs(tmp_path / "pairs.jsonl", rows)
    said = typed("eval", make(), "--data", data)
    assert said.code == 0
    assert "left out, longer than the model's limit: short 1 (allow them with --truncate)" in said.err
    assert typed("eval", make(), "--data", data, "--truncate").err == ""


def test_a_run_that_is_not_there_is_refused(data: Path, tmp_path: Path, typed: Type) -> None:
    said = typed("eval", tmp_path / "none", "--data", data)
    assert (said.code, said.error()) == (2, f"{tmp_path / 'none'}: there is no such run folder")


def test_compare_as_json_holds_every_run(make: Make, data: Path, typed: Type) -> None:
    runs = [make(), make("baseline")]
    said = typed("compare", *runs, "--data", data, "--json")
    told = json.loads(said.out)
    assert len(told["evaluations"]) == len(told["routing"]) == 2
    assert told["comparison"] is not None


def test_compare_refuses_a_baseline_that_is_not_among_the_runs(make: Make, data: Path, typed: Type) -> None:
    said = typed("compare", make(), make("baseline"), "--data", data, "--baseline", "none")
    assert said.code == 2
    assert "none" in said.err


# ---------------------------------------------------------------- score


@pytest.fixture
def rows(pairs: Sequence[Preference], tmp_path: Path) -> Path:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": p.prompt, "response": p.rejected}) + "\n" for p in pairs))
    return source


def test_scoring_goes_on_where_it_was_cut(
    make: Make, rows: Path, tmp_path: Path, typed: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    monkeypatch.setitem(_defaults(), "chunk", 8)
    assert typed("score", make(), rows, "-o", whole).code == 0
    calls = iter(range(3))
    score = moreward.Scorer.score

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("moreward.scoring.Scorer.check_golden", lambda self, limit=None: 0.0)
        patch.setattr("moreward.scoring.Scorer.score", stopping)
        stopped = typed("score", make(), rows, "-o", cut)
    assert stopped.code == 130
    assert stopped.err.endswith("stopped; start the same command again to go on\n")
    assert not cut.exists()
    again = typed("score", make(), rows, "-o", cut)
    assert again.code == 0
    assert "40 rows: 40 rewards, 0 bad, 24 of them before" in again.err
    assert cut.read_bytes() == whole.read_bytes()


def _defaults() -> dict[str, Any]:
    from moreward.bulk import score_file

    assert score_file.__kwdefaults__ is not None
    return score_file.__kwdefaults__


def test_an_output_that_exists_is_only_replaced_when_asked(make: Make, rows: Path, tmp_path: Path, typed: Type) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    refused = typed("score", make(), rows, "-o", out)
    assert refused.code == 2
    assert "--overwrite" in refused.error() or "overwrite" in refused.error()
    assert out.read_text() == "mine\n"
    assert typed("score", make(), rows, "-o", out, "--overwrite").code == 0
    assert len(out.read_text().splitlines()) == 40


def test_bad_rows_are_named_and_change_the_exit_code(make: Make, rows: Path, tmp_path: Path, typed: Type) -> None:
    with rows.open("a") as file:
        file.write('{"prompt": "p"}\n')
    said = typed("score", make(), rows, "-o", tmp_path / "out.jsonl", "--max-bad-share", 0.1)
    assert said.code == 3
    assert "41 rows: 40 rewards, 1 bad" in said.err
    assert "rows.jsonl:41" in said.err


def test_long_rows_are_refused_or_cut_and_flagged(make: Make, tmp_path: Path, typed: Type) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "p", "response": "so on " * 200}) + "\n")
    refused = typed("score", make(), source, "-o", tmp_path / "out.jsonl")
    assert refused.code == 3
    assert "the limit is 96" in refused.err
    assert typed("score", make(), source, "-o", tmp_path / "cut.jsonl", "--truncate").code == 0
    assert json.loads((tmp_path / "cut.jsonl").read_text())["truncated"] is True


# ---------------------------------------------------------------- extend and list


def test_extending_what_cannot_be_extended_is_refused(make: Make, data: Path, typed: Type) -> None:
    said = typed("extend", make("baseline"), "--domain", "calm", "--data", data)
    assert said.code == 2
    assert "recipe 'baseline' has no expert per domain" in said.error()


def test_list_names_every_recipe_and_every_key(typed: Type) -> None:
    said = typed("list")
    assert said.code == 0
    for name in recipe_names():
        assert f"recipe={name}  tune: " in said.out
    for key in ("system.rank", "system.top_k", "train.learning_rate", "data.on_long", "data.max_length", "backbone"):
        assert re.search(rf"^ +{re.escape(key)} ", said.out, re.MULTILINE), key


# ---------------------------------------------------------------- as a process


def test_the_module_is_the_command_and_faults_have_no_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-m", "moreward", "data", "check", str(tmp_path / "none.jsonl")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*none\.jsonl.*\n", done.stderr)


def test_the_demo_trains_compares_and_explains(
    tiny_backbone: Tiny, tmp_path: Path, typed: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = str(tiny_backbone("deberta-v2"))
    monkeypatch.setattr("moreward.nn.backbone.resolve_backbone", lambda name: tiny if name == "minilm" else name)
    monkeypatch.setattr("moreward.demo.DEMO_DOMAINS", DOMAINS[:2])
    said = typed("demo", "--out", tmp_path / "demo", "--pairs", 20)
    assert said.code == 0, said.err
    assert "2 domains whose preferences conflict" in said.out
    assert "What the experts say" in said.out
    assert len(load(tmp_path / "demo" / "mixture").experts) == 2
    budgets = [card(tmp_path / "demo" / name)["parameters"]["stored"] for name in ("single", "mixture")]
    assert budgets[0] == pytest.approx(budgets[1], rel=0.02)
    again = typed("demo", "--out", tmp_path / "demo")
    assert again.code == 2
    assert "is not empty" in again.error()
