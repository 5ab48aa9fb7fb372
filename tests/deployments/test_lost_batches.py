"""A subscription that loses one of its batches: the request goes on, also where it was the last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.stream_mux import StreamMux
from inference_pio.deployments.wire import (
    BatchLostError,
    PackedBatch,
    pack_batches,
    unpack_batches,
)
from inference_pio.workers.engine import Engine
from inference_pio.workers.model_source import resolve_model
from inference_pio.workers.types import (
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenChunk,
    Usage,
)

TOKENS = 20
DEADLINE_S = 60.0
Choose = Callable[[list[TokenChunk]], bool]


class Lossy(EngineService):
    """A real engine whose batches cross as they do between processes; one of them gets lost."""

    def __init__(self) -> None:
        engine = {"model": "embedded", "block_size": 16, "kv_cache_bytes": 2**24, "num_threads": 1}
        config = load_config({"engine": engine, "api": {"max_prompts": 1}})
        super().__init__(Engine(config.engine), "replica", str(resolve_model("embedded")))
        self.loses: Choose = lambda batch: False
        self.lost: list[list[TokenChunk]] = []

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]:
        packed = pack_batches(super().subscribe(stream_id, replica_id=replica_id))
        async with aclosing(packed):
            async for batch in unpack_batches(self._cross(packed)):
                yield batch

    async def _cross(
        self, packed: AsyncGenerator[PackedBatch, None]
    ) -> AsyncGenerator[PackedBatch, None]:
        async for number, chunks in packed:
            (batch,) = [batch async for batch in unpack_batches(_once((0, chunks)))]
            if not self.lost and self.loses(batch):
                self.lost.append(batch)
            else:
                yield number, chunks


async def _once(batch: PackedBatch) -> AsyncGenerator[PackedBatch, None]:
    yield batch


def first(batch: list[TokenChunk]) -> bool:
    return any(chunk.first == 0 for chunk in batch)


def middle(batch: list[TokenChunk]) -> bool:
    return any(chunk.first >= TOKENS // 2 for chunk in batch)


def last_but_one(batch: list[TokenChunk]) -> bool:
    return any(chunk.first + len(chunk.token_ids) == TOKENS - 1 for chunk in batch)


def end(batch: list[TokenChunk]) -> bool:
    return any(chunk.finish_reason is not None for chunk in batch)


def heartbeat(batch: list[TokenChunk]) -> bool:
    return not batch


async def answer(mux: StreamMux, name: str) -> list[int]:
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=1.0, seed=7)
    tokens: list[int] = []
    request = GenerateRequest(name, (40, 41, 42), params)
    async with mux.open([request], deadline_s=DEADLINE_S) as generation:
        async for chunks in generation:
            for chunk in chunks:
                tokens += chunk.token_ids
    return tokens


@pytest.mark.parametrize("loses", [first, middle, last_but_one, end, heartbeat])
def test_a_lost_batch_is_noticed_and_its_tokens_come_again(
    loses: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_pio.deployments.engine_service.HEARTBEAT_S", 0.05)

    async def main() -> None:
        service = Lossy()
        service.start()
        mux = StreamMux(service, max_buffered_tokens=1000, idle_s=60, max_migrations=3)
        try:
            unbroken = await answer(mux, "unbroken")
            assert len(unbroken) == TOKENS
            service.loses = loses
            # Half of the deadline: without a number on the batches only the deadline ends the wait.
            async with asyncio.timeout(DEADLINE_S / 2):
                assert await answer(mux, "broken") == unbroken
                while not service.lost:  # a heartbeat may come only now
                    await asyncio.sleep(0.01)
                assert await answer(mux, "after") == unbroken
            if loses is not heartbeat:  # that may have been lost with nothing under way
                assert mux.migrations["moved"] == 1
            assert mux.unknown_chunks == 0
        finally:
            await mux.close()
            service.stop()

    asyncio.run(main())


def chunk(number: int, *, is_last: bool) -> TokenChunk:
    finish = FinishReason.LENGTH if is_last else None
    return TokenChunk("r", 0, number, (number,), (), Usage(1, 0, number, 0), finish_reason=finish)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_any_batch_but_the_very_last_shows_when_it_is_lost(full: list[bool], data: Any) -> None:
    """``full`` says which batches hold a chunk; the others are heartbeats."""
    batches = [
        [chunk(number, is_last=number == len(full) - 1)] if has_chunk else []
        for number, has_chunk in enumerate(full)
    ]
    lost = data.draw(st.none() | st.integers(0, len(batches) - 1))

    async def source() -> AsyncGenerator[list[TokenChunk], None]:
        for batch in batches:
            yield batch

    async def crossing() -> AsyncGenerator[PackedBatch, None]:
        async for number, packed in pack_batches(source()):
            if number != lost:
                yield number, packed

    found: list[list[TokenChunk]] = []

    async def read() -> None:
        async for batch in unpack_batches(crossing()):
            found.append(batch)

    if lost is None or lost == len(batches) - 1:
        asyncio.run(read())
    else:
        with pytest.raises(BatchLostError, match=f"batch {lost} "):
            asyncio.run(read())
    assert found == batches[:lost]
