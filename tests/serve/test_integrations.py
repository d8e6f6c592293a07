"""Trainers meet our rewards: real TRL in process and over HTTP, the others by the calls that they make."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moreward.client import Client
from moreward.errors import ConfigError, DataError, ServerError
from moreward.integrations import openrlhf, swift, verl
from moreward.integrations.source import Budget, opened
from moreward.integrations.trl import MorewardReward, RemoteReward
from moreward.scoring import Scorer, load
from serving import Live

Tiny = Callable[[str], Path]
PROMPTS = ["Tell me of the sea.", "Tell me of the moon."]
ANSWERS = ["It is calm.", "It is bright, and there is more to say."]


@pytest.fixture
def plain(run: Path) -> Scorer:
    return load(run)


def test_a_reward_function_for_trl_gives_the_runs_rewards_and_pickles(run: Path, plain: Scorer) -> None:
    function = pickle.loads(pickle.dumps(MorewardReward(str(run), name="mixture")))  # noqa: S301  what TRL does
    assert function.__name__ == "mixture"
    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    told = function(
        prompts=PROMPTS,
        completions=ANSWERS,
        completion_ids=[[1], [2]],
        trainer_state=None,
        domain=["long", "short"],
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
    )
    wanted = plain.score(list(zip(PROMPTS, ANSWERS, strict=True)))
    assert told == [r.reward for r in wanted]
    assert extra == {"expert": [r.expert for r in wanted], "reward_raw": told}
    assert sum(value for name, value in metrics.items() if name.endswith("/share")) == pytest.approx(1)
    assert metrics["moreward/truncated"] == 0
    turns = [[{"role": "user", "content": p}] for p in PROMPTS]
    replies = [[{"role": "assistant", "content": a}] for a in ANSWERS]
    assert function(prompts=turns, completions=replies) == [
        r.reward for r in plain.score(list(zip(turns, replies, strict=True)))
    ]
    with pytest.raises(DataError, match="2 prompts and 1 completions"):
        function(prompts=PROMPTS, completions=ANSWERS[:1])


def test_a_remote_one_gives_the_servers_and_stops_when_too_many_are_missing(
    live: Live, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moreward.client.LONGEST_WAIT", 0.01)
    told = asyncio.run(RemoteReward(live.url)(prompts=PROMPTS, completions=ANSWERS))
    assert told == [r.reward for r in scorer.score(list(zip(PROMPTS, ANSWERS, strict=True)))]
    dead = RemoteReward("http://127.0.0.1:9", retries=1)
    with pytest.raises(ServerError, match="2 of 2 rewards are missing, more than 1%"):
        asyncio.run(dead(prompts=PROMPTS, completions=ANSWERS))
    patient = RemoteReward("http://127.0.0.1:9", retries=0, missing_share=0.5)
    patient.budget.num_rows = 6
    assert asyncio.run(patient(prompts=PROMPTS, completions=ANSWERS)) == [None, None]


def test_the_budget_counts_over_all_calls() -> None:
    budget = Budget(0.01)
    for _ in range(10):
        budget.spend([1.0] * 30, "")
    budget.spend([1.0, None, None, None], "")
    with pytest.raises(ServerError, match=r"4 of 306 rewards are missing, more than 1%\. The last reason: busy"):
        budget.spend([None, 1.0], "busy")
    with pytest.raises(ConfigError, match="missing_share"):
        Budget(1.0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL about its own settings
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("method", "where"), [("GRPO", "process"), ("GRPO", "server"), ("RLOO", "process")])
def test_trl_trains_on_our_rewards(
    method: str, where: str, run: Path, live: Live, tiny_backbone: Tiny, tmp_path: Path, scorer: Scorer
) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'moreward[trl]'")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_backbone("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen: list[tuple[list[str], list[str], list[float]]] = []
    inner: Any = MorewardReward(str(run)) if where == "process" else RemoteReward(live.url)

    def watched(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        made = inner(prompts=prompts, completions=completions, **columns)
        told = asyncio.run(made) if where == "server" else made
        assert columns["domain"][0] in ("long", "short")
        seen.append((prompts, completions, told))
        return told

    watched.__name__ = inner.__name__
    rows = [{"prompt": p, "domain": d} for p, d in zip(PROMPTS, ("long", "short"), strict=True)]
    trainer = getattr(trl, f"{method}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder),
        processing_class=tokenizer,
        reward_funcs=watched,
        train_dataset=Dataset.from_list(rows),
        args=getattr(trl, f"{method}Config")(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    logged = [row["rewards/moreward/mean"] for row in trainer.state.log_history if "rewards/moreward/mean" in row]
    assert len(seen) == len(logged) == 2
    for (prompts, completions, told), mean in zip(seen, logged, strict=True):
        wanted = [r.number for r in scorer.score(list(zip(prompts, completions, strict=True)), on_long="truncate")]
        assert told == pytest.approx(wanted, abs=1e-4)
        assert mean == pytest.approx(sum(told) / len(told), abs=1e-5)


def test_openrlhfs_file(run: Path, live: Live, plain: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [f"{p}{a}" for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    for model in (str(run), live.url):
        monkeypatch.setenv("MOREWARD_MODEL", model)
        opened.cache_clear()
        told = openrlhf.reward_func(queries, PROMPTS, [None, None])
        wanted = [r.number for r in plain.score(list(zip(PROMPTS, ANSWERS, strict=True)))]
        assert told["rewards"].tolist() == pytest.approx(wanted, abs=1e-4)
        torch.testing.assert_close(told["scores"], told["rewards"].sigmoid())
        assert all(isinstance(value, float) for value in told["extra_logs"]["moreward_truncated"])
        if isinstance(client := opened(), Client):
            client.close()
    monkeypatch.delenv("MOREWARD_MODEL")
    opened.cache_clear()
    with pytest.raises(ConfigError, match="set MOREWARD_MODEL"):
        openrlhf.reward_func(queries, PROMPTS)


def test_verls_function_has_the_same_keys_for_every_row(
    run: Path, plain: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOREWARD_MODEL", str(run))
    opened.cache_clear()
    made = [
        verl.compute_score("long", answer, "x", extra_info={key: prompt, "num_turns": 2})
        for key, prompt, answer in zip(("prompt", "question"), PROMPTS, ANSWERS, strict=True)
    ]
    wanted = plain.score(list(zip(PROMPTS, ANSWERS, strict=True)))
    assert [row["score"] for row in made] == pytest.approx([r.number for r in wanted], abs=1e-4)
    assert [set(row) for row in made] == [{"score", "expert", "truncated"}] * 2
    with pytest.raises(DataError, match="has no prompt"):
        verl.compute_score("long", "a", extra_info={"num_turns": 2})


def test_swifts_plugin(run: Path, plain: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOREWARD_MODEL", str(run))
    opened.cache_clear()
    reward = swift.orms["moreward"](args=None)
    before = [[{"role": "user", "content": p}] for p in PROMPTS]
    with_answer = [[*turns, {"role": "assistant", "content": a}] for turns, a in zip(before, ANSWERS, strict=True)]
    wanted = [r.number for r in plain.score([(t[:-1], t[-1:]) for t in with_answer])]
    assert reward(ANSWERS, messages=before) == pytest.approx(wanted, abs=1e-4)
    assert reward(ANSWERS, messages=with_answer) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(DataError, match="messages:"):
        reward(ANSWERS)
