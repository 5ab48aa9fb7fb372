"""Signs of life between rank 0 and the other ranks, outside the threads that compute.

1. Rank 0 listens (``LifeHub``); every other rank connects (``LifeLink``) and says who it is.
2. Both sides send a byte every interval. During the start, only a broken connection counts as a
   death: loading holds a process up now and then. After ``watch_silence`` so does silence.
3. A rank that fails says why and hangs up. Rank 0 then ends every rank: it hangs up on all, kills
   what can be killed, and whoever waits in a collective looks up and finds the group lost.
4. A rank that loses rank 0 ends itself.
5. ``close`` stops the watching; what happens afterwards is no loss.
6. A watch that fails itself counts as a loss: unwatched, survivors would wait for ever.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

_BEAT = b"\0"  # never part of a word
_TOKEN_BYTES = 16
_HELLO_BYTES = _TOKEN_BYTES + 4
_HELLO_S = 2.0
"""For a connection to say who it is, which a rank does at once."""
_MAX_WORDS = 2000
"""Bytes of a failing rank's last words that are kept."""


def new_hello(token: bytes, rank: int) -> bytes:
    """What a rank says first."""
    return token + rank.to_bytes(4, "big")


class _Watcher(ABC):
    """A thread that beats, and what both ends of a connection know."""

    def __init__(self, name: str, timeout_s: float, on_lost: Callable[[str], None]) -> None:
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._interval_s = min(0.5, timeout_s / 6)
        self._ended = threading.Event()
        self._reason: str | None = None
        self._forgiving = False
        self._closing = False
        self._watching_since: float | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def lost(self) -> str | None:
        """See ``Watch.lost``."""
        return self._reason

    def wait_lost(self) -> str | None:
        """See ``Watch.wait_lost``: as long as noticing silence takes."""
        self._ended.wait(self._timeout_s + 2 * self._interval_s)
        return self._reason

    def watch_silence(self) -> None:
        """From now on, silence is death."""
        self._watching_since = time.monotonic()

    def expect_ends(self) -> None:
        """From now on, nothing counts as a loss."""
        with self._lock:
            self._forgiving = True

    def _silent_for(self, heard: float) -> float:
        """Seconds of silence that count."""
        if self._watching_since is None:
            return 0.0
        return time.monotonic() - max(heard, self._watching_since)

    def lose(self, reason: str) -> None:
        """The group is gone; the first reason stays. The thread does the rest."""
        with self._lock:
            if self._reason is None and not self._forgiving:
                self._reason = reason

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:
            logger.exception("the watch over the ranks failed")
            self.lose(f"the watch over the ranks failed: {type(error).__name__}: {error}")
        try:
            self._leave()
            if self._reason is not None:
                self._on_lost(self._reason)
        finally:
            self._ended.set()

    @abstractmethod
    def _watch(self) -> None:
        """Look and beat until the group is lost or the watching is over."""

    @abstractmethod
    def _leave(self) -> None:
        """Hang up."""


@dataclass(slots=True)
class _Stranger:
    """A connection that has not yet said who it is."""

    since: float
    address: str
    hello: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class _Peer:
    """A rank as the hub sees it."""

    rank: int
    heard: float
    words: bytearray = field(default_factory=bytearray)


class LifeHub(_Watcher):
    """Rank 0's end; ``on_lost`` is called once, in the hub's thread, with the reason."""

    def __init__(
        self,
        host: str,
        num_ranks: int,
        token: bytes,
        timeout_s: float,
        on_lost: Callable[[str], None],
    ) -> None:
        super().__init__("signs-of-life", timeout_s, on_lost)
        self._token = token
        self._alive: dict[int, Callable[[], bool]] = {}
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._peers: dict[socket.socket, _Peer] = {}
        self._missing = set(range(1, num_ranks))
        self._dead: set[int] = set()
        """Ranks that were missing at the last beat, and whose processes had ended."""
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server((host, 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()

    def watch_processes(self, alive: dict[int, Callable[[], bool]]) -> None:
        """Ranks by number, and how to ask whether each one's process is there."""
        self._alive = alive

    @property
    def num_connected(self) -> int:
        """Ranks that have not hung up."""
        return len(self._peers)

    def close(self) -> None:
        """Stop watching and hang up."""
        self.expect_ends()
        self._closing = True
        self._thread.join()

    def _watch(self) -> None:
        beat = 0.0
        while self._reason is None and not self._closing:
            for key, _ in self._selector.select(self._interval_s / 2):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._strangers:
                    self._greet(key.fileobj)
                else:
                    self._read(key.fileobj)
            if time.monotonic() - beat >= self._interval_s:
                beat = time.monotonic()
                self._beat()

    def _leave(self) -> None:
        for connection in [self._listener, *self._strangers, *self._peers]:
            connection.close()
        self._selector.close()
        if self._reason is not None:
            logger.error("the group of ranks is lost: %s", self._reason)

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError as error:  # it is gone again, or there are too many
            logger.warning("a connection could not be accepted: %s", error)
            return
        connection.setblocking(False)
        self._strangers[connection] = _Stranger(time.monotonic(), str(address))
        self._selector.register(connection, selectors.EVENT_READ)

    def _greet(self, connection: socket.socket) -> None:
        """Take what a connection says of itself; nobody waits for the rest of it."""
        stranger = self._strangers[connection]
        try:
            data = connection.recv(_HELLO_BYTES - len(stranger.hello))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        stranger.hello += data
        if data and len(stranger.hello) < _HELLO_BYTES:
            return
        rank = int.from_bytes(stranger.hello[_TOKEN_BYTES:], "big")
        known = hmac.compare_digest(stranger.hello[:_TOKEN_BYTES], self._token)
        if not known or rank not in self._missing:
            self._refuse(connection)
            return
        del self._strangers[connection]
        self._peers[connection] = _Peer(rank, time.monotonic())
        self._missing.discard(rank)
        if not self._missing:
            self._selector.unregister(self._listener)
            self._listener.close()

    def _refuse(self, connection: socket.socket) -> None:
        address = self._strangers.pop(connection).address
        logger.warning("refused a connection from %s: it is no rank of this group", address)
        self._selector.unregister(connection)
        connection.close()

    def _read(self, connection: socket.socket) -> None:
        peer = self._peers[connection]
        try:
            data = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            peer.heard = time.monotonic()
            peer.words += data.replace(_BEAT, b"")
            del peer.words[_MAX_WORDS:]
            return
        self._selector.unregister(connection)
        connection.close()
        del self._peers[connection]
        words = peer.words.decode(errors="replace").strip()
        self.lose(f"rank {peer.rank} {words or 'is gone: its connection closed'}")

    def _beat(self) -> None:
        for connection, stranger in list(self._strangers.items()):
            if time.monotonic() - stranger.since > _HELLO_S:
                self._refuse(connection)
        for connection, peer in self._peers.items():
            silent = self._silent_for(peer.heard)
            if silent > self._timeout_s:
                self.lose(f"rank {peer.rank} gave no sign of life for {silent:.1f} s")
            try:
                connection.send(_BEAT)
            except OSError:
                continue  # full: it is silent as well; broken: the next read tells
        # A rank that has connected is read to the end first, for it may have said why: its
        # connection is seen by the next beat, and is no stranger any more some time after that.
        dead = {rank for rank in self._missing & self._alive.keys() if not self._alive[rank]()}
        for rank in sorted(dead & self._dead):
            if not self._strangers:
                self.lose(f"rank {rank} is gone: its process ended before it joined")
        self._dead = dead


class LifeLink(_Watcher):
    """Another rank's end; ``on_lost`` is called once, in the link's thread, with the reason."""

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        token: bytes,
        timeout_s: float,
        on_lost: Callable[[str], None],
    ) -> None:
        """Raises ``OSError`` where rank 0 is not there."""
        super().__init__(f"signs-of-life-{rank}", timeout_s, on_lost)
        self._socket = socket.create_connection((host, port), timeout=10.0)
        self._socket.sendall(new_hello(token, rank))
        self._socket.settimeout(self._interval_s)
        self._heard = time.monotonic()
        self._thread.start()

    @property
    def address(self) -> str:
        """Of this process, on the interface that leads to rank 0."""
        return str(self._socket.getsockname()[0])

    def fail(self, reason: str) -> None:
        """Tell rank 0 why this rank ends, and hang up."""
        self.expect_ends()
        try:
            self._socket.sendall(reason.encode()[:_MAX_WORDS])
        except OSError:
            logger.warning("rank 0 could not be told: %s", reason)
        self._hang_up()

    def close(self) -> None:
        """Stop watching and hang up."""
        self.expect_ends()
        self._hang_up()

    def _hang_up(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()

    def _watch(self) -> None:
        beat = 0.0
        while self._reason is None and not self._closing:
            if time.monotonic() - beat >= self._interval_s:
                beat = time.monotonic()
                self._exchange(self._send)
            self._exchange(self._receive)
            silent = self._silent_for(self._heard)
            if silent > self._timeout_s:
                self.lose(f"rank 0 gave no sign of life for {silent:.1f} s")

    def _leave(self) -> None:
        self._socket.close()

    def _exchange(self, action: Callable[[], None]) -> None:
        try:
            action()
        except TimeoutError:
            return
        except OSError as error:
            self.lose(f"rank 0 is gone: {error}")

    def _send(self) -> None:
        self._socket.send(_BEAT)

    def _receive(self) -> None:
        if self._socket.recv(4096):
            self._heard = time.monotonic()
        else:
            self.lose("rank 0 is gone: its connection closed")
