"""Every format: what is sent, what comes back, and that it is the reward that the library gives, to the bit."""

from __future__ import annotations

import base64
import json
import math
import struct
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moreward.scoring import Scorer
from moreward.serve.openapi import described
from moreward.types import Rendered
from serving import Live

PROMPT, RESPONSE = "Tell me of the sea.", "It is calm, and there is more to say of it."


def posted(client: httpx2.Client, route: str, body: Any, **more: Any) -> Any:
    reply = client.post(route, json=body, **more)
    assert reply.status_code == 200, reply.text
    return reply.json()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_rewards_are_the_librarys_and_explain_themselves(client: httpx2.Client, scorer: Scorer) -> None:
    items: list[dict[str, Any]] = [
        {"id": "a", "prompt": PROMPT, "response": RESPONSE},
        {"prompt": PROMPT, "response": "No."},
        {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "No."}]},
        {"text": "already rendered"},
    ]
    told = posted(client, "/v1/rewards", {"items": items, "explain": True})
    turns = ([{"role": "user", "content": PROMPT}], [{"role": "assistant", "content": "No."}])
    wanted = scorer.score([(PROMPT, RESPONSE), (PROMPT, "No."), turns, Rendered(text="already rendered")], explain=True)
    assert [row["score"] for row in told["data"]] == [r.reward for r in wanted]
    assert [row["id"] for row in told["data"]] == ["a", "1", "2", "3"]
    for row, reward in zip(told["data"], wanted, strict=True):
        assert row["expert_scores"] == dict(reward.expert_rewards)
        assert row["route"]["weights"] == dict(reward.weights)
        assert row["route"]["entropy"] == pytest.approx(reward.router_entropy)
        assert row["tokens"] == reward.num_tokens
    assert told["model"] == "mixture"
    assert told["usage"]["total_tokens"] == sum(r.num_tokens for r in wanted)


@pytest.mark.parametrize("expert", ["short", "long"])
def test_an_expert_can_be_asked_by_name_on_every_door(client: httpx2.Client, scorer: Scorer, expert: str) -> None:
    wanted = scorer.score([(PROMPT, RESPONSE)], expert=expert)[0].number
    told = scorer.score([(PROMPT, RESPONSE)], explain=True)[0]
    assert wanted == pytest.approx(told.expert_rewards[expert], abs=1e-4)
    assert (wanted == told.reward) == (expert == told.expert)
    item = {"prompt": PROMPT, "response": RESPONSE}
    assert posted(client, "/v1/rewards", {"items": [item], "expert": expert})["data"][0]["score"] == wanted
    body = {"model": expert, "text_1": PROMPT, "text_2": RESPONSE}
    assert posted(client, "/score", body)["data"][0]["score"] == wanted
    unknown = client.post("/classify", json={"model": "nobody", "input": "x"})
    assert unknown.status_code == 404
    assert "mixture, long, short" in unknown.json()["error"]["message"]


def test_compare_orders_and_gives_calibrated_probabilities(client: httpx2.Client, scorer: Scorer) -> None:
    responses = ["No.", RESPONSE, "Perhaps it is."]
    told = posted(client, "/v1/compare", {"prompt": PROMPT, "responses": responses})
    compared = scorer.compare(PROMPT, responses, uncertainty=True)
    assert told["scores"] == [r.reward for r in compared.rewards]
    assert told["order"] == compared.order
    assert told["best"] == compared.order[0]
    for mine, theirs in zip(told["probabilities"], compared.probabilities, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    a, b = told["scores"][:2]
    assert told["margins"][0][1] == a - b


def test_openrlhf(client: httpx2.Client, scorer: Scorer) -> None:
    query = f"{PROMPT}{RESPONSE}"
    told = posted(client, "/get_reward", {"query": [query], "prompts": [PROMPT], "labels": [None]})
    wanted = scorer.score([Rendered(text=query, prompt=PROMPT)])[0]
    assert told["rewards"] == [wanted.reward]
    temperature = scorer.calibration().temperature(wanted.expert)
    assert told["scores"] == pytest.approx([sigmoid(wanted.number / temperature)])
    assert told["extra_logs"]["expert"] == [scorer.experts.index(wanted.expert)]
    assert posted(client, "/get_reward", {"query": []})["rewards"] == []
    alone = scorer.score([Rendered(text=query)])[0].reward
    assert posted(client, "/get_reward", {"query": query})["rewards"] == [alone]


def test_vllm_verl_and_sglang(client: httpx2.Client, scorer: Scorer) -> None:
    text = "hello there [SEP] fine"
    wanted = scorer.score([Rendered(text=text, special_tokens=True)])[0].number
    ids = list(scorer.encoder.tokenizer(text)["input_ids"])
    for route in ("/classify", "/v1/classify"):
        told = posted(client, route, {"model": "alias", "input": text, "use_activation": False})
        assert told["data"][0] == {"index": 0, "label": "REWARD", "probs": [wanted], "num_classes": 1}
        assert told["model"] == "alias"
    assert posted(client, "/classify", {"input": f"[CLS] {text}"})["data"][0]["probs"] == [wanted], "doubled BOS"
    assert posted(client, "/classify", {"input": [text, "b"]})["data"][0]["probs"] == [wanted]
    assert posted(client, "/classify", {"input": ids})["data"][0]["probs"] == [wanted]
    assert posted(client, "/classify", {"input": text, "activation": True})["data"][0]["probs"] == [sigmoid(wanted)]
    assert posted(client, "/pooling", {"input": text, "task": "classify"})["data"][0]["data"] == [wanted]
    embedded = posted(client, "/v1/embeddings", {"input": text})["data"]
    assert embedded[-1]["embedding"][-1] == wanted
    packed = posted(client, "/v1/embeddings", {"input": text, "encoding_format": "base64"})["data"][0]["embedding"]
    assert struct.unpack("<f", base64.b64decode(packed))[0] == pytest.approx(wanted)
    assert posted(client, "/classify", {"text": text})["embedding"] == [wanted]
    assert [one["embedding"] for one in posted(client, "/classify", {"text": [text]})] == [[wanted]]
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]
    wanted = scorer.score([([turns[0]], [turns[1]])])[0].number
    assert posted(client, "/classify", {"messages": turns})["data"][0]["probs"] == [wanted]
    listed = client.get("/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [
        ("mixture", None),
        ("alias", None),
        ("long", "mixture"),
        ("short", "mixture"),
    ]


def test_pairs_and_rankings(client: httpx2.Client, scorer: Scorer) -> None:
    texts = ["No.", RESPONSE]
    wanted = [r.number for r in scorer.score([(PROMPT, t) for t in texts])]
    best = max(range(2), key=wanted.__getitem__)
    for names in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        told = posted(client, "/v1/score", {names[0]: PROMPT, names[1]: texts})
        assert [row["score"] for row in told["data"]] == wanted
    assert posted(client, "/score", {"text_1": [PROMPT, PROMPT], "text_2": texts})["data"][1]["score"] == wanted[1]
    for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
        told = posted(client, route, {"query": PROMPT, "documents": texts})
        assert told["results"][0] == {
            "index": best,
            "document": {"text": texts[best]},
            "relevance_score": wanted[best],
        }
    assert len(posted(client, "/rerank", {"query": PROMPT, "documents": texts, "top_n": 1})["results"]) == 1
    told = posted(client, "/rerank", {"query": PROMPT, "texts": texts, "raw_scores": True, "return_text": True})
    assert told[0] == {"index": best, "score": wanted[best], "text": texts[best]}
    told = posted(client, "/predict", {"inputs": [[PROMPT, RESPONSE], ["alone"]]})
    alone = scorer.score([Rendered(text="alone", special_tokens=True)])[0].number
    assert told == [
        [{"score": sigmoid(wanted[1]), "label": "REWARD"}],
        [{"score": pytest.approx(sigmoid(alone)), "label": "REWARD"}],
    ]
    assert posted(client, "/predict", {"inputs": [PROMPT, RESPONSE], "raw_scores": True})[0]["score"] == wanted[1]
    none = {"inputs": "alone", "parameters": {"function_to_apply": "none"}}
    assert posted(client, "/predict", none)[0]["score"] == alone
    assert client.get("/info").json()["model_type"] == {
        "classifier": {"id2label": {"0": "REWARD"}, "label2id": {"REWARD": 0}}
    }


def test_llamafactory_and_slime(client: httpx2.Client, scorer: Scorer) -> None:
    wanted = scorer.score([Rendered(text="hello there")])[0].number
    told = posted(client, "/v1/score/evaluation", {"model": "model", "messages": ["hello there"], "max_length": None})
    assert told["scores"] == [wanted]
    assert told["model"] == "model"
    empty = client.post("/v1/score/evaluation", json={"model": "model", "messages": []})
    assert empty.status_code == 400
    assert "scores" not in empty.text
    wanted = scorer.score([(PROMPT, RESPONSE)])[0].number
    body = {"prompt": PROMPT, "response": RESPONSE, "label": "x"}
    assert posted(client, "/rm", body) == wanted
    assert posted(client, "/rm?key=score", body) == {"score": wanted}


def test_the_inference_client_of_the_hub_is_answered(
    live: Live, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import InferenceClient

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    told = InferenceClient(model=f"{live.url}/predict").text_classification("hello there")
    wanted = scorer.score([Rendered(text="hello there", special_tokens=True)])[0].number
    assert told.label == "REWARD"  # type: ignore[attr-defined]  a flat list is one element there
    assert told.score == pytest.approx(sigmoid(wanted))  # type: ignore[attr-defined]


def test_too_long_is_refused_unless_asked_and_then_said(client: httpx2.Client) -> None:
    long = "word " * 300
    plain = client.post("/v1/rewards", json={"items": [{"prompt": PROMPT, "response": long}]})
    assert plain.status_code == 422
    assert (plain.json()["code"], plain.json()["index"]) == ("too_long", 0)
    cut = client.post("/v1/rewards", json={"items": [{"prompt": PROMPT, "response": long}], "truncate": "left"})
    assert cut.json()["data"][0]["truncated"] is True
    assert cut.headers["X-Truncated"] == "1"
    for route, body in (
        ("/classify", {"input": long}),
        ("/predict", {"inputs": long}),
        ("/get_reward", {"query": long}),
        ("/rerank", {"query": "q", "documents": [long]}),
    ):
        assert client.post(route, json=body).status_code == 422, route
    assert client.post("/classify", json={"input": long, "truncate_prompt_tokens": -1}).headers["X-Truncated"] == "1"
    assert client.post("/predict", json={"inputs": long, "truncate": True}).headers["X-Truncated"] == "1"


def test_one_bad_item_is_named_or_gets_its_own_error(client: httpx2.Client) -> None:
    good = [{"id": f"g{i}", "prompt": PROMPT, "response": f"It is {i}."} for i in range(8)]
    wanted = posted(client, "/v1/rewards", {"items": good})["data"]
    bad = [
        *good[:5],
        {"id": "bad", "prompt": PROMPT, "response": " "},
        *good[5:],
        {"prompt": "a", "response": "b " * 400},
    ]
    refused = client.post("/v1/rewards", json={"items": bad})
    assert refused.status_code == 422
    assert (refused.json()["code"], refused.json()["param"], refused.json()["index"]) == (
        "empty_response",
        "items[5].response",
        5,
    )
    told = posted(client, "/v1/rewards", {"items": bad, "on_error": "item"})["data"]
    assert [row["index"] for row in told] == list(range(10))
    assert told[5]["error"]["code"] == "empty_response"
    assert told[9]["error"]["code"] == "too_long"
    assert [row["score"] for row in (*told[:5], *told[6:9])] == [row["score"] for row in wanted]


def test_what_could_change_a_reward_is_not_ignored(client: httpx2.Client) -> None:
    for route, body in (
        ("/classify", {"input": "a", "normalize": True}),
        ("/classify", {"input": "a", "chat_template": "{{ 1 }}"}),
        ("/classify", {"input": "a", "softmax": True}),
        ("/classify", {"input": "a", "add_generation_prompt": True}),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 5}),
        ("/classify", {"input": "a", "text": "a"}),
        ("/predict", {"inputs": "a", "truncate": True, "truncation_direction": "Right"}),
        ("/v1/rewards", {"items": [{"text": "a", "weight": 2}]}),
        ("/v1/score/evaluation", {"messages": ["a"], "max_length": 4}),
    ):
        assert client.post(route, json=body).status_code == 422, (route, body)
    ignored = {"input": "a", "priority": 3, "request_id": "x", "user": "me"}
    assert client.post("/classify", json=ignored).status_code == 200


def test_the_same_text_gets_the_same_bits_in_any_company(client: httpx2.Client) -> None:
    import random

    texts = [f"{PROMPT} {'and so on ' * (i % 9)}{i}" for i in range(24)]
    alone = {t: posted(client, "/classify", {"input": t})["data"][0]["probs"][0] for t in texts}
    for seed in range(12):
        some = random.Random(seed).sample(texts, 3 + seed)
        told = posted(client, "/classify", {"input": some})["data"]
        assert [row["probs"][0] for row in told] == [alone[t] for t in some]


def test_openapi_lists_every_format(client: httpx2.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/rewards", "/v1/compare", "/get_reward", "/classify", "/predict", "/rerank", "/rm"} <= set(paths)


def test_the_description_that_is_checked_in_is_that_of_the_routes() -> None:
    file = Path(__file__).parents[2] / "docs" / "openapi.json"
    again = "python -m moreward.serve.openapi > docs/openapi.json"
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(described()), again


def test_tei_says_what_a_reply_cost(client: httpx2.Client) -> None:
    reply = client.post("/predict", json={"inputs": [[PROMPT, RESPONSE], ["alone"]]})
    told = {name: value for name, value in reply.headers.items() if name.startswith("x-") and "time" in name}
    assert set(told) == {f"x-{what}-time" for what in ("compute", "total", "tokenization", "queue", "inference")}
    milliseconds = {name: int(value) for name, value in told.items()}
    assert milliseconds["x-total-time"] >= milliseconds["x-inference-time"] >= 0
    assert reply.headers["x-compute-type"] == "cpu"
    assert reply.headers["x-compute-characters"] == str(len(PROMPT + RESPONSE + "alone"))
    one_by_one = [client.post("/predict", json={"inputs": [i]}) for i in ([PROMPT, RESPONSE], ["alone"])]
    tokens = [int(one.headers["x-compute-tokens"]) for one in one_by_one]
    assert reply.headers["x-compute-tokens"] == str(sum(tokens))
    assert min(tokens) > 0
    ranked = client.post("/rerank", json={"query": PROMPT, "texts": [RESPONSE]})
    assert ranked.headers["x-compute-tokens"] == str(tokens[0])


def test_metrics_count_and_name_no_text(client: httpx2.Client) -> None:
    posted(client, "/v1/rewards", {"items": [{"prompt": "canary-prompt", "response": "canary-response"}]})
    text = client.get("/metrics").text
    assert 'moreward_requests_total{code="200",route="/v1/rewards"}' in text
    assert "moreward_queue_items 0.0" in text
    assert "moreward_ready 1.0" in text
    assert "canary" not in text
