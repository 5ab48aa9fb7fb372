"""Streams that outlive their replica: they go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from inference_pio.deployments.wire import RouteHints
from inference_pio.workers.types import GenerateRequest, SamplingParams, TokenKind

from .lossy_replicas import NAMES, Cluster, ask, cluster, mux_of, plain, swept

pytestmark = pytest.mark.usefixtures("quick_orphans")

QUESTION = [{"role": "user", "content": "17 + 25 - 8 + 13 = ?"}]
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "thinking, greedy": (True, {"temperature": 0.0, "ignore_eos": True}),
    "non-thinking, greedy": (False, {"temperature": 0.0, "ignore_eos": True}),
    "three choices, seeded": (True, {"temperature": 1.0, "seed": 11, "n": 3}),
    "seeded, penalties, budget": (
        True,
        {
            "temperature": 0.9,
            "top_p": 0.9,
            "seed": 3,
            "presence_penalty": 0.5,
            "repetition_penalty": 1.1,
            "thinking_budget": 20,
            "max_tokens": 160,  # the text that ends the thought has seventy
            "ignore_eos": True,
        },
    ),
    "log-probabilities": (
        False,
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2, "n": 2, "ignore_eos": True},
    ),
}


def prompt(replicas: Cluster, *, thinking: bool) -> tuple[int, ...]:
    template = replicas.services["one"]._engine.engine.loaded.text.template
    return tuple(template.render(QUESTION, enable_thinking=thinking))


@pytest.mark.parametrize("case", CASES)
def test_a_stream_goes_on_at_the_other_replica_as_if_nothing_had_happened(case: str) -> None:
    thinking, params = CASES[case]

    async def main() -> None:
        async with cluster() as replicas:
            sampling = SamplingParams(**{"max_tokens": 90, **params})
            asked = GenerateRequest(
                "r", prompt(replicas, thinking=thinking), sampling, deadline_s=60
            )
            mux = mux_of(replicas)
            unbroken = (await ask(mux, asked)).choices()
            length = sum(len(choice["tokens"]) for choice in unbroken.values())
            thinks = [TokenKind.THOUGHT in choice["kinds"] for choice in unbroken.values()]
            assert thinks == [thinking] * len(unbroken)
            for place in (1, 12, length * 3 // 4):
                replicas.cut.clear()
                before = dict(mux.migrations)
                replicas.light("one", place, replicas.cut.add)
                found = (await ask(mux, asked)).choices()
                assert mux.migrations["moved"] == before.get("moved", 0) + 1
                assert found.keys() == unbroken.keys()
                for name, choice in found.items():
                    for key in ("tokens", "kinds", "finish", "thought_end"):
                        assert choice[key] == unbroken[name][key], (key, place)
                    assert choice["usage"].completion_tokens == len(choice["tokens"])
                    assert (
                        choice["usage"].reasoning_tokens == unbroken[name]["usage"].reasoning_tokens
                    )
                    assert choice["usage"].prompt_tokens == len(asked.prompt_token_ids)
                    assert choice["usage"].cached_tokens < len(asked.prompt_token_ids)
                    assert choice["timings"] == unbroken[name]["timings"]
                    assert_close(choice["logprobs"], unbroken[name]["logprobs"])
                    assert len(choice["prompt_logprobs"]) == len(unbroken[name]["prompt_logprobs"])
                    for mine, other in zip(
                        choice["prompt_logprobs"], unbroken[name]["prompt_logprobs"], strict=True
                    ):
                        assert mine[0] is None
                        assert other[0] is None
                        assert_close(mine[1:], other[1:])
                await swept(replicas, "one")
            assert mux.unknown_chunks == 0
            assert mux.num_open == 0
            await mux.close()

    asyncio.run(main())


def assert_close(mine: Sequence[Any], other: Sequence[Any]) -> None:
    assert [entry.token_id for entry in mine] == [entry.token_id for entry in other]
    for one, two in zip(mine, other, strict=True):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
        assert [value for _, value in one.top] == pytest.approx(
            [value for _, value in two.top], abs=1e-3
        )


def test_only_the_unfinished_of_several_prompts_and_choices_go_on() -> None:
    async def main() -> None:
        async with cluster() as replicas:
            asked = [plain("short", 3), plain("long", 90, n=2), plain("longer", 100)]
            mux = mux_of(replicas)
            unbroken = (await ask(mux, *asked)).choices()
            replicas.light("one", 40, replicas.cut.add)
            found = await ask(mux, *asked)
            assert {k: v["tokens"] for k, v in found.choices().items()} == {
                k: v["tokens"] for k, v in unbroken.items()
            }
            name, again, hints = replicas.submitted[-1]
            assert (name, hints.avoid) == ("two", ("one",))
            assert [request.request_id for request in again] == ["long", "longer"]
            assert all(part.token_ids for request in again for part in request.resume)
            assert hints.sequences == 3
            assert mux.migrations == {"moved": 1}
            await mux.close()

    asyncio.run(main())


def test_every_request_of_a_lost_replica_moves_and_the_others_stay() -> None:
    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            alone = (await ask(mux, plain("alone"))).choices()["alone", 0]["tokens"]
            replicas.light("one", 200, replicas.cut.add)
            asking = [ask(mux, plain(f"r{number}")) for number in range(8)]
            staying = ask(mux, plain("stays"), hints=RouteHints(avoid=("one",)))
            *moved, stayed = await asyncio.gather(*asking, staying)
            for number, answer in enumerate(moved):
                assert answer.choices()[f"r{number}", 0]["tokens"] == alone
            assert stayed.choices()["stays", 0]["tokens"] == alone
            assert mux.migrations == {"moved": 8}
            # They share one new stream: two at the replica that is left, and not one for each.
            assert len(mux._readers) == 2
            await mux.close()

    asyncio.run(main())


def test_streams_survive_a_storm_of_deaths_and_returns() -> None:
    """Both replicas die every so many tokens and are back soon, old attempts still in them."""

    async def main() -> None:
        async with cluster() as replicas:
            mux, luck = mux_of(replicas, max_migrations=100), random.Random(4)
            asked = [plain(f"r{number}", 40 + 15 * number, n=1 + number % 2) for number in range(6)]
            unbroken = [(await ask(mux, request)).choices() for request in asked]

            def die(name: str) -> None:
                replicas.cut.add(name)
                loop = asyncio.get_running_loop()
                loop.call_later(luck.uniform(0.0, 0.1), replicas.cut.discard, name)
                replicas.light(name, luck.randint(60, 120), die)

            for name in NAMES:
                replicas.light(name, luck.randint(20, 60), die)
            answers = await asyncio.gather(*[ask(mux, request) for request in asked])
            for answer, expected in zip(answers, unbroken, strict=True):
                found = answer.choices()
                assert {k: v["tokens"] for k, v in found.items()} == {
                    k: v["tokens"] for k, v in expected.items()
                }
            assert mux.migrations["moved"] >= 6
            assert mux.migrations.keys() == {"moved"}
            assert (mux.unknown_chunks, mux.num_open) == (0, 0)
            await mux.close()

    asyncio.run(main())
