"""The server as processes: killed, drained, started wrong, under many threads."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from moreward.scoring import load
from serving import KEY, serving, started

Make = Callable[..., Path]


def test_it_lives_through_the_death_of_the_model_and_drains_at_the_end(make: Make, tmp_path: Path) -> None:
    run = make("arliss")
    wanted = load(run, deterministic=True).score([("a prompt", "an answer")])[0].number
    body = {"items": [{"prompt": "a prompt", "response": "an answer"}]}
    with serving(run, tmp_path / "log", limits={"body_seconds": 1.0}) as live, live.client() as client:
        # many threads, experts mixed: nobody gets another's reward
        scorer = load(run, deterministic=True)
        asks = [(f"prompt {i}", f"answer {i % 7}", ("auto", "long", "short")[i % 3]) for i in range(48)]
        truth = [scorer.score([(p, r)], expert="" if e == "auto" else e)[0].number for p, r, e in asks]

        def ask(i: int) -> bool:
            prompt, response, expert = asks[i % 48]
            items = [{"prompt": prompt, "response": response}]
            told = client.post("/v1/rewards", json={"items": items, "expert": expert})
            return told.json()["data"][0]["score"] == truth[i % 48]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(16 * 9)))

        # a body that never ends, and heads that never end
        half = [socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1]))) for _ in range(40)]
        for i, one in enumerate(half):
            head = "POST /classify HTTP/1.1\r\nHost: x\r\n" + ("Content-Length: 99\r\n\r\n{" if i % 2 else "")
            one.sendall(head.encode())
        assert httpx2.get(f"{live.url}/livez", timeout=5).status_code == 200

        # the model's process is killed while requests wait
        worker = live.worker
        with ThreadPoolExecutor(8) as pool:
            flying = [pool.submit(client.post, "/v1/rewards", json=body) for _ in range(60)]
            os.kill(worker, signal.SIGKILL)
            codes = [one.result().status_code for one in flying]
        assert set(codes) <= {200, 503}
        assert client.post("/v1/rewards", json=body).status_code in (200, 503)
        live.wait_ready()
        assert live.worker != worker
        assert client.post("/v1/rewards", json=body).json()["data"][0]["score"] == wanted
        assert client.get("/livez").status_code == 200

        for one in half:
            one.settimeout(10)
            while one.recv(4096):  # closed by the server by now, whatever it said before
                pass
            one.close()

        # the end
        with ThreadPoolExecutor(6) as pool:
            many = {"items": [{"prompt": f"p {i}", "response": "an answer"} for i in range(60)]}
            flying = [pool.submit(client.post, "/v1/rewards", json=many) for _ in range(6)]
            time.sleep(0.05)
            last = live.worker
            live.process.send_signal(signal.SIGTERM)
            replies = [one.result() for one in flying]
        assert {reply.status_code for reply in replies} <= {200, 503}
        assert any(reply.status_code == 200 for reply in replies)
        assert live.process.wait(20) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(last, 0)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{live.url}/livez", timeout=2)
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert "answer" not in log


def test_200_megabytes_are_refused_and_not_kept(make: Make, tmp_path: Path) -> None:
    with serving(make("arliss"), tmp_path / "log", keys=[KEY]) as live:

        def memory() -> int:
            told = Path(f"/proc/{live.process.pid}/statm").read_text(encoding="utf-8")
            return int(told.split()[1]) * os.sysconf("SC_PAGE_SIZE")

        assert httpx2.get(f"{live.url}/readyz", timeout=5).status_code == 401, "with a key set every route needs it"
        headers = {"Authorization": f"Bearer {KEY}"}
        before, most = memory(), [0]
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.01):
                most[0] = max(most[0], memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            told = httpx2.post(f"{live.url}/classify", content=b"x" * 200_000_000, headers=headers, timeout=30)
            assert told.status_code == 413
        except httpx2.TransportError:
            pass  # the answer may come while the body is still being sent, and the connection ends
        stop.set()
        watcher.join()
        assert most[0] - before < 30e6
        assert httpx2.get(f"{live.url}/readyz", headers=headers, timeout=5).status_code == 200


def test_a_wrong_start_ends_at_once_with_one_sentence(make: Make, tmp_path: Path) -> None:
    run = make("arliss")
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    weights = damaged / "model" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 0xFF
    weights.write_bytes(bytes(raw))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        faults = [
            (started(tmp_path / "absent", tmp_path / "a"), "absent"),
            (started(damaged, tmp_path / "b"), "model.safetensors"),
            (started(run, tmp_path / "c", port=port), f"127.0.0.1:{port} cannot be listened on"),
            (started(run, tmp_path / "d", backbone=str(tmp_path / "nowhere")), "nowhere"),
        ]
        for live, said in faults:
            live.process.wait(60)
            assert live.end() == 2
            log = live.log.read_text(encoding="utf-8")
            assert said in log
            assert "Traceback" not in log


def test_the_command_has_the_same_words(make: Make, tmp_path: Path) -> None:
    done = subprocess.run(
        [os.path.join(os.path.dirname(os.sys.executable), "moreward"), "serve", str(tmp_path), "--host", "0.0.0.0"],  # type: ignore[attr-defined]
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no key is set" in done.stderr
