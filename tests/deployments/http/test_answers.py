"""What the running service answers: the same whole and streamed, in every mode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from inference_pio.kernels.dispatch import select_kernels
from inference_pio.workers.text.tokenizer import STOP_TEXT

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
SUM = {"messages": [{"role": "user", "content": "What is 12 + 30 + 5?"}], "max_tokens": 400}


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a stream, which must end as OpenAI's do."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        yield json.loads(line.removeprefix("data: "))


def joined(pieces: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Chat deltas put together, by choice; checks where the role and finish reason stand."""
    choices: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        for part in piece["choices"]:
            delta = part["delta"]
            if part["index"] not in choices:
                assert delta["role"] == "assistant"
                choices[part["index"]] = {"content": "", "reasoning": "", "finish": None}
            else:
                assert "role" not in delta
            choice = choices[part["index"]]
            assert choice["finish"] is None, "nothing follows a finish reason"
            assert delta.get("reasoning") == delta.get("reasoning_content")
            choice["content"] += delta.get("content", "")
            choice["reasoning"] += delta.get("reasoning", "")
            choice["finish"] = part["finish_reason"]
    return choices


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"seed": 2, "n": 3},
        {"seed": 3, "enable_thinking": False},
        {"seed": 4, "thinking_budget": 10},
        {"seed": 5, "thinking_budget": 0},
        {"seed": 6, "max_tokens": 12},
        {"seed": 7, "stop": ["4"]},
        {"seed": 8, "temperature": 1.5, "ignore_eos": True, "max_tokens": 60},
        {"seed": 9, "sampling_profile": "loop_averse"},
        {"seed": 10, "include_reasoning": False},
        {"seed": 11, "reasoning_effort": "none"},
    ],
    ids=lambda fields: json.dumps(fields),
)
def test_a_stream_joins_to_the_whole_answer(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {**SUM, **fields}
    whole = client.post(CHAT, json=body).json()
    streamed = joined(list(events(client, CHAT, body)))
    assert len(whole["choices"]) == len(streamed) == fields.get("n", 1)
    for choice in whole["choices"]:
        message, other = choice["message"], streamed[choice["index"]]
        assert message["content"] == other["content"]
        assert (message["reasoning"] or "") == other["reasoning"]
        assert message["reasoning"] == message["reasoning_content"]
        assert choice["finish_reason"] == other["finish"]
        if "thinking_budget" not in fields:  # a model cut short may spell the tag once more
            assert "think>" not in message["content"] + other["reasoning"]


def test_thinking_solves_the_sum(client: httpx.Client) -> None:
    whole = client.post(CHAT, json={**SUM, "seed": 1}).json()
    assert whole["choices"][0]["message"]["content"] == "47"
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 20
    assert whole["choices"][0]["finish_reason"] == "stop"


def test_with_thinking_off_all_text_is_content(client: httpx.Client) -> None:
    for fields in (
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "minimal"},
    ):
        whole = client.post(CHAT, json={**SUM, "seed": 1, **fields}).json()
        assert whole["choices"][0]["message"]["reasoning"] is None
        assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_the_budget_bounds_the_thought(client: httpx.Client) -> None:
    free = client.post(CHAT, json={**SUM, "seed": 1}).json()["choices"][0]["message"]["reasoning"]
    for name in ("thinking_token_budget", "thinking_budget", "thinking_budget_tokens"):
        whole = client.post(CHAT, json={**SUM, "seed": 1, name: 10}).json()
        reasoning = whole["choices"][0]["message"]["reasoning"]
        assert reasoning.endswith(STOP_TEXT)
        own = reasoning.removesuffix(STOP_TEXT).rstrip("\n")
        assert free.startswith(own)
        assert len(client.post("/tokenize", json={"prompt": own}).json()["tokens"]) <= 10


def test_a_cut_thought_keeps_its_reasoning(client: httpx.Client) -> None:
    (choice,) = client.post(CHAT, json={**SUM, "seed": 1, "max_tokens": 20}).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning"]


def test_usage_comes_last_and_only_where_asked_for(client: httpx.Client) -> None:
    body = {**SUM, "seed": 1}
    assert all("usage" not in piece for piece in events(client, CHAT, body))
    options = {"stream_options": {"include_usage": True}}
    pieces = list(events(client, CHAT, {**body, **options}))
    assert pieces[-1]["choices"] == []
    assert all(piece["usage"] is None for piece in pieces[:-1])
    whole = client.post(CHAT, json=body).json()["usage"]
    last = pieces[-1]["usage"]
    assert {k: last[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        k: whole[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    options = {"stream_options": {"continuous_usage_stats": True}}
    counts = [
        piece["usage"]["completion_tokens"] for piece in events(client, CHAT, {**body, **options})
    ]
    assert counts == sorted(counts)
    assert counts[-1] == whole["completion_tokens"]


def test_a_repeated_prompt_is_found_in_the_prefix_cache(client: httpx.Client) -> None:
    body = {"prompt": list(range(40, 140)), "max_tokens": 1, "cache_salt": "mine"}

    def cached(body: dict[str, Any]) -> int:
        usage = client.post(COMPLETE, json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(body) == 0
    assert cached(body) == 96
    assert cached({**body, "cache_salt": "yours"}) == 0


def test_completions_of_many_prompts_keep_their_order(client: httpx.Client) -> None:
    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 4, "echo": True, "seed": 3}
    choices = client.post(COMPLETE, json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"][:3] for choice in choices] == ["abc", "abc", "xyz", "xyz"]
    ids = [client.post("/tokenize", json={"prompt": t}).json()["tokens"] for t in ("abc", "xyz")]
    again = client.post(COMPLETE, json={**body, "prompt": ids}).json()["choices"]
    assert [choice["text"] for choice in again] == [choice["text"] for choice in choices]
    texts = dict.fromkeys(range(4), "")
    for piece in events(client, COMPLETE, body):
        for choice in piece["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice["text"] for choice in choices]


def test_echoed_prompts_have_logprobs(client: httpx.Client) -> None:
    body = {"prompt": "abcabc", "max_tokens": 2, "echo": True, "logprobs": 2, "seed": 1}
    (choice,) = client.post(COMPLETE, json=body).json()["choices"]
    scores = choice["logprobs"]
    assert "".join(scores["tokens"]) == choice["text"]
    assert scores["token_logprobs"][0] is None
    assert all(value <= 0 for value in scores["token_logprobs"][1:])
    assert all(2 <= len(best) <= 3 for best in scores["top_logprobs"][1:])
    for offset, token in zip(scores["text_offset"], scores["tokens"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    only = client.post(COMPLETE, json={**body, "max_tokens": 0}).json()["choices"][0]
    assert only["text"] == "abcabc"
    known = len(only["logprobs"]["tokens"])
    assert only["logprobs"]["token_logprobs"] == scores["token_logprobs"][:known]


def test_chat_logprobs_are_whole(client: httpx.Client) -> None:
    body = {**SUM, "seed": 1, "logprobs": True, "top_logprobs": 2}
    (choice,) = client.post(CHAT, json=body).json()["choices"]
    entries = choice["logprobs"]["content"]
    text = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
    assert text.endswith(choice["message"]["content"])
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in entries)
    streamed: list[Any] = []
    for piece in events(client, CHAT, body):
        for part in piece["choices"]:
            streamed += (part["logprobs"] or {"content": []})["content"]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]


def test_sampling_fields_act(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "abc", "max_tokens": 6, "temperature": 0}
    first = client.post("/tokenize", json={"prompt": "q"}).json()["tokens"]
    forced = client.post(COMPLETE, json={**body, "allowed_token_ids": first}).json()
    assert forced["choices"][0]["text"] == "q" * 6
    biased = client.post(COMPLETE, json={**body, "logit_bias": {str(first[0]): 100}}).json()
    assert biased["choices"][0]["text"] == "q" * 6
    stopped = client.post(
        COMPLETE, json={**body, "allowed_token_ids": first, "stop_token_ids": first}
    ).json()["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", first[0])
    barred = client.post(COMPLETE, json={**body, "bad_words": ["a"]}).json()
    assert "a" not in barred["choices"][0]["text"]
    cut = client.post(COMPLETE, json={**body, "allowed_token_ids": first, "stop": "qq"}).json()
    assert (cut["choices"][0]["text"], cut["choices"][0]["stop_reason"]) == ("", "qq")


def test_many_clients_at_once_get_their_own_answers(client: httpx.Client) -> None:
    def ask(seed: int) -> str:
        body = {**SUM, "seed": seed, "temperature": 1.2}
        message = client.post(CHAT, json=body).json()["choices"][0]["message"]
        return f"{message['reasoning']}|{message['content']}"

    alone = [ask(seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(ask, range(12)))
    assert together == alone


def test_text_and_ids_go_there_and_back(client: httpx.Client) -> None:
    text = "What is 7 + 8? é\N{GRINNING FACE}<think>"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = client.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}


def test_metrics_count_what_was_served(client: httpx.Client) -> None:
    assert client.post(CHAT, json={**SUM, "seed": 1}).status_code == 200
    assert client.get("/nowhere").status_code == 404
    text = client.get("/metrics").text
    for name in (
        "inference_pio_time_to_first_token_seconds_count",
        "inference_pio_time_to_first_answer_token_seconds_count",
        "inference_pio_thinking_tokens_total",
        "inference_pio_budget_ends_total",
        "inference_pio_loops_cut_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_sum",
        "vllm:request_queue_time_seconds_count",
        "vllm:request_prefill_time_seconds_count",
        "vllm:request_decode_time_seconds_count",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
    ):
        assert f"\n{name}{{" in text, name
    assert 'inference_pio_http_requests_total{route="other",status="404"}' in text
    assert "inference_pio_unknown_chunks 0.0" in text


def test_plain_endpoints(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok", "pools": {"engine": "ok"}}
    version = client.get("/version").json()
    assert version["version"]
    assert version["attention"] == {"engine": "full"}
    assert version["kernels"] == {"engine": select_kernels(torch.device("cpu"), torch.float32).name}
    (model,) = client.get("/v1/models").json()["data"]
    assert client.get(f"/v1/models/{model['id']}").json() == model
