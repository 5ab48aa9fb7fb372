"""How replicas are lost, and what follows when no other takes their requests."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from time import sleep
from typing import Any

import pytest

from inference_pio.deployments.wire import SubmitReply, WrongReplicaError
from inference_pio.workers.types import QueueFullError, RequestError, TokenChunk

from .lossy_replicas import after_steps, ask, cluster, mux_of, plain, swept

pytestmark = pytest.mark.usefixtures("quick_orphans")


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


def test_nobody_waits_for_a_replica_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    # This replica never hears of the abort, which closing waits for.
    monkeypatch.setattr("inference_pio.deployments.stream_mux.ABORT_S", 0.1)

    async def main() -> None:
        async with cluster(["one"]) as replicas:
            mux, asked = mux_of(replicas), asyncio.Event()

            async def busy(*args: Any) -> SubmitReply:
                asked.set()
                return await asyncio.Future()

            replicas.services["one"].submit = busy  # type: ignore[method-assign]
            async with asyncio.timeout(10):
                with pytest.raises(RequestError) as caught:
                    await ask(mux, plain(), deadline_s=0.3)
            assert asked.is_set()
            assert caught.value.code == "deadline_exceeded"
            assert mux.num_open == 0
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
