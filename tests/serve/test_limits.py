"""What is too much, too slow, malformed or has no key: refused in the shape of its route, and nothing else suffers."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest

from moreward.errors import ConfigError
from moreward.serve.app import create_app
from moreward.serve.door import Door
from moreward.serve.faults import Fault
from moreward.serve.queue import Queue
from moreward.serve.run import _bound
from moreward.serve.settings import Limits, Settings, read_keys
from moreward.serve.strict import parsed
from serving import KEY, Model, application, result

ROUTES = {
    "/get_reward": {"query": ["q"]},
    "/classify": {"input": ["a"]},
    "/predict": {"inputs": "a"},
    "/rerank": {"query": "q", "documents": ["a"]},
    "/v1/rewards": {"items": [{"text": "a"}]},
}


def length(job: Mapping[str, Any]) -> dict[str, Any]:
    return result(float(len(str(job.get("text", job.get("response"))))))


def bodies(route: str) -> list[bytes]:
    """The 25 malformed bodies, for a route: its own fields are taken where a body needs a field."""
    field = next(k for k in ROUTES[route] if k != "query" or route == "/get_reward")
    good = json.dumps(ROUTES[route])

    def of(value: str) -> str:
        rest = {k: v for k, v in ROUTES[route].items() if k != field}
        return json.dumps(rest)[:-1] + (", " if rest else "") + f'"{field}": {value}}}'

    return [
        text if isinstance(text, bytes) else text.encode()
        for text in (
            "",
            "{",
            "[]",
            "null",
            '"text"',
            "{}",
            of("null"),
            of("[1]" if route != "/classify" else "[1.5]"),  # token ids are no fault there
            of("[null]"),
            of('[["a", ["b"]]]'),
            of('{"a": {}}'),
            of(json.dumps([3.5] * 10_000)),
            of("NaN"),
            of("Infinity"),
            of("1e999"),
            of("1" * 5000),
            "[" * 100_000,
            of('"').encode() + b'\xff"}',
            of('"\\ud800"'),
            good[:-1] + f', "{field}": "b"}}',
            of(json.dumps(["a"] * 1025)) if route != "/v1/rewards" else of(json.dumps([{"text": "a"}] * 1025)),
            good[:-1] + ', "normalise": true}',
            of(json.dumps("x" * 70_000)) if route != "/v1/rewards" else of(json.dumps([{"text": "x" * 70_000}])),
            of("true"),
            b"\x00" + good.encode(),
        )
    ]


@pytest.mark.parametrize("route", ROUTES)
def test_malformed_bodies_get_a_short_typed_answer_and_never_500(route: str) -> None:
    async def go() -> None:
        async with application(Model(length)) as (client, _):
            for i, body in enumerate(bodies(route)):
                reply = await client.post(route, content=body, headers={"Content-Type": "application/json"})
                assert 400 <= reply.status_code < 500, (i, body[:60], reply.status_code, reply.text[:200])
                assert len(reply.content) < 1000, (i, len(reply.content))
                assert "error" in reply.json()
            wrong = await client.post(route, content=b"a=b", headers={"Content-Type": "text/html"})
            assert wrong.status_code == 415
            assert (await client.post(route, json=ROUTES[route])).status_code == 200

    asyncio.run(go())


def test_a_nul_in_a_text_is_text() -> None:
    async def go() -> None:
        async with application(Model(length)) as (client, _):
            reply = await client.post("/classify", json={"input": "a\x00b"})
            assert reply.json()["data"][0]["probs"] == [3.0]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b'{"a": NaN}', "bad_json"),
        (b'{"a": 1e999}', "bad_number"),
        (b'{"a": ' + b"9" * 30 + b"}", "bad_number"),
        (b"[" * 65 + b"]" * 65, "too_deep"),
        (b'{"a": "\\ud800"}', "bad_json"),
        (b"  ", "empty_body"),
    ],
)
def test_json_is_taken_to_the_letter(body: bytes, code: str) -> None:
    with pytest.raises(Fault) as told:
        parsed(body)
    assert told.value.code == code
    assert parsed(b'{"a": "[[[[\\"", "b": [1, -2.5]}') == {"a": '[[[["', "b": [1, -2.5]}


def test_every_route_but_livez_needs_the_key() -> None:
    async def go() -> None:
        async with application(Model(length), keys=(KEY, "another-key-of-them")) as (client, door):
            app = create_app(Settings(run=door.settings.run)).app
            routes = [(path, next(iter(item))) for path, item in app.openapi()["paths"].items()]  # type: ignore[attr-defined]
            paths = {path for path, _ in routes} | {"/", "/docs", "/openapi.json", "/ping", "/nowhere"}
            assert len(paths) > 20
            for path in sorted(paths - {"/livez"}):
                for how in ("GET", "POST"):
                    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic !!"}):
                        reply = await client.request(how, path, headers=headers)
                        assert reply.status_code == 401, (how, path)
                        assert KEY not in reply.text
            assert (await client.get("/livez")).status_code == 200
            for key in (KEY, "another-key-of-them"):
                told = await client.post("/classify", json={"input": "a"}, headers={"Authorization": f"Bearer {key}"})
                assert told.status_code == 200
            assert (await client.get("/", auth=("anyone", KEY))).status_code == 200

    asyncio.run(go())


def test_keys_come_from_a_file_or_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\nanother-key-of-them\n", encoding="utf-8")
    assert read_keys(file) == (KEY, "another-key-of-them")
    monkeypatch.setenv("MOREWARD_API_KEY", f"{KEY},another-key-of-them")
    assert read_keys(None) == (KEY, "another-key-of-them")
    file.write_text("short\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="16 ASCII characters"):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "absent")


def test_other_machines_are_let_in_with_a_key_only(tmp_path: Any) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="no key is set"):
            Settings(run=tmp_path, host=host)
        assert Settings(run=tmp_path, host=host, keys=(KEY,)).keys
        assert Settings(run=tmp_path, host=host, insecure=True).insecure
    for host in ("127.0.0.1", "localhost", "::1"):
        assert not Settings(run=tmp_path, host=host).keys


def test_of_300_requests_a_queue_of_64_answers_64_and_refuses_236() -> None:
    async def go() -> None:
        model = Model(length)
        model.opened.clear()
        async with application(model, limits={"queue_items": 64}) as (client, door):
            asked = [asyncio.create_task(client.post("/classify", json={"input": "x" * (i + 1)})) for i in range(300)]
            while sum(task.done() for task in asked) < 236:
                await asyncio.sleep(0.01)
            assert door.queue.num_items == 64
            assert (await client.get("/livez")).status_code == 200, "while the model works"
            tei = await client.post("/predict", json={"inputs": "a"})
            assert (tei.status_code, tei.json()["error_type"]) == (429, "Overloaded")
            model.opened.set()
            replies = await asyncio.gather(*asked)
            codes = [reply.status_code for reply in replies]
            assert (codes.count(200), codes.count(503)) == (64, 236)
            for i, reply in enumerate(replies):
                if reply.status_code == 200:
                    assert reply.json()["data"][0]["probs"] == [float(i + 1)]
                else:
                    assert reply.headers["Retry-After"] == "1"
            assert (door.queue.num_items, door.queue.num_tokens) == (0, 0)

    asyncio.run(go())


def test_requests_are_joined_into_batches_within_limits() -> None:
    async def go() -> None:
        model = Model(length)
        model.opened.clear()
        async with application(model, limits={"batch_items": 10, "batch_tokens": 90}) as (client, _):
            texts = ["x" * 30] * 25  # of 11 tokens each, by the estimate: 8 of them make 88
            asked = [asyncio.create_task(client.post("/classify", json={"input": text})) for text in texts]
            await asyncio.sleep(0.3)
            model.opened.set()
            await asyncio.gather(*asked)
        assert model.batches[0] <= 8
        assert model.batches[1:3] == [8, 8]
        assert sum(model.batches) == 25

    asyncio.run(go())


def test_a_deadline_holds_for_waiting_and_running_and_the_next_is_answered() -> None:
    async def go() -> None:
        model = Model(length)
        model.opened.clear()
        async with application(model) as (client, door):
            late = await client.post("/classify", json={"input": "a"}, headers={"X-Request-Timeout": "0.2"})
            assert (late.status_code, late.json()["error"]["code"]) == (504, 504)
            model.opened.set()
            assert (await client.post("/classify", json={"input": "a"})).status_code == 200
            assert door.queue.num_items == 0
            bad = await client.post("/classify", json={"input": "a"}, headers={"X-Request-Timeout": "soon"})
            assert bad.status_code == 400

    asyncio.run(go())


def test_whoever_goes_away_leaves_the_queue() -> None:
    async def go() -> None:
        model = Model(length)
        model.opened.clear()
        queue = Queue(model, Limits())  # type: ignore[arg-type]
        feeding = asyncio.create_task(queue.run())
        job = {"text": "a"}
        asked = [asyncio.create_task(queue.put([(job, 5)], 60)) for _ in range(60)]
        await asyncio.sleep(0.05)
        assert queue.num_items == 60
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert queue.num_items == model.batches[0], "only what the model has begun"
        model.opened.set()
        await asyncio.sleep(0.05)
        assert (queue.num_items, queue.num_tokens, len(model.batches)) == (0, 0, 1)
        assert len(await queue.put([(job, 5)], 5)) == 1
        feeding.cancel()

    asyncio.run(go())


def test_what_is_not_finite_fails_the_whole_call_on_others_routes_and_one_item_on_ours() -> None:
    def answer(job: Mapping[str, Any]) -> dict[str, Any]:
        if job["text"] == "poison":
            return {"error": {"code": "non_finite", "message": "the reward is NaN"}}
        return length(job)

    async def go() -> None:
        async with application(Model(answer)) as (client, _):
            texts = [*["a" * i for i in range(1, 32)], "poison"]
            assert (await client.post("/classify", json={"input": texts})).status_code == 500
            assert (await client.post("/predict", json={"inputs": [[t] for t in texts]})).status_code == 424
            items = [{"text": t} for t in texts]
            told = (await client.post("/v1/rewards", json={"items": items, "on_error": "item"})).json()["data"]
            assert [row["score"] for row in told[:-1]] == [float(i) for i in range(1, 32)]
            assert told[-1]["error"]["code"] == "non_finite"
            assert "score" not in told[-1]
            assert "moreward_nonfinite_total 3.0" in (await client.get("/metrics")).text

    asyncio.run(go())


def test_sizes_are_checked_before_anything_is_parsed() -> None:
    async def go() -> None:
        limits = {"body_bytes": 10_000, "items": 4, "text_characters": 200}
        async with application(Model(length), limits=limits) as (client, _):
            big = await client.post("/classify", content=b"x" * 10_001)
            assert (big.status_code, big.headers["Connection"]) == (413, "close")

            async def endless() -> Any:
                for _ in range(100):
                    yield b"x" * 1000

            assert (await client.post("/classify", content=endless())).status_code == 413
            assert (await client.post("/classify", json={"input": ["a"] * 5})).status_code == 413
            long = await client.post("/classify", json={"input": ["a", "b" * 201]})
            assert (long.status_code, long.json()["error"]["param"]) == (413, "input[1]")
            gzip = await client.post("/classify", json={"input": "a"}, headers={"Content-Encoding": "gzip"})
            assert gzip.status_code == 413

    asyncio.run(go())


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def go() -> None:
        async with application(Model(length), limits={"body_seconds": 0.1}) as (client, _):

            async def slow() -> Any:
                yield b'{"input": '
                await asyncio.sleep(5)
                yield b'"a"}'

            reply = await client.post("/classify", content=slow(), headers={"Content-Type": "application/json"})
            assert (reply.status_code, reply.headers["Connection"]) == (408, "close")

    asyncio.run(go())


def test_a_draining_server_takes_nothing_new_and_says_so() -> None:
    async def go() -> None:
        async with application(Model(length)) as (client, door):
            door.is_draining = True
            assert (await client.post("/classify", json={"input": "a"})).status_code == 503
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
            assert (await client.get("/livez")).status_code == 200

    asyncio.run(go())


def test_ids_are_given_back_and_made_where_they_are_none() -> None:
    async def go() -> None:
        async with application(Model(length)) as (client, _):
            told = await client.get("/livez", headers={"X-Request-Id": "abc-1"})
            assert told.headers["X-Request-Id"] == "abc-1"
            made = (await client.get("/livez", headers={"X-Request-Id": "bad id!"})).headers["X-Request-Id"]
            assert len(made) == 32
            assert told.headers["X-Model-Version"] == "v1"

    asyncio.run(go())


def test_probabilities_take_the_temperature_of_the_expert_that_spoke(tmp_path: Any) -> None:
    door = Door(Settings(run=tmp_path))
    door.owner = Model(length)  # type: ignore[assignment]
    assert door.temperature("chat") == 2.0
    assert door.temperature("nobody") == 1.0
    assert door.probability(result(1.0)) == pytest.approx(1 / (1 + 2.718281828459045**-2))


def test_nothing_of_a_request_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async with application(Model(lambda job: {"wrong": 1})) as (client, _):
            reply = await client.post("/classify", json={"input": "canary-text"})
            assert reply.status_code == 500
            assert "canary" not in reply.text

    asyncio.run(go())
    assert "canary" not in caplog.text


def test_a_stranger_gets_no_headers_of_the_server() -> None:
    async def go() -> httpx2.Response:
        async with application(Model(length)) as (client, _):
            return await client.get("/livez", headers={"Origin": "https://example.org"})

    headers = asyncio.run(go()).headers
    assert "access-control-allow-origin" not in headers
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_replies_do_not_wait_for_more_to_send() -> None:
    """With Nagle's algorithm on, a client that asks one thing at a time waits 40 ms longer."""

    async def accepted() -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def meet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _bound("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(meet, sock=listening):
                _, writer = await asyncio.open_connection(*listening.getsockname())
                writer.close()
                return await told

    assert asyncio.run(accepted())
