"""Clients that leave, or read too slowly, hold nothing."""

from __future__ import annotations

import json
import re
import time

import httpx

from inference_pio.deployments.wire import HEARTBEAT_S

CHAT = "/v1/chat/completions"
ENDLESS = {
    "messages": [{"role": "user", "content": "hi"}],
    "ignore_eos": True,
    "max_tokens": 3500,
    "temperature": 1.0,
}


def metric(client: httpx.Client, name: str) -> float:
    """The sum over a metric's labels."""
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", client.get("/metrics").text, re.M)
    assert found, name
    return sum(map(float, found))


def wait_for_rest(client: httpx.Client) -> None:
    """Return when nothing runs; far earlier than any of these requests would end by itself."""
    end = time.monotonic() + 10
    while metric(client, "vllm:num_requests_running") > 0:
        assert time.monotonic() < end, "an abandoned request still runs"
        time.sleep(0.02)
    assert metric(client, "vllm:num_requests_waiting") == 0
    assert metric(client, "vllm:kv_cache_usage_perc") == 0


def test_leaving_a_stream_stops_it(client: httpx.Client) -> None:
    left = metric(client, "inference_pio_clients_left_total")
    for _ in range(3):
        with client.stream("POST", CHAT, json={**ENDLESS, "stream": True}) as answer:
            lines = answer.iter_lines()
            for _ in range(5):
                next(lines)
            assert metric(client, "vllm:num_requests_running") == 1
    wait_for_rest(client)
    assert metric(client, "inference_pio_clients_left_total") - left == 3


def test_leaving_before_the_answer_stops_it(client: httpx.Client) -> None:
    for _ in range(3):
        try:
            client.post(CHAT, json=ENDLESS, timeout=0.5)
        except httpx.ReadTimeout:
            continue
        raise AssertionError("the request was to take longer than that")
    wait_for_rest(client)


def test_the_shared_stream_outlives_the_request_that_opened_it(
    client: httpx.Client, service_url: str
) -> None:
    # The stream to the engine ends when idle (0.5 s here, looked at with each heartbeat), so the
    # next request opens it anew.
    time.sleep(2 * HEARTBEAT_S + 0.5)
    with httpx.Client(base_url=service_url, timeout=60) as opener:
        request = opener.build_request("POST", CHAT, json={**ENDLESS, "stream": True})
        first = opener.send(request, stream=True)
        next(first.iter_lines())
        with client.stream(
            "POST", CHAT, json={**ENDLESS, "max_tokens": 1500, "stream": True}
        ) as other:
            lines = other.iter_lines()
            next(lines)
            first.close()
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert not any("error" in line for line in rest)


def test_a_service_full_of_leavers_still_serves(client: httpx.Client, service_url: str) -> None:
    for _ in range(20):
        with httpx.Client(base_url=service_url) as other:
            request = other.build_request("POST", CHAT, json={**ENDLESS, "stream": True, "n": 3})
            other.send(request, stream=True).close()
    wait_for_rest(client)
    body = {"messages": [{"role": "user", "content": "What is 12 + 30 + 5?"}], "seed": 1}
    answer = client.post(CHAT, json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "47", json.dumps(answer.json())
