"""Bounds that need a service of their own configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

CHAT = "/v1/chat/completions"
LONG = {
    "messages": [{"role": "user", "content": "hi"}],
    "ignore_eos": True,
    "max_tokens": 3000,
    "temperature": 1.0,
}
SHORT = {**LONG, "max_tokens": 2}


def test_a_full_service_refuses_at_once_and_says_when_to_come_back(in_process: Any) -> None:
    async def main() -> None:
        async with in_process(api={"max_in_flight": 2, "retry_after_s": 7}) as (client, _):
            body = {**LONG, "max_tokens": 600}
            running = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(2)]
            await asyncio.sleep(0.1)
            refused = await client.post(CHAT, json=SHORT)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "7"
            assert refused.json()["error"]["code"] == "overloaded"
            assert (await client.get("/health")).status_code == 200
            assert [(await task).status_code for task in running] == [200, 200]
            assert (await client.post(CHAT, json=SHORT)).status_code == 200

    asyncio.run(main())


def test_a_full_engine_queue_is_a_503_too(in_process: Any) -> None:
    engine = {
        "model": "embedded",
        "block_size": 16,
        "kv_cache_bytes": 32 * 2**20,
        "num_threads": 1,
        "max_num_seqs": 1,
        "max_waiting": 2,
    }

    async def main() -> None:
        async with in_process(engine=engine, api={"max_prompts": 2}) as (client, _):
            body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=body) for _ in range(8))
            )
            statuses = sorted(answer.status_code for answer in answers)
            assert set(statuses) == {200, 503}
            refused = next(answer for answer in answers if answer.status_code == 503)
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "queue_full"

    asyncio.run(main())


def test_the_deadline_is_a_504_or_an_error_event(in_process: Any) -> None:
    async def main() -> None:
        async with in_process(api={"request_timeout_s": 0.3}) as (client, _):
            late = await client.post(CHAT, json=LONG)
            assert late.status_code == 504
            assert late.json()["error"]["code"] == "deadline_exceeded"
            stream = await client.post(CHAT, json={**LONG, "stream": True})
            assert stream.status_code == 200
            events = [line for line in stream.text.splitlines() if line]
            assert '"error"' in events[-1]
            assert "deadline_exceeded" in events[-1]
            assert '"finish_reason":"' not in stream.text
            assert "[DONE]" not in stream.text
            assert (await client.post(CHAT, json=SHORT)).status_code == 200

    asyncio.run(main())


def test_bodies_are_bounded_in_size_and_time(in_process: Any) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b'{"prompt":'
        await asyncio.sleep(5)
        yield b'"a"}'

    async def main() -> None:
        limits = {"max_body_bytes": 2000, "body_timeout_s": 0.2}
        async with in_process(api=limits) as (client, _):
            headers = {"content-type": "application/json"}
            late = await client.post("/tokenize", content=slow(), headers=headers)
            assert late.status_code == 408
            fits = {"prompt": "a" * 1900}
            assert (await client.post("/tokenize", json=fits)).status_code == 200
            big = await client.post("/tokenize", json={"prompt": "a" * 2000})
            assert big.status_code == 413

    asyncio.run(main())


def test_the_servers_thinking_settings_hold_for_silent_requests(in_process: Any) -> None:
    question = {"messages": [{"role": "user", "content": "What is 12 + 30 + 5?"}], "seed": 1}

    async def main() -> None:
        async with in_process(thinking={"default": False}) as (client, _):
            answer = (await client.post(CHAT, json=question)).json()
            assert answer["choices"][0]["message"]["reasoning"] is None
            on = (await client.post(CHAT, json={**question, "enable_thinking": True})).json()
            assert on["choices"][0]["message"]["reasoning"]
        async with in_process(thinking={"max_budget": 5}) as (client, _):
            body = {**question, "thinking_budget": 500, "max_tokens": 400}
            answer = (await client.post(CHAT, json=body)).json()
            assert "Considering the limited time" in answer["choices"][0]["message"]["reasoning"]

    asyncio.run(main())
