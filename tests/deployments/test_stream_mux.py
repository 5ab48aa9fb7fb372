"""The multiplexed stream between an ingress and a real engine, in one process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import pytest

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.stream_mux import StreamMux
from inference_pio.deployments.wire import (
    RouteHints,
    StreamSweptError,
    SubmitReply,
    WrongReplicaError,
)
from inference_pio.workers.types import (
    EngineStats,
    GenerateRequest,
    QueueFullError,
    RequestError,
    SamplingParams,
    TokenChunk,
)

from .conftest import ENGINE, running_engine

REQUEST = ContextVar("REQUEST", default="")


@asynccontextmanager
async def engine_service(**options: Any) -> AsyncIterator[EngineService]:
    config = load_config({"engine": {**ENGINE, **options}, "api": {"max_prompts": 1}}).engine
    async with running_engine(config) as service:
        yield service


async def at_rest(service: EngineService) -> None:
    """Wait until nothing runs, waits or holds blocks."""
    async with asyncio.timeout(10):
        while True:
            stats = await service.stats(replica_id="replica")
            if (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0):
                return
            await asyncio.sleep(0.01)


async def begun(service: EngineService) -> None:
    """Wait until something runs."""
    async with asyncio.timeout(10):
        while (await service.stats(replica_id="replica")).running == 0:
            await asyncio.sleep(0.001)


def request(name: str, max_tokens: int = 20, n: int = 1) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=1.0, seed=7, n=n)
    return GenerateRequest(name, (40, 41, 42), params)


def mux_of(service: Any, idle_s: float = 60.0, buffered: int = 10_000) -> StreamMux:
    return StreamMux(service, max_buffered_tokens=buffered, idle_s=idle_s, max_migrations=0)


async def tokens(mux: StreamMux, *requests: GenerateRequest) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    async with mux.open(requests, deadline_s=20) as generation:
        async for chunks in generation:
            for chunk in chunks:
                found.setdefault((chunk.request_id, chunk.index), []).extend(chunk.token_ids)
    return found


def test_many_requests_share_one_stream_and_get_their_own_tokens() -> None:
    async def main() -> None:
        async with engine_service() as service:
            mux = mux_of(service)
            alone = await tokens(mux, request("alone"))
            many = await asyncio.gather(*(tokens(mux, request(f"r{n}")) for n in range(20)))
            for number, found in enumerate(many):
                assert found == {(f"r{number}", 0): alone["alone", 0]}
            choices = await tokens(mux, request("x", n=3), request("y"))
            assert {key: len(ids) for key, ids in choices.items()} == {
                ("x", 0): 20,
                ("x", 1): 20,
                ("x", 2): 20,
                ("y", 0): 20,
            }
            assert mux.num_open == 0
            assert mux.unknown_chunks == 0
            await mux.close()

    asyncio.run(main())


def test_leaving_early_aborts_and_does_not_disturb_the_others() -> None:
    async def main() -> None:
        async with engine_service() as service:
            mux = mux_of(service)
            other = asyncio.create_task(tokens(mux, request("other", 300)))
            for number in range(5):
                async with mux.open([request(f"r{number}", 4000)], deadline_s=20) as generation:
                    await anext(generation)
            async with asyncio.timeout(10):
                while (await service.stats(replica_id="replica")).running > 1:
                    await asyncio.sleep(0.005)
            assert not other.done()
            assert len((await other)["other", 0]) == 300
            assert mux.unknown_chunks == 0
            await mux.close()

    asyncio.run(main())


def test_a_cancelled_submit_leaves_nothing_running() -> None:
    async def main() -> None:
        async with engine_service() as service:
            mux = mux_of(service)
            for turns in range(6):
                task = asyncio.create_task(tokens(mux, request(f"r{turns}", 4000)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await at_rest(service)
            assert mux.num_open == 0
            await mux.close()

    asyncio.run(main())


def test_a_slow_reader_is_cut_at_once() -> None:
    async def main() -> None:
        async with engine_service() as service:
            mux = mux_of(service, buffered=30)
            async with mux.open([request("slow", 4000)], deadline_s=20) as generation:
                await begun(service)
                await at_rest(service)
                with pytest.raises(RequestError) as caught:
                    async for _ in generation:
                        pass
            assert caught.value.code == "slow_client"
            await mux.close()

    asyncio.run(main())


def test_all_or_none_of_a_submission_is_taken() -> None:
    async def main() -> None:
        async with engine_service(max_waiting=2, max_num_seqs=1) as service:
            mux = mux_of(service)
            with pytest.raises(RequestError, match="prompt") as caught:
                await tokens(mux, request("good"), GenerateRequest("bad", (), SamplingParams()))
            assert caught.value.param == "prompt"
            await at_rest(service)
            crowd = [request(f"r{number}", 2000) for number in range(10)]
            with pytest.raises(QueueFullError):
                await tokens(mux, *crowd)
            await at_rest(service)
            assert mux.num_open == 0
            await mux.close()

    asyncio.run(main())


class Breaking(EngineService):
    """A real engine whose stream ends, or fails, after some batches; as when its process dies."""

    after = 3
    fails = True
    subscriptions = 0

    async def subscribe(
        self, stream_id: str, *, replica_id: str
    ) -> AsyncGenerator[list[TokenChunk], None]:
        self.subscriptions += 1
        left = self.after
        async for batch in super().subscribe(stream_id, replica_id=replica_id):
            yield batch
            left -= 1
            if left == 0 and self.fails:
                raise ConnectionResetError("gone")
            if left == 0:
                return


@pytest.mark.parametrize("fails", [True, False])
def test_a_broken_stream_fails_its_requests_and_the_next_ones_work(fails: bool) -> None:
    async def main() -> None:
        async with engine_service() as donor:
            donor.__class__ = Breaking
            assert isinstance(donor, Breaking)
            donor.fails = fails
            mux = mux_of(donor)
            both = [tokens(mux, request(name, 3000)) for name in ("a", "b")]
            results = await asyncio.gather(*both, return_exceptions=True)
            for result in results:
                assert isinstance(result, RequestError)
                assert result.code == "stream_lost"
            await at_rest(donor)
            donor.after = -1
            assert len((await tokens(mux, request("c")))["c", 0]) == 20
            assert donor.subscriptions == 2
            await mux.close()

    asyncio.run(main())


class Unreachable(EngineService):
    """A replica that dies while a request is handed over."""

    async def submit(
        self, stream_id: str, requests: Sequence[GenerateRequest], hints: RouteHints
    ) -> SubmitReply:
        raise ConnectionResetError("gone")


def test_a_submit_that_fails_is_an_unavailable_engine() -> None:
    async def main() -> None:
        async with engine_service() as service:
            service.__class__ = Unreachable
            mux = mux_of(service)
            with pytest.raises(RequestError) as caught:
                await tokens(mux, request("a"))
            assert caught.value.code == "engine_unavailable"
            assert mux.num_open == 0
            await mux.close()

    asyncio.run(main())


def test_calls_for_another_replica_are_refused() -> None:
    async def main() -> None:
        async with engine_service() as service:
            with pytest.raises(WrongReplicaError):
                await service.abort("s", ["a"], replica_id="other")
            with pytest.raises(WrongReplicaError):
                await service.stats(replica_id="other")
            with pytest.raises(WrongReplicaError):
                await anext(service.subscribe("s", replica_id="other"))

    asyncio.run(main())


def test_a_reader_that_comes_after_the_sweep_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_pio.deployments.engine_service.ORPHAN_S", 0.1)

    async def main() -> None:
        async with engine_service() as service:
            await service.submit("late", [request("a", 4000)], RouteHints())
            await begun(service)
            await at_rest(service)
            with pytest.raises(StreamSweptError):
                await anext(service.subscribe("late", replica_id="replica"))

    asyncio.run(main())


def test_a_replica_that_does_not_answer_holds_up_no_metrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inference_pio.deployments.stream_mux.STATS_S", 0.1)

    async def main() -> None:
        async with engine_service() as service:
            silent = Silent(service)
            mux = mux_of(silent)
            for name in ("lost-1", "replica", "lost-2", "gone"):
                mux.know(name)
            REQUEST.set("the scrape")
            assert set(await mux.stats()) == {"replica"}
            assert set(await mux.stats()) == {"replica"}
            assert silent.asked == {"lost-1": 2, "replica": 2, "lost-2": 2, "gone": 1}
            await mux.close()

    asyncio.run(main())


class Silent:
    """A real service among replicas that are lost with their node, which nobody has noticed."""

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self.asked: Counter[str] = Counter()

    async def stats(self, *, replica_id: str) -> EngineStats:
        # Calls that share a request's context share an id in Serve, whose router then spins.
        assert REQUEST.get() == ""
        self.asked[replica_id] += 1
        if replica_id.startswith("lost"):
            await asyncio.Event().wait()
        return await self._service.stats(replica_id=replica_id)


def test_requests_of_a_dead_ingress_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_pio.deployments.engine_service.ORPHAN_S", 0.1)

    async def main() -> None:
        async with engine_service() as service:
            # It submits and never reads; and one that reads, then goes.
            await service.submit("dead", [request("a", 4000)], RouteHints())
            await begun(service)
            await at_rest(service)
            await service.submit("gone", [request("b", 4000)], RouteHints())
            stream = service.subscribe("gone", replica_id="replica")
            while not await anext(stream):
                pass
            await stream.aclose()
            await at_rest(service)

    asyncio.run(main())


def test_a_request_id_is_taken_once() -> None:
    async def main() -> None:
        async with engine_service() as service:
            mux = mux_of(service)
            async with mux.open([request("same", 4000)], deadline_s=20) as generation:
                await anext(generation)
                reply = await service.submit("another", [request("same")], RouteHints())
                assert reply.error is not None
                assert reply.error.param == "request_id"
                await anext(generation)  # the first goes on
            await mux.close()

    asyncio.run(main())
