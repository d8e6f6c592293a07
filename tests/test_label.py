"""`moreward data label` from a file of pairs to a file that trains, against real servers and real reward models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from judging import KEY, POINTS, Said, better, draw, good, holds, noisy, quality, read_rows, rows, serving, write_rows
from killing import ENVIRONMENT
from moreward import cli
from moreward.data.judge.cache import Cache
from moreward.data.load import load_preferences
from moreward.scoring import load
from moreward.train.runner import train
from moreward.types import Preference
from trained import card, given, trained

Tiny = Callable[[str], Path]
Label = Callable[..., Any]


@pytest.fixture
def points(tmp_path: Path) -> Path:
    path = tmp_path / "points.yaml"
    path.write_text(yaml.safe_dump({"tasks": {task: {"points": named} for task, named in POINTS.items()}}))
    return path


class Typed:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def label(points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Label:
    """Type `moreward data label` with these points, this output and this key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "120")

    def run(source: Path, *words: object, url: str = "", out: str = "labels.jsonl") -> Typed:
        endpoint = ["--base-url", url, "--model", "judge"] if url else []
        typed = ["moreward", "data", "label", source, "-o", tmp_path / out, "--points", points, *endpoint, *words]
        monkeypatch.setattr(sys, "argv", list(map(str, typed)))
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        assert KEY not in said.out + said.err
        assert holds(tmp_path, KEY) == []
        return Typed(code, said.out, said.err)

    return run


def report(folder: Path, out: str = "labels.jsonl") -> dict[str, Any]:
    return json.loads((folder / f"{out}.report.json").read_text(encoding="utf-8"))


def test_a_good_judge_labels_every_pair_and_the_labels_are_preferences(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(12))
    with serving(good) as server:
        typed = label(source, "--concurrency", 3, url=server.url)
        assert typed.code == 0, typed.err
        assert len(server.asked) == len(set(server.asked)) == 2 * 2 * 12
        assert server.most_at_once <= 3
        assert set(server.keys) == {f"Bearer {KEY}"}
    assert "48 questions to judge at" in typed.err
    assert "0 of them in the cache: 48 to send" in typed.err
    loaded = load_preferences(tmp_path / "labels.jsonl")
    assert (len(loaded.preferences), loaded.quarantine) == (24, [])
    assert Counter((p.domain, p.capability) for p in loaded.preferences) == {
        ("chat", "empathy"): 12,
        ("chat", "logic"): 12,
    }
    assert all(quality(p.chosen) > quality(p.rejected) for p in loaded.preferences)
    assert len({p.id for p in loaded.preferences}) == 24
    first = loaded.preferences[0]
    assert (first.id, first.meta["row"], first.meta["source"]) == ("q0/empathy", "q0", f"{source}:1")
    assert first.meta["judge"].startswith("judge at http://127.0.0.1")
    told = report(tmp_path)["tasks"]["chat"]["logic"]
    assert (told["pairs"], told["asked"], told["agreement"], told["first_share"], told["kept_share"]) == (
        12, 24, 1.0, 0.5, 1.0,
    )  # fmt: skip
    assert told["as_given"] == {"pairs": 12, "share": 1.0}


def test_what_a_judge_labels_trains_an_expert_for_each_point(tmp_path: Path, label: Label, tiny_backbone: Tiny) -> None:
    mine = [  # texts that the tiny tokenizer tells apart: it knows no numbers
        {
            **row,
            "chosen": f"{row['chosen']}{' and so on' * n} indeed",
            "rejected": f"{row['rejected']}{' and so on' * n}",
        }
        for n, row in enumerate(rows(10))
    ]
    source = write_rows(tmp_path / "in.jsonl", mine)
    with serving(good) as server:
        assert label(source, url=server.url).code == 0
    others = [{**row, "prompt": f"Elsewhere: {row['prompt']}", "domain": "other"} for row in mine]
    write_rows(tmp_path / "other.jsonl", others)
    both = [str(source), str(tmp_path / "other.jsonl"), str(tmp_path / "labels.jsonl")]
    run = train(
        given("dmoerm", tiny_backbone("bert"), None, tmp_path / "run", "tune=frozen", f"data.train=[{', '.join(both)}]")
    )
    assert card(run)["config"]["system"]["capabilities"] == {"chat": ["empathy", "logic"], "other": []}
    seen = {stage["stage"]: stage["pairs"] + stage["val_pairs"] for stage in card(run)["stages"]}
    assert (seen["point/chat--empathy"], seen["point/chat--logic"]) == (10, 10)
    assert seen["expert/other"] == 10
    rewards = load(run, device="cpu").score([("Question 3?", f"reply {n}") for n in range(3)], explain=True)
    for reward in rewards:
        assert sum(reward.parts.values()) == pytest.approx(reward.reward if reward.expert == "chat" else 0)


def test_repeating_is_free_and_gives_the_same_bytes(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(5))
    with serving(noisy(0.8)) as server:
        label(source, url=server.url)
        before, asked = (tmp_path / "labels.jsonl").read_bytes(), len(server.asked)
        refused = label(source, url=server.url)
        assert (refused.code, "exists already" in refused.err) == (2, True)
        assert label(source, "--overwrite", url=server.url).code == 0
        assert label(source, "--cache", tmp_path / "labels.jsonl.cache.jsonl", url=server.url, out="b.jsonl").code == 0
        assert len(server.asked) == asked == 20
        assert (tmp_path / "labels.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() == before
        assert (report(tmp_path, "b.jsonl")["sent"], report(tmp_path, "b.jsonl")["cached"]) == (0, 20)
        label(source, "--overwrite", "--body", "seed=1", url=server.url)
        assert len(server.asked) == 2 * asked  # another way to ask is another judge


def test_an_estimate_comes_before_anything_is_sent(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(6))
    with serving(good) as server:
        before = sorted(tmp_path.iterdir())
        dry = label(source, "--dry-run", url=server.url)
        assert (dry.code, server.asked, sorted(tmp_path.iterdir())) == (0, [], before)
        assert "chat: 6 pairs x 2 points = 24 questions (2 orders)" in dry.out
        assert "24 to send, about" in dry.out
        many = label(source, "--ask-above", 23, url=server.url)
        assert (many.code, server.asked) == (2, [])
        assert "24 questions are more than 23" in many.err
        assert not (tmp_path / "labels.jsonl").exists()
        assert label(source, "--ask-above", 23, "--yes", url=server.url).code == 0
        assert "0 to send" in label(source, "--dry-run", url=server.url).out


def test_a_list_of_m_costs_2k_times_m_over_2(tmp_path: Path, label: Label) -> None:
    replies = [[{"role": "assistant", "content": f"reply {n}"}] for n in range(4)]
    row = {
        "context": [{"role": "user", "content": "Hi"}],
        "completions": [{"rank": 4 - n, "completion": reply} for n, reply in enumerate(replies)],
        "domain": "chat",
    }
    source = write_rows(tmp_path / "in.jsonl", [row])
    with serving(good) as server:
        label(source, url=server.url)
        assert len(server.asked) == 2 * 2 * 6
    loaded = load_preferences(tmp_path / "labels.jsonl").preferences
    assert len(loaded) == 12
    assert all(quality(p.chosen[0]["content"]) > quality(p.rejected[0]["content"]) for p in loaded)


def test_a_judge_that_always_says_1_keeps_nothing_and_the_report_says_why(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(25))
    with serving(lambda question, before: Said("Better: 1")) as server:
        typed = label(source, url=server.url)
    assert (typed.code, (tmp_path / "labels.jsonl").exists()) == (3, False)
    assert "strong position bias. The judge names the reply shown first in 100%" in " ".join(typed.out.split())
    assert "no label was kept" in typed.err
    told = report(tmp_path)
    assert (told["labels"], len(told["warnings"])) == (0, 2)
    point = told["tasks"]["chat"]["empathy"]
    assert point["outcomes"]["first_twice"] == 25
    assert (point["first_share"], point["kept_share"], point["expected_accuracy"]) == (1.0, 0.0, None)


def chatty(question: str, before: int) -> Said:
    """Right, in one of many manners; every sixth answer says nothing."""
    good = better(question)
    bad = 3 - good
    manners = [
        f"Both have merits: reply {bad} lists {bad} facts.\n\n**Better: {good}**",
        f"Reply {good} is better because reply {bad} misses the point.",
        f'```json\n{{"reason": "reply {bad} has 2 flaws", "better": {good}}}\n```',
        f"<think>Maybe reply {bad} is better?</think>\nBetter: {good}",
        f"Reply {bad} is weaker.",
        "I'm sorry, but I cannot compare reply 1 and reply 2.",
    ]
    return Said(manners[int(draw(question) * len(manners))])


def test_a_chatty_judge_is_understood_and_its_silences_are_counted(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(40))
    with serving(chatty) as server:
        typed = label(source, url=server.url)
        silent = sum("sorry" in chatty(question, 0).answer for question in server.asked)
    told = report(tmp_path)["tasks"]["chat"].values()
    assert sum(point["parse_failures"] for point in told) == silent > 10
    assert all(point["agreement"] == 1.0 for point in told)
    assert all(quality(row["chosen"]) > quality(row["rejected"]) for row in read_rows(tmp_path / "labels.jsonl"))
    assert "at least one answer holds no verdict" in " ".join(typed.out.split())


def test_a_noisy_judge_keeps_what_the_formula_says(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(200))
    with serving(noisy(0.8)) as server:
        label(source, url=server.url)
    for told in report(tmp_path)["tasks"]["chat"].values():
        assert told["kept_share"] == pytest.approx(0.68, abs=4 * (0.68 * 0.32 / 200) ** 0.5)
        assert told["as_given"]["share"] == pytest.approx(0.941, abs=4 * (0.941 * 0.059 / 136) ** 0.5)
        assert told["expected_accuracy"] == pytest.approx(0.941, abs=0.06)
        assert sum(told["outcomes"].values()) == told["pairs"] == 200


def test_a_server_that_fails_now_and_then_changes_nothing(tmp_path: Path, label: Label) -> None:
    faults = [
        Said(status=429, headers={"Retry-After": "0.05"}),
        Said(status=502),
        Said(body=b'{"choices": ['),
        Said("Better: 1", cut=True),
        Said("Better: 1", seconds=1.0),
    ]

    def flaky(question: str, before: int) -> Said:
        fault = int(draw(question) * 25)
        return faults[fault] if fault < len(faults) and not before else good(question)

    source = write_rows(tmp_path / "in.jsonl", rows(25))
    with serving(flaky) as server:
        typed = label(source, "--timeout", 0.5, url=server.url)
        assert len(server.asked) > 100
    assert typed.code == 0
    assert len(read_rows(tmp_path / "labels.jsonl")) == 50


def test_questions_without_an_answer_are_counted_and_asked_again_next_time(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(10))
    is_mended = False

    def refusing(question: str, before: int) -> Said:
        return good(question) if is_mended or "Question 3?" not in question else Said(status=400, body=b"too long")

    with serving(refusing) as server:
        few = label(source, "--max-failed", 0.2, url=server.url)
        assert few.code == 0
        assert report(tmp_path)["tasks"]["chat"]["logic"]["outcomes"]["failed"] == 1
        assert "at least one question got no answer" in " ".join(few.out.split())
        assert len(read_rows(tmp_path / "labels.jsonl")) == 18
        is_mended, asked = True, len(server.asked)
        label(source, "--overwrite", url=server.url)
        assert len(server.asked) - asked == 4
        assert len(read_rows(tmp_path / "labels.jsonl")) == 20


def test_too_many_failures_end_the_job_and_what_was_said_is_kept(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(30))
    is_down = True

    def going_down(question: str, before: int) -> Said:
        return Said(status=500) if is_down and len(server.asked) > 20 else good(question)

    with serving(going_down) as server:
        stopped = label(source, "--tries", 1, url=server.url)
        assert stopped.code == 2
        assert "3 questions got no answer, 2 are allowed (--max-failed); the last: HTTP 500" in stopped.err
        assert not (tmp_path / "labels.jsonl").exists()
        answered, is_down = len(read_rows(tmp_path / "labels.jsonl.cache.jsonl")) - 1, False
        assert answered >= 20
        asked = len(server.asked)
        assert label(source, url=server.url).code == 0
        assert len(server.asked) - asked == 120 - answered


def test_a_refused_key_ends_the_job_at_once_and_is_not_repeated(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(30))
    with serving(lambda question, before: Said(status=401, body=f"bad key {KEY}".encode())) as server:
        typed = label(source, url=server.url)
        assert len(server.asked) <= 16
    assert typed.code == 2
    assert "the key was refused (HTTP 401: bad key [key])" in typed.err


def test_a_server_that_repeats_the_key_does_not_get_it_onto_the_disk(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(3))
    echo = lambda question, before: Said(f"You are {KEY}.\nBetter: {better(question)}")  # noqa: E731
    with serving(echo) as server:
        assert label(source, url=server.url).code == 0  # `label` looks for the key in every file and word
    assert "You are [key]." in (tmp_path / "labels.jsonl.cache.jsonl").read_text()


def test_after_kill_9_no_finished_question_is_asked_again(tmp_path: Path, points: Path, label: Label) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", rows(60)), tmp_path / "labels.jsonl"

    def slow(question: str, before: int) -> Said:
        return Said(f"Better: {better(question)}", seconds=0.02)

    with serving(slow) as server:
        words = ["data", "label", source, "-o", out, "--points", points, "--base-url", server.url, "--model", "judge"]
        command = [sys.executable, "-m", "moreward", *map(str, words), "--concurrency", "4"]
        process = subprocess.Popen(
            command, env={**ENVIRONMENT, "OPENAI_API_KEY": KEY}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while len(server.asked) < 70:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        before = Counter(server.asked)
        cache = out.with_name("labels.jsonl.cache.jsonl")
        with cache.open("ab") as file:
            file.write(b'{"key": "torn')  # as a write that was cut would leave it
        with Cache(cache) as held:
            finished = len(held)
        assert 50 <= finished < 240
        assert not out.exists()
        assert label(source, url=server.url).code == 0
        again = [question for question, times in Counter(server.asked).items() if times > 1]
        # only what was under way when it died
        assert len(server.asked) - sum(before.values()) == 240 - finished
        assert len(again) == sum(before.values()) - finished <= 8
        assert len(set(server.asked)) == 240
    assert report(tmp_path)["cached"] == finished
    assert holds(tmp_path, KEY) == []


def test_what_cannot_be_judged_is_counted_and_said(tmp_path: Path, label: Label) -> None:
    strange = [{**row, "prompt": f"S {row['prompt']}"} for row in rows(3, domain="poems")]
    labelled = {**rows(5)[4], "capability": "logic"}
    source = write_rows(tmp_path / "in.jsonl", [*rows(4), *strange, labelled, {**rows(1)[0], "rejected": "reply 1"}])
    with serving(good) as server:
        typed = label(source, "--limit", 2, url=server.url)
        assert len(server.asked) == 8
        told = " ".join(typed.out.split())
        assert "no points for this domain: poems (3 pairs)" in told
        assert "identical: 1" in told
        assert "labels of one capability already: 1 pairs" in told
        assert "Left out by --limit: 2 pairs" in told
        assert len(report(tmp_path)["notes"]) == 4
        other = write_rows(tmp_path / "other.jsonl", strange)
        refused = label(other, url=server.url, out="c.jsonl")
        assert refused.code == 2
        assert "none of the data's domains (poems) is a task with points; tasks: chat" in refused.err


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Whole text, reply 1", "rejected": "Whole text, reply 2"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: reply 1", "rejected": "\n\nHuman: Hi\n\nAssistant: reply 2"},
        {"prompt": "Hi", "chosen": "\n\nHuman: 1", "rejected": "\n\nHuman: 2", "group": "g"},
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "chosen": "reply 1",
            "rejected": "reply 2",
            "tools": [{"name": "look"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ],
    ids=["no prompt", "transcript", "text like a transcript", "turns"],
)
def test_a_label_is_read_as_the_pair_it_came_from(tmp_path: Path, label: Label, row: dict[str, Any]) -> None:
    source = write_rows(tmp_path / "in.jsonl", [row])
    (given,) = load_preferences(source, domain="chat").preferences
    last = re.compile(r"(\d)\n--- \w+ reply 2", re.DOTALL)
    with serving(lambda question, before: Said(f"Better: {last.search(question)[1]}")) as server:
        assert label(source, "--domain", "chat", url=server.url).code == 0
    read = load_preferences(tmp_path / "labels.jsonl").preferences
    assert [p.capability for p in read] == ["empathy", "logic"]
    for p in read:
        assert [p.chosen, p.rejected] in ([given.chosen, given.rejected], [given.rejected, given.chosen])
        assert (p.prompt, p.group, p.tools, p.chat_template_kwargs, p.domain) == (
            given.prompt, given.group, given.tools, given.chat_template_kwargs, "chat",
        )  # fmt: skip


# ---- judges that need no network ---------------------------------------------------------------------------------


def offline_rows(pairs: Sequence[Preference]) -> list[dict[str, Any]]:
    return [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "id": p.id, "domain": "chat"} for p in pairs
    ]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Tiny, pairs: Sequence[Preference]) -> Path:
    return trained(tmp_path_factory.mktemp("run"), tiny_backbone, pairs, "arliss", "bert")


@pytest.mark.parametrize("expert", ["", "long"])
def test_a_run_or_one_of_its_experts_judges_as_its_rewards_say(
    tmp_path: Path, label: Label, run: Path, pairs: Sequence[Preference], expert: str
) -> None:
    source = write_rows(tmp_path / "in.jsonl", offline_rows(pairs[:6]))
    typed = label(source, "--run", run, *(["--expert", expert] if expert else []))
    assert typed.code == 0, typed.err
    assert "12 rewards to run" in typed.err
    labels = read_rows(tmp_path / "labels.jsonl")
    assert len(labels) == 12
    scorer = load(run)
    for row in labels:
        both = scorer.score([(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])], explain=True)
        better, worse = (r.expert_rewards[expert] if expert else r.reward for r in both)
        assert better > worse
    told = report(tmp_path)["tasks"]["chat"]["empathy"]
    assert (told["agreement"], told["expected_accuracy"]) == (1.0, None)
    assert "says nothing of its accuracy" in typed.out
    again = label(source, "--run", run, *(["--expert", expert] if expert else []), "--overwrite")
    assert "12 of them in the cache: 0 to send" in again.err


def test_the_expert_of_each_points_name_judges_that_point(
    tmp_path: Path, label: Label, run: Path, pairs: Sequence[Preference]
) -> None:
    source = write_rows(tmp_path / "in.jsonl", offline_rows(pairs[:6]))
    refused = label(source, "--run", run, "--expert", "point")
    assert (refused.code, "empathy, logic is not in" in refused.err, "short" in refused.err) == (2, True, True)
    named = tmp_path / "named.yaml"
    named.write_text("tasks: {chat: {points: [short, long]}}")
    assert label(source, "--run", run, "--expert", "point", "--points", named).code == 0
    scorer = load(run)
    for row in read_rows(tmp_path / "labels.jsonl"):
        both = scorer.score([(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])], explain=True)
        assert both[0].expert_rewards[row["capability"]] > both[1].expert_rewards[row["capability"]]


@pytest.mark.parametrize("kind", ["bert", "llama", "qwen2"])
def test_a_hugging_face_reward_model_judges(
    tmp_path: Path, label: Label, tiny_backbone: Tiny, pairs: Sequence[Preference], kind: str
) -> None:
    base = tiny_backbone(kind)
    source = write_rows(tmp_path / "in.jsonl", offline_rows(pairs[:5]))
    refused = label(source, "--classifier", base)
    assert (refused.code, "without a reward head" in refused.err or "one output" in refused.err) == (2, True)
    folder = tmp_path / "reward-model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).exists():
            (folder / name).write_bytes((base / name).read_bytes())
    typed = label(source, "--classifier", folder)
    assert typed.code == 0, typed.err
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = None

    def reward(prompt: str, response: str) -> float:
        if kind == "bert":
            ids = tokenizer(prompt, response, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer(prompt + response, return_tensors="pt")["input_ids"]
            ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
        with torch.no_grad():
            return float(model(ids).logits)

    labels = read_rows(tmp_path / "labels.jsonl")
    assert len(labels) == 10
    for row in labels:
        assert reward(row["prompt"], row["chosen"]) > reward(row["prompt"], row["rejected"])


def test_what_makes_no_judge_is_said(tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(2))
    both = label(source, "--run", tmp_path, "--classifier", tmp_path)
    none = label(source)
    empty = label(source, "--classifier", tmp_path)
    assert "give one judge" in both.err
    assert "give --model" in none.err
    assert "no safetensors weights" in empty.err
    assert [typed.code for typed in (both, none, empty)] == [2, 2, 2]
