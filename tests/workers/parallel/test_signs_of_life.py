"""Signs of life: who is told of which death, and who is never believed."""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from inference_pio.workers.parallel.signs_of_life import LifeHub, LifeLink, new_hello

HOST, TOKEN = "127.0.0.1", b"t" * 16
PATIENT_S = 30.0


class Ends:
    """A hub and what it told; closed at the end of the test."""

    def __init__(self) -> None:
        self.told: queue.Queue[str] = queue.Queue()
        self.heard: queue.Queue[str] = queue.Queue()
        self.open: list[LifeHub | LifeLink | socket.socket] = []

    def hub(self, timeout_s: float = PATIENT_S, num_ranks: int = 3) -> LifeHub:
        hub = LifeHub(HOST, num_ranks, TOKEN, timeout_s, self.told.put)
        self.open.append(hub)
        return hub

    def link(
        self, port: int, rank: int = 1, token: bytes = TOKEN, timeout_s: float = PATIENT_S
    ) -> LifeLink:
        link = LifeLink(HOST, port, rank, token, timeout_s, self.heard.put)
        self.open.append(link)
        return link

    def mute(self, port: int, rank: int = 2) -> socket.socket:
        """A rank that says hello and nothing more."""
        connection = socket.create_connection((HOST, port))
        connection.sendall(new_hello(TOKEN, rank))
        self.open.append(connection)
        return connection


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    for end in ends.open:
        end.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_rank_that_hangs_up_is_lost_and_so_are_the_others(ends: Ends) -> None:
    hub = ends.hub()
    mute = ends.mute(hub.port)
    ends.link(hub.port)
    until(lambda: hub.num_connected == 2)
    assert hub.lost is None
    mute.close()
    assert ends.told.get(timeout=PATIENT_S) == "rank 2 is gone: its connection closed"
    assert hub.lost == hub.wait_lost() == "rank 2 is gone: its connection closed"
    assert ends.heard.get(timeout=PATIENT_S).startswith("rank 0 is gone")


def test_a_failing_rank_says_why(ends: Ends) -> None:
    hub = ends.hub()
    link = ends.link(hub.port)
    until(lambda: hub.num_connected == 1)
    link.fail("failed: ValueError: no. 7 … is wrong")
    assert ends.told.get(timeout=PATIENT_S) == "rank 1 failed: ValueError: no. 7 … is wrong"
    assert ends.heard.empty()


def test_silence_counts_once_everybody_is_up(ends: Ends) -> None:
    hub = ends.hub(timeout_s=0.3)
    ends.mute(hub.port)
    ends.link(hub.port, timeout_s=0.3)
    until(lambda: hub.num_connected == 2)
    time.sleep(0.8)
    assert hub.lost is None
    hub.watch_silence()
    assert ends.told.get(timeout=PATIENT_S).startswith("rank 2 gave no sign of life for 0.")


def test_a_rank_hears_that_rank_0_is_silent(ends: Ends) -> None:
    with socket.create_server((HOST, 0)) as silent:
        link = ends.link(silent.getsockname()[1], timeout_s=0.3)
        time.sleep(0.8)
        assert link.lost is None
        link.watch_silence()
        assert ends.heard.get(timeout=PATIENT_S).startswith("rank 0 gave no sign of life for 0.")


def test_ends_that_are_expected_are_no_loss(ends: Ends) -> None:
    hub = ends.hub()
    link = ends.link(hub.port)
    until(lambda: hub.num_connected == 1)
    hub.expect_ends()
    link.close()
    until(lambda: hub.num_connected == 0)
    hub.close()
    assert hub.lost is link.lost is None
    assert ends.told.empty()
    assert ends.heard.empty()


@pytest.mark.parametrize(
    "hello",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        new_hello(b"x" * 16, 1),
        new_hello(TOKEN, 0),
        new_hello(TOKEN, 3),
        new_hello(TOKEN, 2),
    ],
    ids=["nothing", "HTTP", "another token", "rank 0", "a rank too many", "a rank that is there"],
)
def test_strangers_are_refused_and_nothing_is_lost(
    ends: Ends, hello: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_pio.workers.parallel.signs_of_life._HELLO_S", 0.3)
    hub = ends.hub()
    ends.mute(hub.port)
    until(lambda: hub.num_connected == 1)
    with socket.create_connection((HOST, hub.port), timeout=PATIENT_S) as stranger:
        stranger.sendall(hello)
        with contextlib.suppress(ConnectionResetError):  # some of the hello was not read
            assert stranger.recv(1) == b""  # hung up on
    ends.link(hub.port)
    until(lambda: hub.num_connected == 2)
    assert hub.lost is None


def test_a_hello_may_come_late_and_in_pieces(ends: Ends) -> None:
    """A rank that starts on a busy machine is no stranger."""
    hub = ends.hub()
    hello = new_hello(TOKEN, 2)
    with socket.create_connection((HOST, hub.port)) as slow:
        for piece in (hello[:7], hello[7:]):
            time.sleep(0.4)
            slow.sendall(piece)
        until(lambda: hub.num_connected == 1)
        ends.link(hub.port)
        until(lambda: hub.num_connected == 2)
        assert hub.lost is None


def test_nobody_is_listened_to_once_all_ranks_are_here(ends: Ends) -> None:
    hub = ends.hub()
    for rank in (1, 2):
        ends.link(hub.port, rank)
    until(lambda: hub.num_connected == 2)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, hub.port))
    assert hub.lost is None


def test_a_connection_that_cannot_be_accepted_ends_no_watch(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, failures = ends.hub(), iter(range(2))
    accept = socket.socket.accept

    def fail_twice(listener: socket.socket) -> object:
        if next(failures, None) is not None:
            raise OSError(errno.EMFILE, "too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", fail_twice)
    ends.link(hub.port)
    until(lambda: hub.num_connected == 1)
    assert next(failures, None) is None
    assert hub.lost is None


def test_a_watch_that_fails_is_a_loss(ends: Ends) -> None:
    def broken() -> bool:
        raise RuntimeError("nobody to ask")

    hub = ends.hub()
    hub.watch_processes({1: broken})
    reason = "the watch over the ranks failed: RuntimeError: nobody to ask"
    assert ends.told.get(timeout=PATIENT_S) == reason
    assert hub.wait_lost() == reason


@pytest.mark.parametrize("says_hello_late", [False, True])
def test_a_rank_that_ends_at_once_is_heard_first(ends: Ends, says_hello_late: bool) -> None:
    hub = ends.hub()
    time.sleep(0.2)  # past the first beat
    hello = new_hello(TOKEN, 2)
    with socket.create_connection((HOST, hub.port)) as brief:
        brief.sendall(hello[:-1])
        hub.watch_processes({2: lambda: False})
        time.sleep(1.2 if says_hello_late else 0)
        brief.sendall(hello[-1:] + b"failed: no model")
    assert ends.told.get(timeout=PATIENT_S) == "rank 2 failed: no model"


def test_a_process_that_ends_before_it_joined_is_lost(ends: Ends) -> None:
    hub = ends.hub()
    ends.link(hub.port, rank=1)
    until(lambda: hub.num_connected == 1)
    hub.watch_processes({1: lambda: True, 2: lambda: False})
    reason = "rank 2 is gone: its process ended before it joined"
    assert ends.told.get(timeout=PATIENT_S) == reason
