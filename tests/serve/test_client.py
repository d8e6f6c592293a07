"""The client says what `Scorer` says, tries again where that helps, and says so where it does not."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx2
import pytest
from typer.testing import CliRunner

import moreward
from moreward.bulk import score_file
from moreward.cli import app
from moreward.client import AsyncClient, Client
from moreward.errors import ConfigError, DataError, ServerError
from moreward.scoring import Scorer
from moreward.types import Conversation, Rendered, Reward
from serving import Live

ITEMS = [("Tell me of the sea.", f"It is calm, number {i}.") for i in range(9)]


def plain(rewards: Sequence[Reward]) -> list[Reward]:
    """Without what only the process itself can know."""
    return [replace(r, weights=dict(r.weights), expert_rewards=dict(r.expert_rewards)) for r in rewards]


def test_it_gives_what_the_scorer_gives(live: Live, scorer: Scorer) -> None:
    with moreward.Client(live.url, batch=4) as client:
        assert client.identity == scorer.identity
        assert client.experts == scorer.experts
        told = client.score(ITEMS, explain=True, uncertainty=True)
        wanted = scorer.score(ITEMS, explain=True, uncertainty=True)
        assert [r.reward for r in told] == [r.reward for r in wanted]
        assert plain(told) == plain(wanted)
        items = [Conversation(prompt="a", response="b", id="x"), {"prompt": "a", "response": "b", "id": "y"}]
        assert [r.id for r in client.score(items)] == ["x", "y"]
        assert client.score([Rendered(text="a b")])[0].reward == scorer.score([Rendered(text="a b")])[0].reward
        assert client.score(ITEMS[:1], expert="long")[0].reward == scorer.score(ITEMS[:1], expert="long")[0].reward
        prompt, responses = "Tell me.", ["No.", "It is a long story, and a good one."]
        compared = scorer.compare(prompt, responses, uncertainty=True)
        mine = client.compare(prompt, responses)
        assert [r.reward for r in mine.rewards] == [r.reward for r in compared.rewards]
        assert mine.probabilities[0] == pytest.approx(compared.probabilities[0], abs=1e-6)
        assert client.rank(prompt, responses) == scorer.rank(prompt, responses)
        assert client.best_of_n(prompt, responses) == scorer.best_of_n(prompt, responses)


def test_the_asynchronous_one_too(live: Live, scorer: Scorer) -> None:
    async def go() -> None:
        async with AsyncClient(live.url, batch=2) as client:
            told, other = await asyncio.gather(client.score(ITEMS), client.rank("a", ["b", "c d e"]))
            assert [r.reward for r in told] == [r.reward for r in scorer.score(ITEMS)]
            assert other == scorer.rank("a", ["b", "c d e"])
            with pytest.raises(DataError, match=r"items\[7\]: .*tokens, the limit is"):
                await client.score([*ITEMS[:7], ("a", "b " * 300)])

    asyncio.run(go())


def test_what_is_wrong_with_an_item_names_it(live: Live) -> None:
    with Client(live.url, batch=3) as client:
        with pytest.raises(DataError, match=r"items\[4\]: .*tokens, the limit is"):
            client.score([*ITEMS[:4], ("a", "b " * 300)])
        assert client.score([("a", "b " * 300)], on_long="truncate")[0].truncated
        with pytest.raises(DataError, match=r"items\[0\]: 'response' is missing"):
            client.score([{"prompt": "a"}])
        with pytest.raises(ServerError, match="is not here"):
            client.score(ITEMS, expert="nobody")
        with pytest.raises(DataError, match="at least one response"):
            client.compare("a", [])
    with pytest.raises(ConfigError, match="give http://HOST:PORT"):
        Client("localhost:8000")


class Answers(BaseHTTPRequestHandler):
    """Gives the statuses of `todo` in turn, then a reward; a status of 0 breaks the connection."""

    todo: deque[int]
    num_asked = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).num_asked += 1
        status = self.todo.popleft() if self.todo else 200
        if status == 0:
            self.connection.close()
            return
        rows = [{"score": 1.5, "expert": "", "tokens": 3, "truncated": False} for _ in body["items"]]
        text = json.dumps({"data": rows} if status == 200 else {"message": "busy", "code": "overloaded"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if status == 503:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def flaky() -> Callable[[list[int]], str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()

    def start(todo: list[int]) -> str:
        Answers.todo, Answers.num_asked = deque(todo), 0
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moreward.client.LONGEST_WAIT", 0.01)


def test_a_busy_server_and_a_broken_connection_are_tried_again(flaky: Callable[[list[int]], str]) -> None:
    with Client(flaky([503, 0, 502, 504]), retries=4) as client:
        assert client.score([("a", "b")])[0].reward == 1.5
        assert Answers.num_asked == 5
    with Client(flaky([503] * 9), retries=2) as client, pytest.raises(ServerError, match="busy"):
        client.score([("a", "b")])
    assert Answers.num_asked == 3
    with Client(flaky([500]), retries=5) as client, pytest.raises(ServerError, match="busy"):
        client.score([("a", "b")])
    assert Answers.num_asked == 1, "an error of the server itself would come again"


def test_a_server_that_is_not_there_is_said_in_time() -> None:
    with Client("http://127.0.0.1:9", retries=1) as client, pytest.raises(ServerError, match="no answer after 2 tries"):
        client.score([("a", "b")])


def rows(path: Path, num: int) -> Path:
    lines = [json.dumps({"id": f"r{i}", "prompt": "Tell me of it.", "response": f"It is {i}."}) for i in range(num)]
    path.write_text("\n".join([*lines[:3], json.dumps({"id": "bad", "prompt": "no response"}), *lines[3:]]) + "\n")
    return path


def test_a_file_is_scored_by_a_server_as_by_the_run(live: Live, run: Path, scorer: Scorer, tmp_path: Path) -> None:
    source = rows(tmp_path / "in.jsonl", 40)
    done = CliRunner().invoke(
        app, ["score", str(source), "-o", str(tmp_path / "a.jsonl"), "--server", live.url, "--max-bad-share", "0.1"]
    )
    assert done.exit_code in (0, 3), done.output
    score_file(scorer, source, tmp_path / "b.jsonl", max_bad_share=0.1)
    mine, wanted = (
        [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        for name in ("a.jsonl", "b.jsonl")
    )
    assert [(row["id"], row.get("reward"), row.get("error")) for row in mine] == [
        (row["id"], row.get("reward"), row.get("error")) for row in wanted
    ]
    wrong = CliRunner().invoke(app, ["score", str(run), str(source), "-o", "x", "--server", live.url])
    assert isinstance(wrong.exception, ConfigError)


def test_a_server_that_stops_leaves_no_bad_rows_and_the_job_goes_on(live: Live, tmp_path: Path) -> None:
    class Stops(Client):
        num = 0

        def _send(self, method: str, path: str, body: object = None) -> httpx2.Response:
            if path == "/v1/rewards":
                Stops.num += 1
                if Stops.num == 3:
                    raise ServerError("gone")
            return super()._send(method, path, body)

    source, target = rows(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl"
    with Stops(live.url) as client:
        with pytest.raises(ServerError):
            score_file(client, source, target, chunk=8, max_bad_share=0.1)
        assert not target.exists()
        report = score_file(client, source, target, chunk=8, max_bad_share=0.1)
    assert report.resumed_from == 16
    assert (report.rows, report.bad) == (41, 1)


def test_it_needs_no_torch() -> None:
    code = "import sys, moreward; moreward.Client('http://x'); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_the_example_of_the_documentation_runs(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    exec(code.replace("http://localhost:8000", live.url), {})
    printed = capsys.readouterr().out
    assert printed.startswith("[Reward(reward=")
    assert printed.splitlines()[-1] in ("[0, 1]", "[1, 0]")
