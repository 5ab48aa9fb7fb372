"""Pools, handoffs and ranks on real Ray: one answer from each, also while processes are killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from conftest import PoolsService, Split

Settle = Callable[..., None]
REPLICA = "ray::ServeReplica:pools:"
QUESTION = {"messages": [{"role": "user", "content": "What is 12 + 30 + 5?"}], "temperature": 0}


def prompt(number: int, size: int = 1500) -> list[int]:
    """Token ids that no other number shares a block with."""
    return [20 + (number * 31 + i * 7 + i // 11 * number) % 300 for i in range(size)]


def gone(processes: list[psutil.Process], timeout_s: float = 30) -> bool:
    """Whether all have ended within the time; zombies have."""
    _, alive = psutil.wait_procs(processes, timeout_s)
    return all(p.status() == psutil.STATUS_ZOMBIE for p in alive if p.is_running())


def logprobs(answer: dict[str, Any]) -> list[float]:
    return list(answer["choices"][0]["logprobs"]["token_logprobs"])


def test_every_topology_gives_the_same_tokens_and_logprobs(
    pools_service: PoolsService, split: Split
) -> None:
    before = pools_service.number("kv_imported_tokens_total", split.pool)
    answers = {
        model: pools_service.complete(model, prompt(1), max_tokens=16, logprobs=0)
        for model in ("unified", split.model, "ranks")
    }
    expected = answers.pop("unified")
    for model, answer in answers.items():
        assert answer["choices"][0]["text"] == expected["choices"][0]["text"], model
        assert logprobs(answer) == pytest.approx(logprobs(expected), abs=1e-3), model
    assert pools_service.number("kv_imported_tokens_total", split.pool) == before + 1499


def test_tickets_are_larger_than_what_ray_sends_inline(pools_service: PoolsService) -> None:
    """So that the other tests go through the object store: Ray inlines up to 100 KiB."""
    names = ("handoff_bytes_total", "handoff_tickets_total")
    before = [pools_service.number(name, "answer") for name in names]
    pools_service.text("split", prompt(2))
    size, count = (
        pools_service.number(name, "answer") - old for name, old in zip(names, before, strict=True)
    )
    assert count >= 5
    assert size / count > 100 * 2**10


def test_thoughts_and_streams_come_through_every_topology(pools_service: PoolsService) -> None:
    for model in ("split", "ranks"):
        plain = pools_service.client.post(
            "/v1/chat/completions", json={**QUESTION, "model": model}
        ).json()["choices"][0]["message"]
        assert plain["content"] == "47"
        assert plain["reasoning_content"]
        body = {**QUESTION, "model": model, "stream": True}
        with pools_service.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        parts = [json.loads(line)["choices"][0]["delta"] for line in lines]
        assert "".join(part.get("content") or "" for part in parts) == "47"
        thought = "".join(part.get("reasoning_content") or "" for part in parts)
        assert thought == plain["reasoning_content"]


def test_a_killed_prefill_replica_is_invisible(
    pools_service: PoolsService, split: Split, settle: Settle
) -> None:
    prompts = [prompt(number, 3000) for number in range(10, 18)]
    expected = [pools_service.text("unified", ids) for ids in prompts]
    (victim,) = pools_service.processes(REPLICA + "prefill")
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = [threads.submit(pools_service.text, split.model, ids) for ids in prompts]
        settle(lambda: pools_service.number("handoffs_running", split.pool) > 0, "no handoff ran")
        victim.kill()
        assert [answer.result() for answer in answers] == expected
    assert gone([victim])
    ends = pools_service.numbers("kv_import_ends_total", split.pool, by="reason")
    local = pools_service.numbers("prefill_decisions_total", split.pool, by="reason")["no_peer"]
    assert sum(ends.values()) - ends["done"] + local > 0, "the kill was not noticed"
    settle(
        lambda: pools_service.number("prefill_peers", split.pool) == 1,
        "the prefill replica did not come back",
    )
    (other,) = pools_service.processes(REPLICA + "prefill")
    assert other.pid != victim.pid
    before = pools_service.number("kv_imported_tokens_total", split.pool)
    assert pools_service.text(split.model, prompt(20)) == pools_service.text("unified", prompt(20))
    assert pools_service.number("kv_imported_tokens_total", split.pool) == before + 1499


def stream_text(
    service: PoolsService, model: str, meanwhile: Callable[[], None]
) -> tuple[str, str]:
    """A long greedy stream with something happening after its first tokens; text and error code."""
    body = {"model": model, "prompt": prompt(30, 40), "temperature": 0, "ignore_eos": True}
    text, error = "", ""
    with service.client.stream(
        "POST", "/v1/completions", json={**body, "max_tokens": 400, "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            error = event.get("error", {}).get("code", error)
            if "choices" in event:
                if not text:
                    meanwhile()
                text += event["choices"][0]["text"]
    return text, error


def test_after_quiet_nothing_is_held(
    pools_service: PoolsService, split: Split, settle: Settle
) -> None:
    before = pools_service.number("handoff_bytes_total", split.pool)
    pools_service.text(split.model, prompt(40))
    settle(
        lambda: pools_service.number("handoff_bytes_total", split.pool) > before,
        "nothing was handed over",
    )
    pools_service.expect_quiet()


@pytest.mark.slow
def test_a_redeployment_drops_no_stream(pools_service: PoolsService, settle: Settle) -> None:
    before = {p.pid for p in pools_service.processes(REPLICA)}

    def change(application: dict[str, Any]) -> None:
        application["args"]["pools"][0]["max_in_flight"] = 100
        application["args"]["pools"][2]["replicas"] = 2

    def redeploy() -> None:
        pools_service.deploy(change)
        settle(
            lambda: not before & {p.pid for p in pools_service.processes(REPLICA + "prefill")},
            "nothing was replaced",
        )

    text, error = stream_text(pools_service, "split", redeploy)
    assert (text, error) == stream_text(pools_service, "unified", lambda: None)
    settle(lambda: pools_service.number("prefill_peers", "answer") == 2, "no second replica")
