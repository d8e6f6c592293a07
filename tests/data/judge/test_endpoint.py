"""Asking an endpoint that is busy, slow, broken or hostile; the key is in nothing that can be read afterwards."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from judging import KEY, Answer, Said, Server, completion, serving
from moreward.data.judge.endpoint import Asker, Endpoint, QuestionError, parse_options
from moreward.errors import ConfigError, JudgeError

OK = Said("Better: 1")


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(**{"base_url": url, "model": "m", "key": KEY, "first_wait": 0.01, "tries": 4, **options})


@pytest.fixture
def served() -> Iterator[Callable[[Answer], Server]]:
    with_server = []

    def serve(answer: Answer) -> Server:
        context = serving(answer)
        with_server.append(context)
        return context.__enter__()

    yield serve
    for context in with_server:
        context.__exit__(None, None, None)


def at_first(*said: Said) -> Answer:
    """These, one for each time the question is asked; then a good answer."""
    return lambda question, before: said[before] if before < len(said) else OK


def test_the_request_is_a_chat_completion_with_the_key_and_our_parameters(served: Any) -> None:
    server = served(at_first())
    with Asker(endpoint(server.url + "/", options={"seed": 7, "max_tokens": None})) as asker:
        assert asker.ask("which?") == "Better: 1"
    assert server.keys == [f"Bearer {KEY}"]
    assert server.requests == [
        {"model": "m", "temperature": 0, "seed": 7, "messages": [{"role": "user", "content": "which?"}]}
    ]


BROKEN = {
    "busy": Said(status=429),
    "down": Said(status=503, body=b"<html>no</html>"),
    "no JSON": Said(body=b'{"choices": [{"mess'),
    "JSON of another kind": Said(body=b'{"object": "list", "data": []}'),
    "no choices": Said(body=b'{"choices": []}'),
    "a list": Said(body=b"[1, 2]"),
    "content of another type": Said(body=completion({"text": "Better: 1"})),
    "not UTF-8": Said(body=b'\xff{"choices"'),
    "cut": Said("Better: 2", cut=True),
    "deep": Said(body=b"[" * 100_000),
}


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN.keys())
def test_what_passes_is_tried_again(served: Any, fault: Said) -> None:
    server = served(at_first(fault, fault))
    with Asker(endpoint(server.url)) as asker:
        assert asker.ask("which?") == "Better: 1"
        assert asker.num_sent == 3


@pytest.mark.parametrize("fault", BROKEN.values(), ids=BROKEN.keys())
def test_what_does_not_pass_is_given_up_after_so_many_tries(served: Any, fault: Said) -> None:
    server = served(lambda question, before: fault)
    with Asker(endpoint(server.url)) as asker, pytest.raises(QuestionError, match="in each of 4 tries"):
        asker.ask("which?")
    assert len(server.asked) == 4


def test_an_answer_that_takes_too_long_is_not_waited_for(served: Any) -> None:
    server = served(at_first(Said("Better: 2", seconds=1.0)))
    with Asker(endpoint(server.url, timeout=0.2)) as asker:
        assert asker.ask("which?") == "Better: 1"
    assert len(server.asked) == 2


def test_a_port_on_which_nobody_listens_is_said() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Asker(endpoint(f"http://127.0.0.1:{port}/v1")) as asker, pytest.raises(QuestionError, match="ConnectError"):
        asker.ask("which?")


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_by_every_question(served: Any, form: str) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    wait = {"seconds": "0.5", "date": later}[form]
    server = served(at_first(Said(status=429, headers={"Retry-After": wait})))
    with Asker(endpoint(server.url, tries=2)) as asker:
        asker.ask("which?")
        asker.ask("another?")
    assert server.asked[:2] == ["which?", "which?"]
    assert server.times[1] - server.times[0] >= 0.5


def test_a_wait_beyond_what_is_allowed_ends_the_job_and_says_how_long(served: Any) -> None:
    server = served(lambda question, before: Said(status=429, headers={"Retry-After": "3600"}))
    with Asker(endpoint(server.url)) as asker, pytest.raises(JudgeError, match=r"3,600 s .*start again"):
        asker.ask("which?")
    assert len(server.asked) == 1


@pytest.mark.parametrize("value", ["soon", "-5", "", "nan-", "Wed, 99 Foo"])
def test_a_senseless_retry_after_is_no_wait(served: Any, value: str) -> None:
    server = served(at_first(Said(status=503, headers={"Retry-After": value})))
    with Asker(endpoint(server.url)) as asker:
        assert asker.ask("which?") == "Better: 1"


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "key was refused"), (403, "access"), (404, "model is not there"), (307, "elsewhere")]
)
def test_what_no_trying_mends_ends_the_job_at_once(served: Any, status: int, reason: str) -> None:
    said = Said(status=status, headers={"Location": "http://127.0.0.1:1/"}, body=f"no {KEY}".encode())
    server = served(lambda question, before: said)
    with Asker(endpoint(server.url)) as asker, pytest.raises(JudgeError, match=reason) as caught:
        asker.ask("which?")
    assert len(server.asked) == 1
    assert KEY not in str(caught.value)


def test_a_question_that_the_server_refuses_is_not_repeated(served: Any) -> None:
    server = served(lambda question, before: Said(status=400, body=f"too long; key {KEY}".encode()))
    with Asker(endpoint(server.url)) as asker, pytest.raises(QuestionError, match=r"HTTP 400: too long; key \[key\]"):
        asker.ask("which?")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("message", "text"),
    [({"content": None}, ""), ({"content": None, "refusal": "I will not."}, "I will not."), ({"content": ""}, "")],
)
def test_a_refusal_is_an_answer(served: Any, message: dict[str, Any], text: str) -> None:
    server = served(lambda question, before: Said(body=json.dumps({"choices": [{"message": message}]}).encode()))
    with Asker(endpoint(server.url)) as asker:
        assert asker.ask("which?") == text
    assert len(server.asked) == 1


def test_the_key_is_in_no_answer_and_in_no_repr(served: Any) -> None:
    server = served(lambda question, before: Said(f"Your key is {KEY}. Better: 1"))
    judge = endpoint(server.url)
    with Asker(judge) as asker:
        assert asker.ask("which?") == "Your key is [key]. Better: 1"
    assert KEY not in f"{judge!r} {judge.name} {judge.parameters}"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"base_url": f"https://user:{KEY}@host/v1"}, "no user, password or query"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "no user, password or query"),
        ({"base_url": "host/v1"}, "something like https://host/v1"),
        ({"base_url": "https://host:port/v1"}, "something like https://host/v1"),
        ({"model": ""}, "--model"),
        ({"key": f"{KEY}\n"}, "no key has"),
        ({"key": f"{KEY} {KEY}"}, "no key has"),
    ],
)
def test_a_faulty_endpoint_is_refused_without_repeating_the_key(given: dict[str, str], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        Endpoint(**{"base_url": "https://host/v1", "model": "m", **given})
    assert KEY not in str(caught.value)


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(base_url="nowhere", model="", key="a b")
    assert len(caught.value.faults) == 3
    with pytest.raises(ConfigError) as caught:
        parse_options(["seed", "model=x", "stop=[", "top_p=0.5"])
    assert len(caught.value.faults) == 3


def test_the_name_tells_judges_apart_but_not_keys() -> None:
    one = endpoint("http://localhost/v1")
    assert one.name == endpoint("http://localhost/v1/", key="other").name
    others = [endpoint("http://other/v1"), endpoint(one.base_url, model="n"), endpoint(one.base_url, options={"a": 1})]
    assert len({one.name, *(other.name for other in others)}) == 4
    assert endpoint("http://other/v1").is_exposed
    assert not any(e.is_exposed for e in (one, endpoint("https://other/v1"), endpoint("http://other/v1", key="")))


def test_stopping_ends_a_wait(served: Any) -> None:
    server = served(lambda question, before: Said(status=503))
    with Asker(endpoint(server.url, first_wait=60.0)) as asker:
        asker.stop()
        with pytest.raises(JudgeError, match="stopped"):
            asker.ask("which?")
