"""S14, S15: another model in the place of the one that serves, and a bad one refused."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest

from moreward.errors import ConfigError
from moreward.scoring import load
from moreward.serve.owner import Loaded
from moreward.serve.settings import Settings
from serving import ABOUT, KEY, Live, Model, application, result, serving
from trained import edit_card

Make = Callable[..., Path]
ADMIN = {"Authorization": "Bearer admin-key-1234567890"}
BODY = {"items": [{"prompt": f"prompt {i}", "response": "an answer"} for i in range(12)]}


class Version(Model):
    """A model that says its version in every reward."""

    def __init__(self, number: int) -> None:
        super().__init__(lambda job: result(float(number)))
        self.about = {**ABOUT, "version": f"v{number}"}


def put_in_place(live_at: Path, run: Path) -> None:
    """The name now means another folder, from one moment to the next."""
    new = live_at.with_name("new")
    new.symlink_to(run)
    os.replace(new, live_at)


def test_a_request_is_answered_by_one_model_and_says_which() -> None:
    """S14: the swap falls between the two batches of a request, and while another waits."""

    async def go() -> None:
        old, new = Version(1), Version(2)
        old.opened.clear()

        class Owner(Model):
            now = old

            @property
            def current(self) -> Model:
                return self.now

        owner = Owner(lambda job: result(0.0))
        async with application(owner, limits={"batch_items": 5}) as (client, door):
            asked = [asyncio.create_task(client.post("/v1/rewards", json=BODY)) for _ in range(3)]
            while not old.batches:
                await asyncio.sleep(0.01)
            Owner.now = new
            later = asyncio.create_task(client.post("/v1/rewards", json=BODY))
            await asyncio.sleep(0.05)
            assert old.num_users == 3
            old.opened.set()
            replies = await asyncio.gather(*asked, later)
            for number, reply in zip((1, 1, 1, 2), replies, strict=True):
                assert {row["score"] for row in reply.json()["data"]} == {float(number)}
                assert reply.json()["model_version"] == reply.headers["X-Model-Version"] == f"v{number}"
            assert (old.num_users, new.num_users, door.queue.num_items) == (0, 0, 0)
            assert sum(old.batches) == 36, "no batch has two models"

    asyncio.run(go())


def test_only_the_admin_key_reloads() -> None:
    class Reloads(Version):
        async def reload(self) -> Mapping[str, Any]:
            return {**self.about, "version": "v2"}

    async def go() -> None:
        async with application(Reloads(1)) as (client, _):
            assert (await client.post("/admin/reload", json={})).status_code == 404, "off by default"
        admin = ("admin-key-1234567890",)
        for keys in ((), (KEY,)):
            async with application(Reloads(1), keys=keys, admin_keys=admin) as (client, _):
                for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
                    assert (await client.post("/admin/reload", json={}, headers=headers)).status_code == 401
                path = await client.post("/admin/reload", json={"run": "/etc"}, headers=ADMIN)
                assert path.status_code == 422, "no path comes from a request"
                told = await client.post("/admin/reload", json={}, headers=ADMIN)
                assert told.json() == {"model_version": "v2", "before": "v1"}
                assert (
                    'moreward_reloads_total{outcome="done"} 1.0'
                    in (await client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})).text
                )

    asyncio.run(go())
    with pytest.raises(ConfigError, match="an admin key is another one"):
        Settings(run=Path("run"), keys=(KEY,), admin_keys=(KEY,))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_models_change_under_load_and_a_bad_one_changes_nothing(make: Make, tmp_path: Path) -> None:
    """S14, S15 with processes: by the route and by SIGHUP, then a folder with wrong golden rewards and one that is not
    there."""
    runs = [make("arliss"), make("arliss", "bert", "seed=1")]
    wanted = {}
    for run in runs:
        scorer = load(run, deterministic=True)
        items = [(row["prompt"], row["response"]) for row in BODY["items"]]
        wanted[scorer.identity] = [reward.number for reward in scorer.score(items)]
    first, second = wanted
    at = tmp_path / "served"
    at.symlink_to(runs[0])
    bad = Path(shutil.copytree(runs[1], tmp_path / "bad"))

    def shifted(card: dict[str, Any]) -> dict[str, Any]:
        card["golden"][0]["reward"] += 0.5
        return card

    edit_card(bad, shifted)
    with serving(at, tmp_path / "log", admin_keys=["admin-key-1234567890"]) as live, live.client() as client:
        replies: list[httpx2.Response] = []
        stop = threading.Event()

        def ask() -> None:
            with live.client() as asking:
                while not stop.is_set():
                    replies.append(asking.post("/v1/rewards", json=BODY))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            put_in_place(at, runs[1])
            told = client.post("/admin/reload", json={}, headers=ADMIN, timeout=100)
            assert told.json() == {"model_version": second, "before": first}
            put_in_place(at, bad)
            refused = client.post("/admin/reload", json={}, headers=ADMIN, timeout=100)
            assert (refused.status_code, refused.json()["code"]) == (409, "reload_refused")
            assert "golden rewards differ" in refused.json()["message"]
            assert str(tmp_path) not in refused.text
            put_in_place(at, tmp_path / "absent")
            refused = client.post("/admin/reload", json={}, headers=ADMIN, timeout=100)
            assert "no such run folder" in refused.json()["message"]
            assert client.get("/readyz").status_code == 200
            put_in_place(at, runs[0])
            live.process.send_signal(signal.SIGHUP)
            _wait_for(client, first)
        finally:
            stop.set()
            asking.join()
        assert {reply.status_code for reply in replies} == {200}
        seen = [reply.headers["X-Model-Version"] for reply in replies]
        assert {*seen} == {first, second}
        for reply, version in zip(replies, seen, strict=True):
            assert reply.json()["model_version"] == version
            assert [row["score"] for row in reply.json()["data"]] == wanted[version]
        _wait_for_one_worker(live)


def _wait_for(client: httpx2.Client, version: str) -> None:
    ends = time.monotonic() + 100
    while client.get("/livez").headers["X-Model-Version"] != version:
        assert time.monotonic() < ends
        time.sleep(0.1)


def _wait_for_one_worker(live: Live) -> None:
    """The old models' processes have ended."""
    ends = time.monotonic() + 20
    while len(Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()) > 1:
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_a_process_that_dies_answers_with_503_not_with_silence() -> None:
    async def go() -> None:
        process = await asyncio.create_subprocess_exec(
            "true", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        loaded = Loaded(process, ABOUT)
        broken: list[bool] = []
        loaded.broken = lambda: broken.append(True)
        with pytest.raises(Exception, match="worker_down"):
            await loaded.score([cast(Any, {})])
        assert broken == [True]
        await process.wait()

    asyncio.run(go())
