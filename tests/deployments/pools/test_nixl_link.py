"""Tickets between real processes through NIXL: they arrive, or their reader hears that not."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("nixl", reason="NIXL is not installed: pip install 'inference-pio[nixl]'")

from inference_pio.deployments.kv_transport import MAX_FETCHES, TransferError
from inference_pio.deployments.nixl_link import NixlLink
from inference_pio.deployments.nixl_network import SETTING
from inference_pio.deployments.nixl_post import LendingDesk, NixlPost
from inference_pio.workers.kv.ticket import Buffer
from inference_pio.workers.types import RequestError

ANSWER = "answer: "
SIZE = 3 * 2**20 + 17


def pattern(size: int) -> Buffer:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


class Lender:
    """Another process; see ``lend_and_obey``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line: str) -> str:
        self.tell(line)
        assert self.process.stdout is not None
        for said in self.process.stdout:  # NIXL's own lines come between
            if said.startswith(ANSWER):
                return said.removeprefix(ANSWER).strip()
        raise AssertionError("the lender has ended")

    def lend(self, size: int = SIZE) -> Any:
        return pickle.loads(bytes.fromhex(self.ask(f"lend {size}")))


@contextmanager
def lending() -> Iterator[Lender]:
    script = Path(__file__).with_name("lend_and_obey.py")
    with subprocess.Popen(
        [sys.executable, str(script), str(2**26)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Lender(process)
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def _on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "lo")


@pytest.fixture
def lender() -> Iterator[Lender]:
    with lending() as process:
        yield process


@pytest.fixture
def link() -> Iterator[NixlLink]:
    """At its end nothing is fetched, lent or registered."""
    link = NixlLink()
    yield link
    until(lambda: link.num_fetches == 0, "a transfer is open")
    link.close()
    assert link._transport._tensor_desc_cache == {}


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.mark.parametrize("transports", ["all", "tcp"])
def test_tickets_arrive_unchanged_many_at_once(
    transports: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    link = NixlLink()

    async def run(lenders: list[Lender]) -> None:
        sizes = [1, 63, 64, 65, 4097, SIZE]
        offers = [(size, lender.lend(size)) for size in sizes for lender in lenders]
        found = await asyncio.gather(*(link.fetch(offer) for _, offer in offers))
        for (size, _), buffer in zip(offers, found, strict=True):
            np.testing.assert_array_equal(buffer, pattern(size))
        for lender in lenders:
            assert int(lender.ask("used")) >= sum(sizes)
            lender.tell("back")
            until(lambda lender=lender: lender.ask("used") == "0", "tickets stay")

    with lending() as one, lending() as two:
        asyncio.run(run([one, two]))
    assert link.num_fetches == 0
    link.close()
    assert link._transport._tensor_desc_cache == {}


def test_a_killed_lender_is_an_error_and_others_go_on(link: NixlLink, lender: Lender) -> None:
    async def run() -> None:
        offers = [lender.lend(), lender.lend()]
        np.testing.assert_array_equal(await link.fetch(offers[0]), pattern(SIZE))
        lender.process.kill()
        lender.process.wait()
        with pytest.raises(TransferError):
            await asyncio.wait_for(link.fetch(offers[1]), 20)
        with lending() as other:
            np.testing.assert_array_equal(await link.fetch(other.lend()), pattern(SIZE))

    asyncio.run(run())


def test_memory_stays_until_a_transfer_that_nobody_waits_for_has_ended(
    link: NixlLink, lender: Lender
) -> None:
    async def run() -> None:
        offer = lender.lend()
        await link.fetch(offer)
        lender.process.send_signal(signal.SIGSTOP)
        waiting = [asyncio.create_task(link.fetch(offer)) for _ in range(MAX_FETCHES)]
        async with asyncio.timeout(30):
            while link.num_fetches < MAX_FETCHES:
                await asyncio.sleep(0.01)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert link.num_fetches == MAX_FETCHES
        assert len(link._transport._tensor_desc_cache) == MAX_FETCHES
        with pytest.raises(TransferError, match="neither end nor fail"):
            await asyncio.wait_for(link.fetch(offer), 20)
        lender.process.kill()
        lender.process.wait()

    asyncio.run(run())
    until(lambda: link.num_fetches == 0, "transfers from a dead process are open")


def test_a_cut_connection_costs_one_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    # The one kind of connection that a test can cut; between nodes it is not used.
    monkeypatch.setenv("UCX_TLS", "tcp")
    link = NixlLink()

    async def run(lender: Lender) -> None:
        offer = lender.lend()
        await link.fetch(offer)
        assert cut_connections_to(lender.process.pid) > 0
        with pytest.raises(TransferError):
            await asyncio.wait_for(link.fetch(offer), 20)
        for _ in range(3):
            np.testing.assert_array_equal(await link.fetch(offer), pattern(SIZE))

    with lending() as lender:
        asyncio.run(run(lender))
    link.close()


def cut_connections_to(pid: int) -> int:
    """Shut this process's TCP connections to another one down, as a broken network would."""
    theirs = {connection.laddr for connection in psutil.Process(pid).net_connections("tcp")}
    count = 0
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED and connection.raddr in theirs:
            with socket.socket(fileno=os.dup(connection.fd)) as cut:
                cut.shutdown(socket.SHUT_RDWR)
            count += 1
    return count


def test_what_describes_no_ticket_is_refused(link: NixlLink, lender: Lender) -> None:
    async def run() -> None:
        good = lender.lend()
        for wrong in (b"bytes", changed(good, tensor_meta=[]), changed(good, tensor_device="cuda")):
            with pytest.raises(TransferError, match="a ticket is"):
                await link.fetch(wrong)
        (shape, dtype), *_ = good.tensor_meta
        longer = changed(good, tensor_meta=[((shape[0] + 1,), dtype)])
        with pytest.raises(TransferError):
            await link.fetch(longer)
        np.testing.assert_array_equal(await link.fetch(good), pattern(SIZE))

    asyncio.run(run())


def changed(metadata: Any, **values: Any) -> Any:
    other = pickle.loads(pickle.dumps(metadata))
    for name, value in values.items():
        setattr(other, name, value)
    return other


def test_a_closed_link_fetches_nothing() -> None:
    link = NixlLink()
    link.close()
    with pytest.raises(TransferError, match="closed"):
        asyncio.run(link.fetch(b""))


@contextmanager
def desk(lend_bytes: int) -> Iterator[tuple[NixlLink, LendingDesk]]:
    link = NixlLink(lend_bytes)
    try:
        yield link, LendingDesk(link)
        until(lambda: link.lent_bytes == 0, "a ticket stays lent")
    finally:
        link.close()


def test_tickets_wait_for_room_in_their_order() -> None:
    async def run(link: NixlLink, desk: LendingDesk) -> None:
        first = NixlPost(desk, deadline_s=30)
        for _ in range(2):
            await first.send(pattern(2**19))
        large = asyncio.create_task(NixlPost(desk, 30).send(pattern(2**20)))
        await asyncio.sleep(0.05)
        small = asyncio.create_task(NixlPost(desk, 30).send(pattern(64)))
        first.on_read()
        await asyncio.sleep(0.05)
        assert not large.done()
        assert not small.done(), "a small ticket overtook a large one"
        first.on_read()
        assert await asyncio.wait_for(large, 10) is not None
        small.cancel()
        for key in list(link._lent):
            desk.take_back(key)

    with desk(2**20) as (link, lending_desk):
        asyncio.run(run(link, lending_desk))


def test_a_stream_that_ends_frees_what_it_lent_and_what_it_was_lending() -> None:
    async def run(link: NixlLink, desk: LendingDesk) -> None:
        for _ in range(3):
            post = NixlPost(desk, deadline_s=30)
            await post.send(pattern(2**19))
            sending = [asyncio.create_task(post.send(pattern(2**18))) for _ in range(4)]
            await asyncio.sleep(0)  # they are being lent just now, or wait for room
            for task in sending:
                task.cancel()
            await asyncio.wait(sending)
            post.close()
            until(lambda: link.lent_bytes == 0, "a ticket stays lent")

    with desk(2**20) as (link, lending_desk):
        asyncio.run(run(link, lending_desk))


def test_no_room_in_time_is_the_requests_error() -> None:
    async def run(desk: LendingDesk) -> None:
        holder = NixlPost(desk, deadline_s=30)
        await holder.send(pattern(2**20))
        late = NixlPost(desk, deadline_s=0.1)
        with pytest.raises(RequestError) as caught:
            await late.send(pattern(64))
        assert caught.value.code == "deadline_exceeded"
        late.close()
        holder.close()
        with pytest.raises(ValueError, match="1048576 are set aside"):
            await NixlPost(desk, 30).send(pattern(2**20 + 1))

    with desk(2**20) as (_, lending_desk):
        asyncio.run(run(lending_desk))


def test_an_acknowledgement_of_what_was_not_sent_frees_it_all_the_same() -> None:
    async def run(desk: LendingDesk) -> None:
        post = NixlPost(desk, deadline_s=30)
        sending = asyncio.create_task(post.send(pattern(64)))
        await asyncio.sleep(0)
        post.on_read()
        await sending
        post.close()

    with desk(2**20) as (_, lending_desk):
        asyncio.run(run(lending_desk))


def test_keys_are_not_known_before_they_are_lent() -> None:
    with desk(2**20) as (_, lending_desk):
        lending_desk.take_back(uuid.uuid4().hex)
