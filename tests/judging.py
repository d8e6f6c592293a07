"""A judge behind a real HTTP server, made for a test, and pairs for it to judge."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "sk-canary-7f3a91"
POINTS = {"chat": {"empathy": "Notices how the user feels.", "logic": ""}}


@dataclass(frozen=True)
class Said:
    """What the server sends for one request. `cut` drops the connection instead, after half of the body."""

    answer: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seconds: float = 0.0
    cut: bool = False


Answer = Callable[[str, int], Said]
"""From a question and the number of times it was asked before to what is sent."""


class Server:
    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.times: list[float] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                said = server.take(self.path, request, self.headers.get("Authorization", ""))
                time.sleep(said.seconds)
                with server.lock:
                    server.at_once -= 1
                body = said.body if said.body is not None else completion(said.answer)
                self.send_response(said.status)
                for name, value in {"Content-Length": str(len(body)), **said.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if said.cut else body)
                self.close_connection = said.cut

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def take(self, path: str, request: dict[str, Any], key: str) -> Said:
        assert path == "/v1/chat/completions"
        question = request["messages"][-1]["content"]
        with self.lock:
            before = self.asked.count(question)
            self.asked.append(question)
            self.times.append(time.monotonic())
            self.requests.append(request)
            self.keys.append(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        return self.answer(question, before)


def completion(answer: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def replies(question: str) -> tuple[str, str]:
    """The two replies of a question made from the shipped template, as shown."""
    found = re.search(r"reply 1 ---\n(.*)\n--- \w+ reply 2 ---\n(.*)\n--- \w+ end ---", question, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def quality(reply: str) -> int:
    """How good a reply of `rows` is: the number in it."""
    return int(re.findall(r"\d+", reply)[-1])


def better(question: str) -> int:
    """1 or 2, by quality."""
    first, second = map(quality, replies(question))
    return 1 if first > second else 2


def good(question: str, before: int = 0) -> Said:
    return Said(f"Better: {better(question)}")


def draw(*what: str) -> float:
    """A number in [0, 1) that depends on what is given only."""
    return int.from_bytes(hashlib.sha256("/".join(what).encode()).digest()[:6], "big") / 2**48


def noisy(right: float) -> Answer:
    """A judge that is right with this probability in each order, independently."""

    def answer(question: str, before: int) -> Said:
        verdict = better(question)
        return Said(f"Better: {verdict if draw(question) < right else 3 - verdict}")

    return answer


def rows(number: int, *, domain: str = "chat") -> list[dict[str, Any]]:
    """Pairs of which the data prefers the better reply (its number is higher)."""
    return [
        {"prompt": f"Question {n}?", "chosen": f"reply {2 * n + 1}", "rejected": f"reply {2 * n}", "id": f"q{n}",
         "domain": domain}
        for n in range(number)
    ]  # fmt: skip


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def holds(folder: Path, secret: str) -> list[str]:
    """The files under a folder in which the secret stands."""
    return [str(p) for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]
