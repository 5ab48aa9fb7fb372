"""The handoff between real engines in one loop: the same answers, whatever goes wrong between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import pytest

from inference_pio.deployments.config import RemotePrefillConfig
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.handoff_stats import DecodeStats, PeerReport
from inference_pio.deployments.kv_source import KVSource
from inference_pio.deployments.kv_transport import Arrival, decode_replica_id
from inference_pio.deployments.prefill_service import PrefillService
from inference_pio.deployments.wire import RouteHints, WrongReplicaError
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine
from inference_pio.workers.types import (
    GenerateRequest,
    PrefillRequest,
    RequestError,
    SamplingParams,
)

ENGINE = EngineConfig(
    model="embedded",
    block_size=16,
    kv_cache_bytes=16 * 2**20,
    num_threads=1,
    max_batched_tokens=64,
)
PROMPT = tuple(20 + i * 7 % 50 for i in range(300))


class DirectTransport:
    """A ``KVTransport`` within one loop; ``spoil`` may change, delay or replace what is read."""

    def __init__(self, service: PrefillService) -> None:
        self.service = service
        self.hints: list[RouteHints] = []
        self.spoil: Callable[[int, Arrival], Any] | None = None

    async def pull(
        self, request: PrefillRequest, hints: RouteHints
    ) -> AsyncGenerator[str | Arrival, None]:
        self.hints.append(hints)
        async with aclosing(self.service.prefill(request)) as stream:
            yield decode_replica_id(await anext(stream))
            number = 0
            async for buffer in stream:
                arrival = Arrival(buffer, 0.001)
                if self.spoil is not None:
                    arrival = await self.spoil(number, arrival)
                yield arrival
                number += 1

    async def acknowledge(self, request: PrefillRequest, count: int, *, replica_id: str) -> None:
        await self.service.acknowledge(
            request.request_id, request.attempt, request.epoch, count, replica_id=replica_id
        )

    def failure_reason(self, error: Exception) -> str:
        return error.code if isinstance(error, RequestError) else type(error).__name__

    async def reports(self) -> list[PeerReport]:
        return [self.service.report()]

    def close(self) -> None:
        pass


@dataclass
class Joined:
    """A decode and a prefill engine."""

    decode: EngineService
    prefill: PrefillService
    transport: DirectTransport
    _numbers: list[int] = field(default_factory=list)

    async def answer(
        self, prompt: tuple[int, ...] = PROMPT, service: EngineService | None = None
    ) -> list[int]:
        """Twelve greedy tokens."""
        service = service or self.decode
        self._numbers.append(0)
        name = f"request-{len(self._numbers)}"
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        request = GenerateRequest(name, prompt, params)
        reply = await service.submit(name, [request], RouteHints())
        assert reply.error is None
        tokens: list[int] = []
        async with aclosing(service.subscribe(name, replica_id=service.replica_id)) as stream:
            async for batch in stream:
                for chunk in batch:
                    assert chunk.error is None
                    tokens += chunk.token_ids
                    if chunk.finish_reason is not None:
                        return tokens
        raise AssertionError("the stream ended without an end")

    async def stats(self) -> DecodeStats:
        stats = await self.decode.stats(replica_id=self.decode.replica_id)
        assert isinstance(stats, DecodeStats)
        return stats

    async def met(self) -> None:
        """Wait until the peers have been asked once."""
        async with asyncio.timeout(10):
            while not (stats := (await self.stats()).handoff).peers and not stats.peers_refused:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def joined(
    *,
    decode: EngineConfig = ENGINE,
    prefill: EngineConfig = ENGINE,
    remote: dict[str, Any] | None = None,
    window_bytes: int = 2**20,
) -> AsyncIterator[Joined]:
    """Both services on real engines; at the end both engines are empty and sound."""
    engines = Engine(decode), Engine(prefill)
    source = PrefillService(engines[1], "prefill-1", window_bytes=window_bytes)
    transport = DirectTransport(source)
    config = RemotePrefillConfig.model_validate({"pool": "p", "when": "always", **(remote or {})})
    service = EngineService(
        engines[0], "decode-1", "", partial(KVSource, config=config, transport=transport)
    )
    source.start()
    service.start()
    pair = Joined(service, source, transport)
    try:
        await pair.met()
        yield pair
        async with asyncio.timeout(10):
            while any(engine.has_work for engine in engines) or source.num_shipments:
                await asyncio.sleep(0.01)
            while (await pair.stats()).handoff.pulls_running:
                await asyncio.sleep(0.01)
    finally:
        service.stop()
        source.stop()
    for engine in engines:
        engine.check_integrity()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert (stats.kv_imports_running, stats.kv_exports_running) == (0, 0)
    source.check_integrity()


NEEDED = len(PROMPT) - 1


@cache
def alone(prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What one engine alone answers."""
    engine = Engine(ENGINE)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.add(GenerateRequest("alone", prompt, params))
    tokens: list[int] = []
    while engine.has_work:
        for chunk in engine.step().chunks:
            tokens += chunk.token_ids
    return tokens


def test_a_handed_over_prompt_is_answered_as_by_one_engine() -> None:
    async def run() -> None:
        async with joined() as pair:
            assert await pair.answer() == alone()
            stats = await pair.stats()
            assert stats.kv_imported_tokens == NEEDED
            assert stats.kv_import_ends == {"done": 1}
            assert stats.handoff.decisions == {("remote", "forced"): 1}
            assert stats.handoff.pulls_done == 1
            assert stats.handoff.ticket_bytes > NEEDED * 64
            assert stats.handoff.last.missing_tokens_here == NEEDED
            assert pair.prefill.report().stats.kv_exported_tokens == NEEDED

    asyncio.run(run())


def test_prefix_hits_here_are_not_sent() -> None:
    async def run() -> None:
        async with joined() as pair:
            await pair.answer()
            assert await pair.answer() == alone()
            whole_blocks = NEEDED // ENGINE.block_size * ENGINE.block_size
            stats = await pair.stats()
            assert stats.kv_imported_tokens == NEEDED + (NEEDED - whole_blocks)

    asyncio.run(run())


def test_prefix_hits_there_are_sent_without_computing() -> None:
    async def run() -> None:
        async with joined(decode=ENGINE.model_copy(update={"prefix_caching": False})) as pair:
            await pair.answer()
            assert await pair.answer() == alone()
            assert (await pair.stats()).kv_imported_tokens == 2 * NEEDED
            assert pair.prefill.report().stats.prefix_hit_tokens > NEEDED // 2

    asyncio.run(run())


def test_never_stays_here() -> None:
    async def run() -> None:
        async with joined(remote={"when": "never"}) as pair:
            assert await pair.answer() == alone()
            stats = await pair.stats()
            assert stats.handoff.decisions == {("local", "forced"): 1}
            assert stats.kv_imported_tokens == 0

    asyncio.run(run())


def test_auto_measures_the_other_side_with_one_prompt() -> None:
    async def run() -> None:
        async with joined(remote={"when": "auto"}) as pair:
            assert await pair.answer() == alone()
            stats = (await pair.stats()).handoff
            assert stats.decisions == {("remote", "probe"): 1}
            assert stats.transfer_seconds > 0
            async with asyncio.timeout(10):  # for the next report with the measured rate
                while not (await pair.stats()).peers["prefill-1"].prefill_tokens_per_s:
                    await asyncio.sleep(0.05)
            await pair.answer(PROMPT[::-1])
            last = (await pair.stats()).handoff.last
            assert last.tokens_per_s_there > 0
            assert last.bandwidth_bytes_per_s > 0

    asyncio.run(run())


def _flip(arrival: Arrival) -> Arrival:
    buffer = arrival.buffer.copy()
    buffer[-1] ^= 1
    return replace(arrival, buffer=buffer)


def _raise(error: Exception) -> Callable[[Arrival], Any]:
    def spoil(arrival: Arrival) -> Any:
        raise error

    return spoil


FAULTS: dict[str, Callable[[Arrival], Any]] = {
    "bad_payload_checksum": _flip,
    "truncated": lambda arrival: replace(arrival, buffer=arrival.buffer[:-1]),
    "bad_magic": lambda arrival: replace(arrival, buffer=arrival.buffer[::-1].copy()),
    "queue_full": _raise(RequestError("full", code="queue_full")),
    "RuntimeError": _raise(RuntimeError("something else")),
}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("reason", FAULTS)
def test_every_fault_is_counted_and_computed_here(reason: str, at: int) -> None:
    async def spoil(number: int, arrival: Arrival) -> Arrival:
        return FAULTS[reason](arrival) if number == at else arrival

    async def run() -> None:
        async with joined() as pair:
            pair.transport.spoil = spoil
            assert await pair.answer() == alone()
            stats = await pair.stats()
            assert stats.kv_import_ends == {reason: 1}
            assert stats.kv_imported_tokens == at * ENGINE.max_batched_tokens
            pair.transport.spoil = None
            await pair.met()
            assert await pair.answer(PROMPT[::-1]) == alone(PROMPT[::-1])
            assert (await pair.stats()).kv_import_ends == {reason: 1, "done": 1}

    asyncio.run(run())


def test_a_silent_peer_costs_the_deadline_and_no_more() -> None:
    async def spoil(number: int, arrival: Arrival) -> Arrival:
        if number == 1:
            await asyncio.sleep(60)
        return arrival

    async def run() -> None:
        async with joined(remote={"deadline_s": 0.5}) as pair:
            pair.transport.spoil = spoil
            assert await pair.answer() == alone()
            stats = await pair.stats()
            assert stats.kv_import_ends == {"deadline": 1}
            assert stats.kv_imported_tokens == ENGINE.max_batched_tokens

    asyncio.run(run())


def test_an_aborted_request_ends_its_prefill_over_there() -> None:
    reached = asyncio.Event()

    async def spoil(number: int, arrival: Arrival) -> Arrival:
        if number == 1:
            reached.set()
            await asyncio.sleep(60)
        return arrival

    async def run() -> None:
        async with joined(remote={"deadline_s": 60}) as pair:
            pair.transport.spoil = spoil
            waiting = asyncio.create_task(pair.answer())
            async with asyncio.timeout(10):
                await reached.wait()
            assert pair.prefill.num_shipments == 1
            await pair.decode.abort("request-1", ["request-1"], replica_id="decode-1")
            async with asyncio.timeout(10):
                while pair.prefill.num_shipments:
                    await asyncio.sleep(0.01)
            waiting.cancel()
            assert (await pair.stats()).kv_import_ends == {"request_ended": 1}

    asyncio.run(run())


def test_a_peer_of_another_layout_is_refused_by_name_and_not_asked() -> None:
    async def run() -> None:
        other = ENGINE.model_copy(update={"block_size": 32})
        async with joined(prefill=other) as pair:
            assert await pair.answer() == alone()
            stats = (await pair.stats()).handoff
            assert stats.decisions == {("local", "no_peer"): 1}
            assert stats.peers_refused == {"prefill-1": "block_size is 16 here, 32 there"}
            assert pair.transport.hints == []

    asyncio.run(run())


def request(name: str, **changes: Any) -> PrefillRequest:
    base = PrefillRequest(
        name, attempt=1, epoch=7, token_ids=PROMPT, start=0, cache_salt="", deadline_s=30.0
    )
    return replace(base, **changes)


def with_pair(body: Callable[[Joined], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with joined(**settings) as pair:
            await body(pair)

    asyncio.run(run())


def test_a_stream_waits_for_its_acknowledgements() -> None:
    async def body(pair: Joined) -> None:
        async with aclosing(pair.prefill.prefill(request("slow"))) as stream:
            await anext(stream)
            size = (await anext(stream)).nbytes
            pending = asyncio.ensure_future(anext(stream))
            async with asyncio.timeout(10):
                while pair.prefill.report().stats.kv_exported_tokens < len(PROMPT):
                    await asyncio.sleep(0.01)
            assert not pending.done()
            await pair.prefill.acknowledge("slow", 1, 6, 1, replica_id="prefill-1")
            await asyncio.sleep(0.05)
            assert not pending.done(), "another life's acknowledgement counted"
            await pair.prefill.acknowledge("slow", 1, 7, 1, replica_id="prefill-1")
            assert (await asyncio.wait_for(pending, 10)).nbytes == size
            with pytest.raises(WrongReplicaError):
                await pair.prefill.acknowledge("slow", 1, 7, 2, replica_id="prefill-0")
        assert pair.prefill.num_shipments == 0

    with_pair(body, window_bytes=1)


def test_a_stream_whose_tickets_are_kept_ends_when_all_have_been_read() -> None:
    async def body(pair: Joined) -> None:
        kept: list[int] = []
        posted = request("kept")
        async with aclosing(pair.prefill.prefill(posted, on_read=lambda: kept.pop(0))) as stream:
            await anext(stream)
            for _ in range(5):  # 300 tokens in steps of 64
                kept.append((await anext(stream)).nbytes)
            ending = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            assert not ending.done(), "the stream ended with unread tickets"
            await pair.prefill.acknowledge("kept", 1, 7, 4, replica_id="prefill-1")
            await asyncio.sleep(0.05)
            assert (len(kept), ending.done()) == (1, False)
            await pair.prefill.acknowledge("kept", 1, 7, 5, replica_id="prefill-1")
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(ending, 10)
            assert kept == []

    with_pair(body)


def test_a_stream_whose_tickets_nobody_reads_ends_at_its_deadline() -> None:
    async def body(pair: Joined) -> None:
        posted = request("unread", deadline_s=0.5)
        with pytest.raises(RequestError) as caught:
            async for _ in pair.prefill.prefill(posted, on_read=lambda: None):
                pass
        assert caught.value.code == "deadline_exceeded"
        assert pair.prefill.num_shipments == 0

    with_pair(body)


def test_a_stream_ends_at_its_deadline_when_nobody_reads() -> None:
    async def body(pair: Joined) -> None:
        async with aclosing(pair.prefill.prefill(request("idle", deadline_s=0.3))) as stream:
            await anext(stream)
            await anext(stream)
            with pytest.raises(RequestError) as caught:
                await anext(stream)
        assert caught.value.code == "deadline_exceeded"
        assert pair.prefill.num_shipments == 0

    with_pair(body, window_bytes=1)


def test_a_reader_that_leaves_frees_the_engine_at_once() -> None:
    async def body(pair: Joined) -> None:
        long = tuple(PROMPT * 10)
        async with aclosing(pair.prefill.prefill(request("left", token_ids=long))) as stream:
            await anext(stream)
            await anext(stream)
            assert pair.prefill.report().stats.kv_exports_running == 1
        async with asyncio.timeout(10):
            while pair.prefill.report().stats.kv_exports_running:
                await asyncio.sleep(0.01)
        assert pair.prefill.report().stats.kv_exported_tokens < len(long)

    with_pair(body)


def test_what_the_engine_refuses_ends_the_stream_with_its_reason() -> None:
    async def body(pair: Joined) -> None:
        with pytest.raises(RequestError) as caught:
            async for _ in pair.prefill.prefill(request("bad", token_ids=(10**6,) * 40)):
                pass
        assert "10" in caught.value.message
        assert pair.prefill.num_shipments == 0

    with_pair(body)
