"""OpenRLHF's and verl's own client code, out of their wheels, against our server.

    pip download --no-deps openrlhf==0.11.2 verl==0.9.1 -d WHEELS && pip install aiohttp
    MOREWARD_WHEELS=WHEELS pytest tests/serve/test_foreign_clients.py

Both packages need a GPU to be installed as a whole; the one file that speaks to a server needs aiohttp only.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moreward.integrations import openrlhf as our_file
from moreward.integrations.source import opened
from moreward.scoring import Scorer, load
from moreward.types import Rendered
from serving import Live

WHEELS = os.environ.get("MOREWARD_WHEELS", "")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not WHEELS, reason="MOREWARD_WHEELS names no folder of wheels; see the docstring"),
]
PROMPT, ANSWER = "Tell me of the sea. ", "It is calm."


def source(package: str, ending: str) -> str:
    (wheel,) = Path(WHEELS).glob(f"{package}-*.whl")
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(ending)]
        return files.read(name).decode()


class Letters:
    """A tokenizer of characters, as both clients need one."""

    eos_token = "\x03"
    bos_token = "[CLS]"

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(i)) for i in ids)

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> str:
        return self.bos_token + " ".join(turn["content"] for turn in chat)


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("aiohttp")
    stub = ModuleType("openrlhf.utils.logging_utils")
    stub.init_logger = logging.getLogger  # type: ignore[attr-defined]
    for name in ("openrlhf", "openrlhf.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    space: dict[str, Any] = {}
    exec(compile(source("openrlhf", "openrlhf/utils/agent.py"), "agent.py", "exec"), space)
    return space["SingleTurnAgentExecutor"]


def rollout(executor: Any, where: str) -> dict[str, Any]:
    class Engine:
        async def generate(self, *_: Any, **__: Any) -> Any:
            one = SimpleNamespace(token_ids=[ord(x) for x in ANSWER], finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[one])

    sampling = SimpleNamespace(max_tokens=20, logprobs=None)
    done: dict[str, Any] = asyncio.run(executor(where).execute(PROMPT, "x", sampling, 200, Letters(), Engine()))
    return done


def test_openrlhfs_client_gets_our_reward(executor: Any, live: Live, scorer: Scorer) -> None:
    done = rollout(executor, f"{live.url}/get_reward")
    wanted = scorer.score([Rendered(text=PROMPT + ANSWER, prompt=PROMPT)])[0].number
    assert done["reward"] == [wanted]
    assert 0 < done["scores"][0] < 1
    assert done["extra_logs"]["expert"][0] in (0, 1)


def test_openrlhf_loads_our_file_and_calls_it(executor: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOREWARD_MODEL", str(run))
    opened.cache_clear()
    done = rollout(executor, str(our_file.__file__))
    assert done["reward"].tolist() == pytest.approx([load(run).score([(PROMPT, ANSWER)])[0].number], abs=1e-4)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verls_client_gets_our_reward(engine: str, live: Live, scorer: Scorer) -> None:
    aiohttp = pytest.importorskip("aiohttp")
    import torch

    tree = ast.parse(source("verl", "experimental/reward_loop/reward_loop.py"))
    worker = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "RewardLoopWorker")
    wanted = ("_post_request", "_preprocess_reward_inputs", "compute_score_disrm")
    methods = [n for n in worker.body if isinstance(n, ast.AsyncFunctionDef) and n.name in wanted]
    space: dict[str, Any] = {"aiohttp": aiohttp, "asyncio": asyncio, "logger": logging.getLogger(), "DataProto": Any}
    exec(compile(ast.Module(body=list(methods), type_ignores=[]), "reward_loop.py", "exec"), space)

    model = SimpleNamespace(rollout=SimpleNamespace(name=engine), model_path="alias")
    loop = SimpleNamespace(
        config=SimpleNamespace(reward=SimpleNamespace(reward_model=model)),
        reward_router_address=live.url.removeprefix("http://"),
        input_tokenizer=Letters(),
        reward_model_tokenizer=Letters(),
    )
    for name in wanted:
        setattr(loop, name, space[name].__get__(loop))
    ids = torch.tensor([ord(x) for x in ANSWER])
    batch = {"responses": ids, "attention_mask": torch.ones(len(ids) + 4, dtype=torch.long)}
    turns = [{"role": "user", "content": PROMPT.strip()}]
    row = SimpleNamespace(batch=batch, non_tensor_batch={"raw_prompt": turns})
    told = asyncio.run(loop.compute_score_disrm([row]))
    text = f"{PROMPT.strip()} {ANSWER}"
    assert told == {"reward_score": scorer.score([Rendered(text=text, special_tokens=True)])[0].number}
