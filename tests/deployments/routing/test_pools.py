"""Several pools behind one ingress: real engines in this process, real HTTP requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.ingress import create_app
from inference_pio.deployments.wire import RouteHints, SubmitReply, route_hints
from inference_pio.workers.engine import Engine
from inference_pio.workers.loading import load_text
from inference_pio.workers.model_source import resolve_model
from inference_pio.workers.phases import read_prompt
from inference_pio.workers.types import GenerateRequest, ThinkingMode

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
SUM = {"messages": [{"role": "user", "content": "What is 12 + 30 + 5?"}], "max_tokens": 300}
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
ENDLESS = {**HELLO, "ignore_eos": True, "max_tokens": 4000, "temperature": 1.0}
THINKERS: dict[str, Any] = {"name": "thinkers", "modes": ["thinking", "auto"]}
ANSWERS: dict[str, Any] = {"name": "answers", "modes": ["non_thinking", "auto"]}
BY_MODE: dict[str, Any] = {
    "pools": [THINKERS, {**ANSWERS, "max_in_flight": 1}],
    "thinking": {"default": "auto"},
}


def route_of(answer: httpx.Response) -> dict[str, str]:
    """The route header, taken apart."""
    assert answer.status_code == 200, answer.text
    header = answer.headers["x-inference-pio-route"]
    return dict(part.split("=", 1) for part in header.split("; "))


def saying(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


async def running(service: EngineService, wanted: int) -> None:
    """Wait until so many sequences run."""
    async with asyncio.timeout(10):
        while (await service.stats(replica_id=service.replica_id)).running != wanted:
            await asyncio.sleep(0.005)


@asynccontextmanager
async def held(
    client: httpx.AsyncClient, service: EngineService, body: dict[str, Any]
) -> AsyncIterator[None]:
    """One endless request inside a pool for the block."""
    task = asyncio.create_task(client.post(CHAT, json={**ENDLESS, **body}))
    await running(service, 1)
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await running(service, 0)


def test_the_mode_decides_the_pool(in_process_pools: Any) -> None:
    thinking = {"mode": "thinking", "pool": "thinkers"}
    plain = {"mode": "non_thinking", "pool": "answers"}
    cases: list[tuple[dict[str, Any], dict[str, str], str]] = [
        ({"enable_thinking": True}, thinking, "explicit:enable_thinking"),
        ({"enable_thinking": False}, plain, "explicit:enable_thinking"),
        ({"reasoning_effort": "none"}, plain, "explicit:reasoning_effort"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, thinking, "explicit:thinking"),
        ({"thinking": {"type": "disabled"}}, plain, "explicit:thinking"),
        ({"thinking_budget": 20}, thinking, "explicit:budget"),
        ({"thinking_budget": 0}, plain, "explicit:budget"),
        (saying("hi /no_think"), plain, "explicit:soft_switch"),
        (saying("hi /no_think and /think"), thinking, "explicit:soft_switch"),
        (saying("hi"), plain, "auto:plain"),
        (saying("What is 12 + 30 + 5?"), thinking, "auto:math"),
    ]

    async def main() -> None:
        async with in_process_pools(**BY_MODE) as (client, services):
            for fields, expected, reason in cases:
                whole = await client.post(CHAT, json={**HELLO, **fields})
                stream = await client.post(CHAT, json={**HELLO, **fields, "stream": True})
                for answer in (whole, stream):
                    found = route_of(answer)
                    assert {key: found[key] for key in expected} == expected, fields
                    assert found["reason"] == reason
            for name, service in services.items():
                stats = await service.stats(replica_id=service.replica_id)
                wanted = 2 * sum(expected["pool"] == name for _, expected, _ in cases)
                assert sum(stats.requests_finished.values()) == wanted

    asyncio.run(main())


def test_a_soft_switch_is_rendered_as_the_setting_it_stands_for(in_process_pools: Any) -> None:
    """The engine reads mode and sampling from the prompt: it must end with the empty block."""

    async def main() -> None:
        async with in_process_pools(**BY_MODE) as (client, _):

            async def ids(**fields: Any) -> list[int]:
                body = {**saying("hi /no_think"), **fields}
                del body["max_tokens"]
                return list((await client.post("/tokenize", json=body)).json()["tokens"])

            switched = await ids()
            assert switched == await ids(enable_thinking=False)
            marks = load_text(resolve_model("embedded")).phase_tokens
            assert read_prompt(switched, marks).mode is ThinkingMode.NON_THINKING
            # Under an explicit setting the switch is the model's to read.
            assert switched != await ids(enable_thinking=True)
            answer = (await client.post(CHAT, json=saying("What is 2 + 3? /no_think"))).json()
            assert answer["choices"][0]["message"]["reasoning"] is None
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0

    asyncio.run(main())


def test_complexity_grants_a_budget_under_the_ceiling(in_process_pools: Any) -> None:
    async def main() -> None:
        thinking = {
            "default": "auto",
            "max_budget": 12,
            "effort": {"low": 10, "medium": 20, "high": 30},
        }
        async with in_process_pools(**{**BY_MODE, "thinking": thinking}) as (client, _):
            answer = await client.post(CHAT, json={**SUM, "seed": 1})
            found = route_of(answer)
            assert found["reason"] == "auto:math"
            assert found["budget"] == "12"
            assert 0.3 < float(found["complexity"]) < 1
            message = answer.json()["choices"][0]["message"]
            assert "Considering the limited time" in message["reasoning"]

    asyncio.run(main())


def test_a_full_pool_refuses_while_another_serves(in_process_pools: Any) -> None:
    async def main() -> None:
        async with in_process_pools(**BY_MODE) as (client, services):
            async with held(client, services["answers"], {"enable_thinking": False}):
                refused = await client.post(CHAT, json={**HELLO, "enable_thinking": False})
                assert refused.status_code == 503
                assert refused.headers["retry-after"] == "1"
                error = refused.json()["error"]
                assert error["code"] == "overloaded"
                assert "answers (1 of 1)" in error["message"]
                assert "x-inference-pio-route" not in refused.headers
                other = await client.post(CHAT, json={**HELLO, "enable_thinking": True})
                assert route_of(other)["pool"] == "thinkers"
                text = (await client.get("/metrics")).text
                assert 'inference_pio_pool_requests_in_flight{pool="answers"} 1.0' in text
                assert 'inference_pio_pool_requests_limit{pool="answers"} 1.0' in text
                assert 'inference_pio_refusals_total{reason="overloaded"} 1.0' in text
            again = await client.post(CHAT, json={**HELLO, "enable_thinking": False})
            assert route_of(again)["pool"] == "answers"
            text = (await client.get("/metrics")).text
            assert 'inference_pio_pool_requests_in_flight{pool="answers"} 0.0' in text

    asyncio.run(main())


def test_a_full_model_refuses_before_it_reads_the_conversation(in_process_pools: Any) -> None:
    pools = [{"name": "only", "max_in_flight": 1}]
    broken = {"messages": [{"role": "robot"}]}

    async def main() -> None:
        async with in_process_pools(pools=pools) as (client, services):
            async with held(client, services["only"], {}):
                assert (await client.post(CHAT, json=broken)).status_code == 503
                body = {"prompt": [10**9]}
                assert (await client.post(COMPLETE, json=body)).status_code == 503
            assert (await client.post(CHAT, json=broken)).status_code == 400

    asyncio.run(main())


def test_every_place_is_given_back(in_process_pools: Any) -> None:
    """A burst above the limit: as many inside as there are places, and none lost by any end."""

    async def main() -> None:
        pools = [{"name": "only", "max_in_flight": 3}]
        async with in_process_pools(pools=pools) as (client, _):
            bodies: list[dict[str, Any]] = [
                *[{**SUM, "seed": seed, "stream": seed % 2 == 0} for seed in range(8)],
                {**HELLO, "temperature": -1},
                {**HELLO, "messages": [{"role": "user", "content": "q" * 5000}]},
            ]
            for _ in range(3):
                answers = await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))
                statuses = [answer.status_code for answer in answers]
                assert set(statuses) <= {200, 400, 503}
                assert statuses.count(200) >= 3
                assert 503 in statuses
            text = (await client.get("/metrics")).text
            assert 'inference_pio_pool_requests_in_flight{pool="only"} 0.0' in text
            assert (await client.post(CHAT, json=HELLO)).status_code == 200

    asyncio.run(main())


def test_of_several_pools_the_least_full_one_serves(in_process_pools: Any) -> None:
    pools = [{"name": "one", "max_in_flight": 2}, {"name": "two", "max_in_flight": 8}]

    async def main() -> None:
        async with in_process_pools(pools=pools) as (client, services):
            assert route_of(await client.post(CHAT, json=HELLO))["pool"] == "one"
            async with held(client, services["one"], {}):
                assert route_of(await client.post(CHAT, json=HELLO))["pool"] == "two"
                async with held(client, services["two"], {}):  # 1 of 2 against 1 of 8
                    assert route_of(await client.post(CHAT, json=HELLO))["pool"] == "two"

    asyncio.run(main())


def test_a_long_prompt_moves_to_the_pool_that_holds_it(in_process_pools: Any) -> None:
    pools = [
        {"name": "short", "engine": {"max_model_len": 128}},
        {"name": "long", "engine": {"max_model_len": 512}, "max_in_flight": 1},
    ]

    async def main() -> None:
        async with in_process_pools(pools=pools) as (client, _):
            for size, pool in ((100, "short"), (300, "long")):
                body = {"prompt": [5] * size, "max_tokens": 2}
                assert route_of(await client.post(COMPLETE, json=body))["pool"] == pool
            body = {"prompt": [[5], [5] * 510], "max_tokens": 2}
            assert route_of(await client.post(COMPLETE, json=body))["pool"] == "long"
            body = {"prompt": [5] * 511, "max_tokens": 2}
            error = (await client.post(COMPLETE, json=body)).json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert "holds 512 tokens" in error["message"]
            text = (await client.get("/metrics")).text
            for name in ("short", "long"):
                assert f'pool_requests_in_flight{{pool="{name}"}} 0.0' in text
            models = (await client.get("/v1/models")).json()["data"]
            assert models[0]["max_model_len"] == 512
            assert [pool["max_model_len"] for pool in models[0]["pools"]] == [128, 512]

    asyncio.run(main())


def test_raw_prompts_take_the_same_way(in_process_pools: Any) -> None:
    async def main() -> None:
        async with in_process_pools(**BY_MODE) as (client, services):
            body = {"prompt": ["a", "b", "c"], "max_tokens": 2}
            for fields, pool, reason in (
                ({}, "thinkers", "default:template"),
                ({"thinking_budget": 0}, "answers", "explicit:budget"),
                ({"thinking_budget_tokens": 9}, "thinkers", "explicit:budget"),
            ):
                before = {
                    name: sum(
                        (
                            await service.stats(replica_id=service.replica_id)
                        ).requests_finished.values()
                    )
                    for name, service in services.items()
                }
                answer = await client.post(COMPLETE, json={**body, **fields})
                found = route_of(answer)
                assert (found["pool"], found["reason"]) == (pool, reason)
                assert len(answer.json()["choices"]) == 3
                stats = await services[pool].stats(replica_id=services[pool].replica_id)
                assert sum(stats.requests_finished.values()) == before[pool] + 3

    asyncio.run(main())


def two_models(folder: Path) -> dict[str, Any]:
    return {
        "pools": [
            {"name": "small", "served_model_name": "small-hybrid"},
            {
                "name": "large",
                "model": str(folder),
                "served_model_name": "large-instruct",
                "modes": ["non_thinking"],
            },
        ],
        "routing": {"auto_models": ["small-hybrid", "large-instruct"], "large_from": 0.5},
    }


HARD = "Prove that x^2 + y^2 = 4 has how many integer solutions, and explain why: 1 + 3 = 4?"


def test_two_models_behind_one_router(in_process_pools: Any, never_thinks: Path) -> None:
    async def main() -> None:
        async with in_process_pools(**two_models(never_thinks)) as (client, _):

            async def ask(body: dict[str, Any]) -> tuple[str, str, str]:
                answer = await client.post(CHAT, json=body)
                found = route_of(answer)
                return answer.json()["model"], found["mode"], found["reason"]

            hybrid = {**HELLO, "model": "small-hybrid"}
            assert await ask(hybrid) == ("small-hybrid", "thinking", "default:template")
            assert await ask(HELLO) == await ask(hybrid)
            instruct = {**HELLO, "model": "large-instruct"}
            never = ("large-instruct", "non_thinking", "model:never_thinks")
            assert await ask(instruct) == never
            assert await ask({**instruct, "enable_thinking": True}) == never
            easy = {**HELLO, "model": "auto"}
            assert (await ask(easy))[0] == "small-hybrid"
            hard = saying(HARD, model="auto")
            assert await ask(hard) == (*never[:2], "model_auto:large,model:never_thinks")
            wished = await ask({**hard, "enable_thinking": True})
            assert wished[:2] == ("small-hybrid", "thinking")

            unknown = await client.post(CHAT, json={**HELLO, "model": "other"})
            assert unknown.status_code == 404
            for name in ("small-hybrid", "large-instruct", "auto"):
                assert repr(name) in unknown.json()["error"]["message"]

            cards = (await client.get("/v1/models")).json()["data"]
            assert [card["id"] for card in cards] == ["small-hybrid", "large-instruct", "auto"]
            assert [card["modes"] for card in cards[:2]] == [
                ["non_thinking", "thinking"],
                ["non_thinking"],
            ]
            assert cards[2]["chooses_between"] == ["small-hybrid", "large-instruct"]
            for card in cards:
                assert (await client.get(f"/v1/models/{card['id']}")).json() == card

    asyncio.run(main())


def test_each_model_has_its_own_text(in_process_pools: Any, never_thinks: Path) -> None:
    async def main() -> None:
        async with in_process_pools(**two_models(never_thinks)) as (client, _):
            messages = {"messages": HELLO["messages"], "enable_thinking": False}
            found = {}
            for model in ("small-hybrid", "large-instruct"):
                answer = await client.post("/tokenize", json={**messages, "model": model})
                found[model] = answer.json()["tokens"]
            assert len(found["small-hybrid"]) > len(found["large-instruct"])  # the empty block
            assert found["small-hybrid"][: len(found["large-instruct"])] == found["large-instruct"]
            both = await client.post("/tokenize", json={"prompt": "a", "model": "auto"})
            assert both.status_code == 400
            for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
                answer = await client.post(path, json={**body, "model": "other"})
                assert answer.status_code == 404

    asyncio.run(main())


def test_a_mode_that_no_pool_serves_is_refused(in_process_pools: Any) -> None:
    async def main() -> None:
        pools = [{"name": "answers", "modes": ["non_thinking"]}]
        async with in_process_pools(pools=pools) as (client, _):
            refused = await client.post(CHAT, json={**HELLO, "enable_thinking": True})
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert (error["code"], error["param"]) == ("mode_not_served", "enable_thinking")
            assert "non_thinking" in error["message"]
            assert route_of(await client.post(CHAT, json=HELLO))["reason"] == "default:pool"

    asyncio.run(main())


def test_a_pool_that_could_never_serve_is_found_at_the_start(
    in_process_pools: Any, never_thinks: Path
) -> None:
    async def main() -> None:
        pools = [{"name": "thinkers", "model": str(never_thinks), "modes": ["thinking"]}]
        with pytest.raises(ValueError, match="never thinks"):
            async with in_process_pools(pools=pools):
                pass

    asyncio.run(main())


def test_pools_without_engines_are_found_at_the_start() -> None:
    with pytest.raises(ValueError, match="thinkers, answers"):
        asyncio.run(create_app(load_config(BY_MODE), {}))


def test_routes_and_promises_are_counted(in_process_pools: Any) -> None:
    slo = {"ttft_s": 60, "first_answer_s": 1e-9, "inter_token_s": 60}
    pools = [{**THINKERS, "slo": {"ttft_s": 60}}, {**ANSWERS, "slo": slo}]

    async def main() -> None:
        async with in_process_pools(**{**BY_MODE, "pools": pools}) as (client, _):
            for seed in range(3):
                await client.post(CHAT, json={**SUM, "enable_thinking": False, "seed": seed})
            await client.post(CHAT, json={**SUM, "seed": 1})
            text = (await client.get("/metrics")).text
        counts = (
            'inference_pio_routes_total{mode="non_thinking",model_name="embedded",'
            'pool="answers",reason="explicit:enable_thinking"} 3.0',
            'inference_pio_routes_total{mode="thinking",model_name="embedded",'
            'pool="thinkers",reason="auto"} 1.0',
            'inference_pio_request_complexity_count{model_name="embedded"} 4.0',
            'inference_pio_slo_requests_total{pool="answers",result="kept",slo="ttft"} 3.0',
            'inference_pio_slo_requests_total{pool="answers",result="missed",slo="first_answer"} '
            "3.0",
            'inference_pio_slo_requests_total{pool="answers",result="kept",slo="inter_token"} 3.0',
            'inference_pio_slo_requests_total{pool="thinkers",result="kept",slo="ttft"} 1.0',
            'inference_pio_slo_requests_total{pool="thinkers",result="missed",slo="ttft"} 0.0',
            'vllm:time_to_first_token_seconds_count{model_name="embedded",pool="answers"} 3.0',
        )
        for line in counts:
            assert f"\n{line}\n" in text, line
        assert 'engine="replica-of-answers",model_name="embedded",pool="answers"' in text

    asyncio.run(main())


def test_health_needs_every_pool(in_process_pools: Any) -> None:
    async def main() -> None:
        async with in_process_pools(**BY_MODE) as (client, services):
            healthy = await client.get("/health")
            assert healthy.json() == {
                "status": "ok",
                "pools": {"thinkers": "ok", "answers": "ok"},
            }
            services["answers"].stop()
            ill = await client.get("/health")
            assert ill.status_code == 503
            assert "answers" in ill.json()["error"]["message"]
            assert "thinkers" not in ill.json()["error"]["message"]

    asyncio.run(main())


class HintedEngine(EngineService):
    """The real engine; keeps the hints that came with each request."""

    def __init__(self) -> None:
        config = load_config({"engine": {"model": "embedded", "kv_cache_bytes": 2**24}})
        self.hints: list[RouteHints] = []
        super().__init__(Engine(config.engine), "replica", str(resolve_model("embedded")))

    async def submit(
        self, stream_id: str, requests: Sequence[GenerateRequest], hints: RouteHints
    ) -> SubmitReply:
        self.hints.append(hints)
        return await super().submit(stream_id, requests, hints)


def test_session_and_prefix_reach_the_choice_of_a_replica() -> None:
    cases: list[tuple[dict[str, Any], list[tuple[str, str]], str | None]] = [
        ({}, [], None),
        ({}, [("x-session-id", "abc-1")], "abc-1"),
        ({}, [("x-session-id", "a b")], None),
        ({}, [("x-session-id", "a" * 65)], None),
        ({"prompt_cache_key": "key"}, [], "key"),
        ({"prompt_cache_key": "no key!"}, [], None),
        ({"prompt_cache_key": "key"}, [("x-session-id", "abc")], "abc"),
        ({"prompt_cache_key": "key"}, [("x-session-id", "a;b")], "key"),
    ]
    prompt = [5 + number % 50 for number in range(200)]

    async def main() -> None:
        engine = HintedEngine()
        engine.start()
        try:
            app = await create_app(load_config({}), {"engine": engine})
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                for fields, headers, session in cases:
                    body = {"prompt": prompt, "max_tokens": 1, "cache_salt": "mine", **fields}
                    answer = await client.post(COMPLETE, json=body, headers=headers)
                    assert answer.status_code == 200
                    assert engine.hints[-1] == route_hints(prompt, "mine", session)
                    assert len(engine.hints[-1].prefix) == 3
                chat = {**saying("q " * 100), "cache_salt": "mine"}
                ids = (await client.post("/tokenize", json={"messages": chat["messages"]})).json()
                answer = await client.post(CHAT, json=chat, headers={"x-session-id": "abc"})
                assert answer.status_code == 200
                assert engine.hints[-1] == route_hints(ids["tokens"], "mine", "abc")
                assert engine.hints[-1].prefix
                bad = await client.post(COMPLETE, json={"prompt": prompt, "prompt_cache_key": 5})
                assert bad.status_code == 400
        finally:
            engine.stop()

    asyncio.run(main())
