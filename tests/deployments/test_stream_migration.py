"""Streams that outlive their replica: two real engines, one of which dies while it answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from time import sleep
from typing import Any

import pytest

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.stream_mux import StreamMux
from inference_pio.deployments.wire import (
    ModelFacts,
    RouteHints,
    SubmitReply,
    WrongReplicaError,
)
from inference_pio.workers.async_engine import AsyncEngine
from inference_pio.workers.engine import Engine
from inference_pio.workers.model_source import resolve_model
from inference_pio.workers.types import (
    EngineStats,
    GenerateRequest,
    QueueFullError,
    RequestError,
    SamplingParams,
    TokenChunk,
    TokenKind,
)

ENGINE = {"model": "embedded", "block_size": 16, "kv_cache_bytes": 32 * 2**20, "num_threads": 1}
NAMES = ("one", "two")


class Cluster:
    """Real engine services behind a switch, as Serve's handle is; nothing but the switch is new.

    A cut replica fails every call as a dead actor does. A frozen one takes calls and says nothing.
    """

    def __init__(self, services: dict[str, EngineService]) -> None:
        self.services = services
        self.cut: set[str] = set()
        self.frozen: set[str] = set()
        self.submitted: list[tuple[str, list[GenerateRequest], RouteHints]] = []
        self.replies: Counter[str] = Counter()
        self.before_submit: Callable[[str], RequestError | None] = lambda name: None
        """May refuse what is about to be submitted to a replica."""
        self._fuses: dict[str, tuple[int, Callable[[str], None]]] = {}

    def reach(self, name: str) -> EngineService:
        if name in self.cut:
            raise ConnectionResetError(f"{name} died")
        return self.services[name]

    async def submit(
        self, stream_id: str, requests: Sequence[GenerateRequest], hints: RouteHints
    ) -> SubmitReply:
        # As the router ranks them: those to avoid last.
        order = sorted(self.services, key=lambda name: name in hints.avoid)
        name = next((name for name in order if name not in self.cut), order[0])
        self.submitted.append((name, list(requests), hints))
        refusal = self.before_submit(name)
        if refusal is not None:
            return SubmitReply(name, refusal)
        reply = await self.reach(name).submit(stream_id, requests, hints)
        if reply.error is None:
            self.replies[name] += 1
        return reply

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]:
        stream = self.reach(replica_id).subscribe(stream_id, replica_id=replica_id)
        async with aclosing(stream):
            async for batch in stream:
                yield self._burn(replica_id, batch)
                self.reach(replica_id)
                while replica_id in self.frozen:
                    await asyncio.sleep(0.01)

    def light(self, name: str, tokens: int, event: Callable[[str], None]) -> None:
        """Have something happen to a replica when it has told so many tokens more, to the token."""
        self._fuses[name] = (tokens, event)

    def _burn(self, name: str, batch: list[TokenChunk]) -> list[TokenChunk]:
        """What of a batch still gets through."""
        if name not in self._fuses:
            return batch
        left, event = self._fuses[name]
        for place, chunk in enumerate(batch):
            left -= len(chunk.token_ids)
            if left <= 0:
                del self._fuses[name]
                event(name)
                return batch[: place + 1]
        self._fuses[name] = (left, event)
        return batch

    async def abort(self, stream_id: str, request_ids: Sequence[str], *, replica_id: str) -> None:
        await self.reach(replica_id).abort(stream_id, request_ids, replica_id=replica_id)

    async def facts(self) -> ModelFacts:
        return await self.services["one"].facts()

    async def health(self, timeout: float) -> None:
        await self.services["one"].health(timeout)

    async def stats(self, *, replica_id: str) -> EngineStats:
        return await self.reach(replica_id).stats(replica_id=replica_id)


@asynccontextmanager
async def cluster(names: Sequence[str] = NAMES, **options: Any) -> AsyncIterator[Cluster]:
    """Engines that must end with nothing in them; one taken out of ``services`` is let be."""
    config = load_config({"engine": {**ENGINE, **options}, "api": {"max_prompts": 1}}).engine
    engines = {name: Engine(config) for name in names}
    checkpoint = str(resolve_model("embedded"))
    services = {name: EngineService(engine, name, checkpoint) for name, engine in engines.items()}
    for service in services.values():
        service.start()
    try:
        yield Cluster(services)
        for name, service in services.items():
            async with asyncio.timeout(15):
                while (await service.stats(replica_id=name)).kv_blocks_used:
                    await asyncio.sleep(0.01)
    finally:
        for service in services.values():
            service.stop()
    for name in services:
        engines[name].check_integrity()


def mux_of(transport: Cluster, max_migrations: int = 3) -> StreamMux:
    return StreamMux(
        transport, max_buffered_tokens=100_000, idle_s=60, max_migrations=max_migrations
    )


@pytest.fixture(autouse=True)
def quick_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut replica hears of no abort; it sweeps what nobody reads."""
    monkeypatch.setattr("inference_pio.deployments.engine_service.ORPHAN_S", 0.3)


class Answer:
    """All that a client sees of its request."""

    def __init__(self) -> None:
        self.chunks: list[TokenChunk] = []

    def add(self, chunks: list[TokenChunk]) -> None:
        self.chunks += chunks

    def __len__(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    def choices(self) -> dict[tuple[str, int], dict[str, Any]]:
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for chunk in self.chunks:
            choice = found.setdefault(
                (chunk.request_id, chunk.index),
                {"tokens": [], "kinds": [], "logprobs": [], "prompt_logprobs": [], "timings": 0},
            )
            assert chunk.first == len(choice["tokens"])
            assert "finish" not in choice
            choice["tokens"] += chunk.token_ids
            choice["kinds"] += chunk.kinds
            choice["logprobs"] += chunk.logprobs or ()
            if chunk.prompt_logprobs is not None:
                choice["prompt_logprobs"].append(chunk.prompt_logprobs)
            choice["timings"] += chunk.timing is not None
            choice["usage"] = chunk.usage
            choice["thought_end"] = chunk.thought_end
            if chunk.finish_reason is not None:
                choice["finish"] = (chunk.finish_reason, chunk.stop_reason)
        return found


async def ask(
    mux: StreamMux,
    *requests: GenerateRequest,
    hints: RouteHints | None = None,
    deadline_s: float = 60,
) -> Answer:
    """Read a whole answer."""
    answer = Answer()
    async with mux.open(requests, deadline_s=deadline_s, hints=hints) as generation:
        async for chunks in generation:
            answer.add(chunks)
    return answer


def prompt(replicas: Cluster, *, thinking: bool) -> tuple[int, ...]:
    template = replicas.services["one"]._engine.engine.loaded.text.template
    return tuple(template.render(QUESTION, enable_thinking=thinking))


def plain(name: str = "r", max_tokens: int = 120, **params: Any) -> GenerateRequest:
    """A request that runs until its length, for tests in which only the way matters."""
    values = {"temperature": 1.0, "seed": 7, "ignore_eos": True, **params}
    sampling = SamplingParams(max_tokens=max_tokens, **values)
    return GenerateRequest(name, (40, 41, 42), sampling, deadline_s=60)


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


async def swept(replicas: Cluster, name: str) -> None:
    """Wait until a replica runs nothing."""
    async with asyncio.timeout(15):
        while True:
            stats = await replicas.services[name].stats(replica_id=name)
            if (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0):
                return
            await asyncio.sleep(0.01)


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


def test_an_engine_that_dies_under_a_living_process_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda args: None)

    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            unbroken = (await ask(mux, plain(n=3))).choices()
            loop = replicas.services["one"]._engine

            def die() -> None:
                raise MemoryError("out of luck")

            after_steps(monkeypatch, loop, 30, die)
            found = (await ask(mux, plain(n=3))).choices()
            for name, choice in found.items():
                assert choice["tokens"] == unbroken[name]["tokens"]
            assert mux.migrations == {"moved": 1}
            assert replicas.replies == {"one": 2, "two": 1}
            # The process answers still: a new request is refused there and taken by the other.
            assert len(await ask(mux, plain("new", 5))) == 5
            assert [name for name, *_ in replicas.submitted[-2:]] == ["one", "two"]
            await mux.close()
            # What its blocks held is not touched again.
            monkeypatch.undo()
            del replicas.services["one"]

    asyncio.run(main())


def after_steps(
    monkeypatch: pytest.MonkeyPatch, loop: AsyncEngine, steps: int, event: Callable[[], None]
) -> None:
    """Have something happen in the engine's own thread before one of its next steps."""
    step, left = loop.engine.step, iter(range(steps))

    def count() -> Any:
        if next(left, None) is None:
            event()
        return step()

    monkeypatch.setattr(loop.engine, "step", count)


def test_a_replica_that_stops_hands_its_requests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            unbroken = (await ask(mux, plain())).choices()
            after_steps(
                monkeypatch, replicas.services["one"]._engine, 30, replicas.services["one"].stop
            )
            found = (await ask(mux, plain())).choices()
            assert found["r", 0]["tokens"] == unbroken["r", 0]["tokens"]
            assert mux.migrations == {"moved": 1}
            await mux.close()

    asyncio.run(main())


def test_a_silent_replica_is_left_and_what_it_says_later_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference_pio.deployments.engine_service.ORPHAN_S", 60)

    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            unbroken = (await ask(mux, plain())).choices()

            def patience(seconds: float) -> None:
                monkeypatch.setattr("inference_pio.deployments.stream_mux.SILENCE_S", seconds)

            def freeze(name: str) -> None:
                replicas.frozen.add(name)
                patience(0.3)

            replicas.light("one", 30, freeze)
            # With the other one, which may be slow on a busy machine, there is more patience.
            replicas.before_submit = lambda name: patience(60)
            # It goes on, slowly, and would not be through by then.
            after_steps(monkeypatch, replicas.services["one"]._engine, 30, lambda: sleep(0.05))
            found = await ask(mux, plain())
            assert found.choices()["r", 0]["tokens"] == unbroken["r", 0]["tokens"]
            assert mux.migrations.keys() == {"moved"}
            await swept(replicas, "one")
            stats = await replicas.services["one"].stats(replica_id="one")
            assert stats.requests_finished["abort"] == 1  # it was alive and has been told
            await mux.close()

    asyncio.run(main())


def test_the_same_replica_goes_on_once_its_lost_attempt_has_ended() -> None:
    """Only its stream broke: the id is in use there until the old attempt is aborted."""

    async def main() -> None:
        async with cluster(["one"]) as replicas:
            mux = mux_of(replicas)
            unbroken = (await ask(mux, plain())).choices()

            def blink(name: str) -> None:
                replicas.cut.add(name)
                asyncio.get_running_loop().call_later(0.02, replicas.cut.discard, name)

            replicas.light("one", 30, blink)
            found = await ask(mux, plain())
            assert found.choices()["r", 0]["tokens"] == unbroken["r", 0]["tokens"]
            assert mux.migrations == {"moved": 1}
            assert mux.unknown_chunks == 0
            await mux.close()

    asyncio.run(main())


def test_a_late_abort_does_not_end_the_next_attempt_at_the_same_replica() -> None:
    async def main() -> None:
        async with cluster(["one"]) as replicas:
            service = replicas.services["one"]
            reply = await service.submit("second", [plain(max_tokens=2000)], RouteHints())
            assert reply.error is None
            await service.abort("first", ["r"], replica_id="one")
            stream = service.subscribe("second", replica_id="one")
            chunks: list[TokenChunk] = []
            async with asyncio.timeout(10):
                while len(chunks) < 5:
                    chunks += await anext(stream)
            await service.abort("second", ["r"], replica_id="one")
            await stream.aclose()

    asyncio.run(main())


def test_chunks_of_a_given_up_attempt_are_counted_and_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A submission is taken, its answer is lost on the way, and another replica takes it too."""

    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            unbroken = (await ask(mux, plain())).choices()  # leaves the stream to the one open
            one = replicas.services["one"]
            deliver = one.submit

            async def lose_the_answer(*args: Any) -> SubmitReply:
                reply = await deliver(*args)
                assert reply.error is None
                await asyncio.sleep(0.05)
                replicas.before_submit = lambda name: (
                    RequestError("gone", code="engine_dead") if name == "one" else None
                )
                raise ConnectionResetError("the answer was lost")

            one.submit = lose_the_answer  # type: ignore[method-assign]
            after_steps(monkeypatch, one._engine, 5, lambda: sleep(0.05))
            found = await ask(mux, plain())
            assert found.choices()["r", 0]["tokens"] == unbroken["r", 0]["tokens"]
            assert mux.stale_chunks > 0
            assert mux.unknown_chunks == 0
            await swept(replicas, "one")
            assert (await one.stats(replica_id="one")).requests_finished["abort"] == 1
            await mux.close()

    asyncio.run(main())


def test_a_copy_that_runs_where_the_next_attempt_goes_is_ended_first() -> None:
    """The same, with one replica: the id is in use there until the copy has been stopped."""

    async def main() -> None:
        async with cluster(["one"]) as replicas:
            mux = mux_of(replicas)
            deliver = replicas.services["one"].submit
            lost: list[str] = []

            async def submit(*args: Any) -> SubmitReply:
                reply = await deliver(*args)
                if not lost:
                    lost.append(args[0])
                    raise ConnectionResetError("the answer was lost")
                return reply

            replicas.services["one"].submit = submit  # type: ignore[method-assign]
            assert len(await ask(mux, plain(max_tokens=300))) == 300
            assert mux.unknown_chunks == 0
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


@pytest.mark.parametrize("max_migrations", [0, 2])
def test_a_request_that_loses_too_many_replicas_ends_with_an_error(max_migrations: int) -> None:
    async def main() -> None:
        async with cluster(["one"]) as replicas:
            mux = mux_of(replicas, max_migrations)
            seen = 0

            async def read() -> None:
                nonlocal seen
                async with mux.open([plain(max_tokens=3000)], deadline_s=60) as generation:
                    async for _ in generation:
                        seen += 1
                        if seen % 3 == 0:
                            for task in mux._readers.values():
                                task.cancel()

            with pytest.raises(RequestError) as caught:
                await read()
            assert caught.value.code == "stream_lost"
            assert +mux.migrations == +Counter(moved=max_migrations, exhausted=1)
            await swept(replicas, "one")
            await mux.close()

    asyncio.run(main())


def test_a_replica_that_takes_a_request_but_no_subscription_is_left() -> None:
    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            reach = replicas.services["one"].subscribe

            async def refuse(*args: Any, **kwargs: Any) -> AsyncGenerator[list[TokenChunk], None]:
                raise WrongReplicaError("gone")
                yield

            replicas.services["one"].subscribe = refuse  # type: ignore[method-assign]
            assert len(await ask(mux, plain())) == 120
            assert replicas.replies == {"one": 1, "two": 1}
            replicas.services["one"].subscribe = reach  # type: ignore[method-assign]
            await swept(replicas, "one")
            await mux.close()

    asyncio.run(main())


def test_a_full_replica_is_asked_again_and_another_refusal_is_told() -> None:
    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            refusals: list[RequestError] = [
                QueueFullError("full", code="queue_full"),
                QueueFullError("full", code="queue_full"),
            ]
            replicas.before_submit = lambda name: (
                refusals.pop() if name == "two" and refusals else None
            )
            replicas.light("one", 9, replicas.cut.add)
            assert len(await ask(mux, plain())) == 120
            assert not refusals
            replicas.cut.clear()
            refusals.append(RequestError("no", code="context_length_exceeded"))
            replicas.light("one", 9, replicas.cut.add)
            with pytest.raises(RequestError) as caught:
                await ask(mux, plain())
            assert caught.value.code == "context_length_exceeded"
            assert mux.migrations == {"moved": 1, "refused": 1}
            await swept(replicas, "one")
            await mux.close()

    asyncio.run(main())


def test_no_replica_in_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_pio.deployments.stream_mux.SUBMIT_S", 0.3)

    async def main() -> None:
        async with cluster(["one"]) as replicas:
            mux = mux_of(replicas)
            replicas.light("one", 9, replicas.cut.add)
            with pytest.raises(RequestError) as caught:
                await ask(mux, plain())
            assert caught.value.code == "stream_lost"
            assert mux.migrations == {"not_taken": 1}
            with pytest.raises(RequestError) as caught:
                await ask(mux, plain())
            assert caught.value.code == "engine_unavailable"
            await swept(replicas, "one")
            await mux.close()

    asyncio.run(main())


@pytest.mark.parametrize("by_deadline", [False, True])
def test_a_client_that_leaves_between_two_replicas_leaves_nothing(
    by_deadline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            waiting, left = asyncio.Event(), asyncio.Event()
            submit = replicas.services["two"].submit

            async def slow(*args: Any) -> SubmitReply:
                waiting.set()
                await left.wait()
                return await submit(*args)

            replicas.services["two"].submit = slow  # type: ignore[method-assign]
            replicas.light("one", 9, replicas.cut.add)
            deadline_s = 1 if by_deadline else 60
            client = asyncio.create_task(ask(mux, plain(max_tokens=3000), deadline_s=deadline_s))
            if by_deadline:
                with pytest.raises(RequestError) as caught:
                    await client
                assert caught.value.code == "deadline_exceeded"
            else:
                await waiting.wait()
                client.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await client
            assert mux.migrations == {"left": 1}
            assert mux.num_open == 0
            await swept(replicas, "one")
            # The other one takes it after all. It is told, and need not find out.
            monkeypatch.setattr("inference_pio.deployments.engine_service.ORPHAN_S", 60)
            left.set()
            while not replicas.replies["two"]:
                await asyncio.sleep(0.01)
            await swept(replicas, "two")
            stats = await replicas.services["two"].stats(replica_id="two")
            assert stats.requests_finished["abort"] == 1
            await mux.close()

    asyncio.run(main())


def test_closing_fails_what_waits_and_moves_nothing() -> None:
    async def main() -> None:
        async with cluster() as replicas:
            mux = mux_of(replicas)
            asking = asyncio.create_task(ask(mux, plain(max_tokens=3000)))
            while not (await replicas.services["one"].stats(replica_id="one")).running:
                await asyncio.sleep(0.001)
            await mux.close()
            with pytest.raises(RequestError) as caught:
                await asking
            assert caught.value.code == "shutting_down"
            assert mux.migrations == {}
            await swept(replicas, "one")

    asyncio.run(main())
