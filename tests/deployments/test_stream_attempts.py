"""The attempts of one request: at most one goes on, and the others are ended."""

from __future__ import annotations

import asyncio
from time import sleep
from typing import Any

import pytest

from inference_pio.deployments.wire import RouteHints, SubmitReply
from inference_pio.workers.types import RequestError, TokenChunk

from .lossy_replicas import after_steps, ask, cluster, mux_of, plain, swept

pytestmark = pytest.mark.usefixtures("quick_orphans")


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
