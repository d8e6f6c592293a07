"""The table of threats, and bad models offered (S10, S15, S16)."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moreward.checkpoint import write_manifest
from moreward.errors import MorewardError, RunError
from moreward.runs import read_model
from moreward.scoring import Scorer, load
from moreward.serve.door import conversation, rendered
from moreward.serve.worker import _load, answered
from serving import KEY, Model, application, result
from trained import card, edit_card, weights

Make = Callable[..., Path]

UP = ("../secret", "..", "../../etc/passwd", "chat/../../secret", "./chat", "....//secret", "..\\secret", "..;/a")
ESCAPED = ("%2e%2e/secret", "%2e%2e%2fsecret", "..%2fsecret", "..%5csecret", "%252e%252e%252f", "..%c0%afa", "%00")
ABSOLUTE = (
    "/etc/passwd",
    "//etc/passwd",
    "/proc/self/environ",
    "/dev/stdin",
    "C:\\secret",
    "C:/secret",
    "~/secret",
    "~",
)
ELSEWHERE = ("http://example.org/a", "https://example.org/a", "file:///etc/passwd", "ftp://example.org/a", "hf://a/b")
MORE = (
    "\\\\host\\share",
    "//host/share",
    "org/model",
    "org/model@main",
    "s3://bucket/key",
    "chat\x00",
    "chat\x00.json",
)
SIGNS = ("\uff0e\uff0e/secret", "\u2024\u2024/secret", "\u2025/secret", "..\u2215secret", "..\uff0fsecret")
PAYLOADS = (*UP, *ESCAPED, *ABSOLUTE, *ELSEWHERE, *MORE, *SIGNS)

opened: list[str] = []
watching = [False]


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching[0] and event in ("open", "socket.connect", "socket.getaddrinfo"):
        opened.append(f"{event} {arguments[0]!r}")


def length(job: Mapping[str, Any]) -> dict[str, Any]:
    return result(float(len(str(job.get("text", job.get("response"))))))


def test_40_names_that_are_paths_open_nothing() -> None:
    sys.addaudithook(watch)

    async def go() -> None:
        async with application(Model(length)) as (client, _):
            for name in ("model", "expert"):  # what is read once only
                await client.post("/v1/rewards", json={"items": [{"text": "a"}], name: "nobody"})
            await client.post("/classify", json={"input": "a", "model": "nobody"})
            watching[0] = True
            try:
                for name in PAYLOADS:
                    item = {"items": [{"text": "a"}]}
                    for path, body in (
                        ("/classify", {"input": "a", "model": name}),
                        ("/v1/rewards", {**item, "expert": name}),
                        ("/v1/rewards", {**item, "model": name}),
                    ):
                        reply = await client.post(path, json=body)
                        assert reply.status_code == 404, (path, name)
                        assert len(reply.content) < 1000
            finally:
                watching[0] = False

    asyncio.run(go())
    assert len(PAYLOADS) == 40
    assert opened == []


def test_other_pages_are_not_let_in_by_a_preflight() -> None:
    async def go() -> None:
        asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        for keys, code in (((), 405), ((KEY,), 401)):
            async with application(Model(length), keys=keys) as (client, _):
                for path in ("/v1/rewards", "/classify", "/get_reward"):
                    reply = await client.options(path, headers=asks)
                    assert reply.status_code == code
                    assert not [name for name in reply.headers if name.startswith("access-control-")]

    asyncio.run(go())


def test_what_a_page_of_another_site_can_send_without_asking_is_refused() -> None:
    async def go() -> None:
        async with application(Model(length)) as (client, _):
            for kind in (
                None,
                "",
                "text/plain",
                "application/x-www-form-urlencoded",
                "multipart/form-data; boundary=x",
            ):
                headers = {} if kind is None else {"Content-Type": kind}
                reply = await client.post("/classify", content=b'{"input": "a"}', headers=headers)
                assert (reply.status_code, len(reply.content) < 1000) == (415, True), kind
            typed = {"Content-Type": "application/json; charset=utf-8"}
            told = await client.post("/classify", content=b'{"input": "abc"}', headers=typed)
            assert told.json()["data"][0]["probs"] == [3.0]

    asyncio.run(go())


@pytest.mark.parametrize("name", ["chat_template", "chat_template_kwargs", "trust_remote_code", "lora_path"])
def test_templates_and_code_do_not_come_from_requests(name: str) -> None:
    nested = "{% for a in range(999999) %}{% for b in range(999999) %}{% endfor %}{% endfor %}"

    async def go() -> None:
        async with application(Model(length)) as (client, _):
            item = {"prompt": "a", "response": "b"}
            for path, body in (
                ("/v1/rewards", {"items": [item], name: nested}),
                ("/v1/rewards", {"items": [{**item, name: nested}]}),
                ("/classify", {"input": "a", name: nested}),
                ("/get_reward", {"query": ["a"], name: nested}),
            ):
                assert (await client.post(path, json=body)).status_code == 422

    asyncio.run(go())


# ---------------------------------------------------------------- retemplate


def test_retemplate_judges_the_response_alone_where_the_prompt_is_in_front() -> None:
    def answer(job: Mapping[str, Any]) -> dict[str, Any]:
        return result(float(len(job["response"])) if job.get("as_turns") else -1.0)

    queries = ["<u>hi</u>abc", "u>hi</u>abc", "<u>hi</u>", "abc"]
    body = {"query": queries, "prompts": ["<u>hi</u>", "<u>hi</u>", "<u>hi</u>", ""]}

    async def go() -> None:
        async with application(Model(answer), retemplate=True) as (client, _):
            told = (await client.post("/get_reward", json=body)).json()
            assert told["rewards"] == [3.0, -1.0, -1.0, -1.0]
            assert told["extra_logs"]["retemplated"] == [1, 0, 0, 0]
        async with application(Model(answer)) as (client, _):
            told = (await client.post("/get_reward", json=body)).json()
            assert told["rewards"] == [-1.0] * 4
            assert "retemplated" not in told["extra_logs"]

    asyncio.run(go())


# ---------------------------------------------------------------- models that are offered


@pytest.fixture
def spare(make: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make("arliss"), tmp_path / "run"))


def set_in(key: str, value: Any) -> Callable[[Path], None]:
    """Change the card as one who seals the folder again."""

    def change(run: Path) -> None:
        def changed(told: dict[str, Any]) -> dict[str, Any]:
            place: Any = told
            *way, last = key.split(".")
            for step in way:
                place = place[step]
            place[last] = value
            return told

        edit_card(run, changed)

    return change


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def changed(run: Path) -> None:
        save_file(change(weights(run)), run / "model" / "model.safetensors")
        write_manifest(run / "model", kind="moreward-model")

    return changed


def cut(run: Path) -> None:
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    write_manifest(run / "model", kind="moreward-model")


def pickled(run: Path) -> None:
    (run / "model" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    write_manifest(run / "model", kind="moreward-model")


def causal(run: Path) -> None:
    file = run / "model" / "experts" / "long" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "CAUSAL_LM"}))


def of(words: str, value: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Every tensor whose name holds `words` becomes another, or goes."""

    def change(told: dict[str, Any]) -> dict[str, Any]:
        assert [name for name in told if words in name], sorted(told)
        new = {name: value(one) if words in name else one for name, one in told.items()}
        return {name: one for name, one in new.items() if one is not None}

    return tensors(change)


BAD: dict[str, Callable[[Path], None]] = {
    "1 another base": set_in("backbone.sha256", "0" * 64),
    "2 targets not in the base": set_in("config.system.targets", ["no_such_layer"]),
    "3 another rank": set_in("config.system.rank", 5),
    "4 a huge alpha": set_in("config.system.alpha", 1e9),
    "5 fewer targets": set_in("config.system.targets", ["query"]),
    "6 another task": causal,
    "7 NaN": of("experts", lambda one: torch.full_like(one, float("nan")) if one.is_floating_point() else one),
    "8 no head": of("head", lambda one: None),
    "9 a tensor too many": tensors(lambda told: {**told, "more": torch.zeros(1)}),
    "10 cut": cut,
    "11 pickle": pickled,
    "12 another number of experts": set_in("domains", ["long", "short", "third"]),
}


@pytest.mark.parametrize("case", BAD)
def test_s15_a_bad_model_is_refused(case: str, spare: Path) -> None:
    BAD[case](spare)
    with pytest.raises(MorewardError):
        load(spare)


@pytest.mark.parametrize("change", [{"pad_token": "[MASK]"}, {"padding_side": "left"}, {"chat_template": "{{ 1 }}"}])
def test_s16_another_pad_side_or_template_is_refused(change: dict[str, str], spare: Path) -> None:
    file = spare / "model" / "backbone" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(RunError, match=r"tokenizer_config\.json"):
        load(spare)


def test_code_in_a_models_folder_is_not_run(spare: Path, tmp_path: Path) -> None:
    """`auto_map` of a type that transformers knows is ignored; a type that only the folder's code knows is refused."""
    wanted = load(spare).score([("a prompt", "an answer")])[0].number
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()\nclass Made: pass\n"
    backbone = spare / "model" / "backbone"
    (backbone / "made.py").write_text(code)
    file = backbone / "tokenizer_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "auto_map": {"AutoTokenizer": ["made.Made", "made.Made"]}}))
    write_manifest(spare / "model", kind="moreward-model")
    assert load(spare).score([("a prompt", "an answer")])[0].number == wanted
    assert not marker.exists()

    name = Path(card(spare)["backbone"]["name"])
    foreign = Path(shutil.copytree(name, tmp_path / "foreign"))
    (foreign / "made.py").write_text(code)
    config = json.loads((foreign / "config.json").read_text())
    for model_type in ("bert", "made"):
        kinds = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
        made = {**config, "model_type": model_type, "auto_map": dict.fromkeys(kinds, "made.Made")}
        (foreign / "config.json").write_text(json.dumps(made))
        from moreward.nn.backbone import Backbone

        if model_type == "bert":
            assert Backbone.load(str(foreign)).hidden_size == 32
        else:
            with pytest.raises(MorewardError):
                Backbone.load(str(foreign))
        assert not marker.exists()


def test_s10_s11_a_poisoned_text_changes_no_other_reward(make: Make) -> None:
    """A real model whose rewards of one text are NaN, and one text that is too long, among 30."""
    system, encoder, told = read_model(make("arliss"))
    scorer = Scorer(system, encoder, told, device="cpu", deterministic=True)
    good = [conversation(f"prompt {i}", "an answer") for i in range(30)]
    wanted = answered(scorer, good)
    poison = conversation("a prompt", "!")
    used = {i for job in good for i in encoder.tokenizer(f"{job['prompt']} {job['response']}")["input_ids"]}
    only = set(encoder.tokenizer("!")["input_ids"]) - used
    assert only
    with torch.no_grad():
        for backbone in system.backbones():
            backbone.model.get_input_embeddings().weight[sorted(only)] = float("nan")
    found = answered(scorer, [*good[:10], poison, *good[10:], rendered("word " * 500)])
    assert found.pop(10)["error"]["code"] == "non_finite"
    assert found.pop()["error"]["code"] == "too_long"
    assert found == wanted


@pytest.mark.parametrize("name", ["manifest.json", "experts/long/adapter_model.safetensors"])
def test_s18_s19_the_models_process_refuses_to_start_without(name: str, spare: Path) -> None:
    """An expert that is missing is never passed over for another."""
    (spare / "model" / name).unlink()
    told = {"run": str(spare), "device": "cpu", "dtype": "fp32", "backbone": None, "free_batches": False}
    with pytest.raises(RunError, match=f"{name}: missing"):
        _load(told)
