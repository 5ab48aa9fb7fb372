"""Real engines in this process behind a switch: replicas that die, freeze and come back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.stream_mux import StreamMux
from inference_pio.deployments.wire import ModelFacts, RouteHints, SubmitReply
from inference_pio.workers.async_engine import AsyncEngine
from inference_pio.workers.engine import Engine
from inference_pio.workers.model_source import resolve_model
from inference_pio.workers.types import (
    EngineStats,
    GenerateRequest,
    RequestError,
    SamplingParams,
    TokenChunk,
)

from .conftest import ENGINE

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
    """Engines that must end with nothing in them; one taken out of ``services`` is let be.

    In float32, where a token is the same whether its predecessors were decoded or, after a move,
    prefilled.
    """
    engine = {**ENGINE, "dtype": "float32", **options}
    config = load_config({"engine": engine, "api": {"max_prompts": 1}}).engine
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


def plain(name: str = "r", max_tokens: int = 120, **params: Any) -> GenerateRequest:
    """A request that runs until its length, for tests in which only the way matters."""
    values = {"temperature": 1.0, "seed": 7, "ignore_eos": True, **params}
    sampling = SamplingParams(max_tokens=max_tokens, **values)
    return GenerateRequest(name, (40, 41, 42), sampling, deadline_s=60)


async def swept(replicas: Cluster, name: str) -> None:
    """Wait until a replica runs nothing."""
    async with asyncio.timeout(15):
        while True:
            stats = await replicas.services[name].stats(replica_id=name)
            if (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0):
                return
            await asyncio.sleep(0.01)


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
