"""The engine in a thread of its own.

1. ``start`` launches the thread; it sleeps while there is nothing to do.
2. ``submit`` checks a request where it is called, so a bad one is refused at once, and hands it
   over; ``abort`` hands over a name.
3. Each turn takes what was handed over, runs one engine step and gives all of its chunks to
   ``on_step`` in one call.
4. ``health`` is answered by a turn of the loop, so a hung or dead engine cannot look healthy.
5. ``stop`` ends the thread; requests still open are aborted and told so.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .config import EngineConfig
from .engine import Engine, refused
from .types import EngineStats, GenerateRequest, QueueFullError, RequestError, TokenChunk

logger = logging.getLogger(__name__)

OnStep = Callable[[list[TokenChunk]], None]


class EngineDeadError(RuntimeError):
    """The engine loop has ended; only a new process helps."""


def build_engine(config: EngineConfig) -> Engine:
    """Load an engine that another thread will drive; raises what ``Engine`` raises.

    The loading runs in a thread that ends with it. OpenMP keeps a team of threads for every thread
    that has run a parallel loop, and once the teams together outnumber the cores, libgomp stops
    spinning between loops: decoding 16 sequences of the 0.6B model on two cores gave 170 tokens/s
    instead of 227 beside the team that loading had left in the main thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="load") as loader:
        return loader.submit(Engine, config).result()


class AsyncEngine:
    """A thread that drives one :class:`Engine`; any thread may call any public method."""

    def __init__(self, engine: Engine, on_step: OnStep) -> None:
        self.engine = engine
        self._on_step = on_step
        self._wake = threading.Condition()
        self._arrivals: dict[str, GenerateRequest] = {}  # by id, in order
        self._aborts: deque[str] = deque()
        self._pings: deque[Future[None]] = deque()
        self._stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Launch the loop."""
        self._thread.start()

    def submit(self, request: GenerateRequest) -> None:
        """Hand a request over.

        Raises ``RequestError`` for one that can never be served or whose id is in use,
        ``QueueFullError`` when as many as the configuration allows are waiting,
        ``EngineDeadError`` after the loop has ended.
        """
        self.engine.validate(request)
        with self._wake:
            self._require_alive()
            name = request.request_id
            if name in self._arrivals or self.engine.is_open(name):
                raise RequestError(f"request id {name!r} is in use", param="request_id")
            limit = self.engine.config.max_waiting
            waiting = self.engine.num_waiting + len(self._arrivals)
            if waiting >= limit:
                raise QueueFullError(
                    f"{waiting} requests are waiting and max_waiting is {limit}; try again later",
                    code="queue_full",
                )
            self._arrivals[name] = request
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request; one that has ended already, or was never known, is left as it is."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify()

    def stats(self) -> EngineStats:
        """Sizes and totals, as of the last step."""
        return self.engine.stats()

    async def health(self, timeout: float) -> None:
        """Return after a real turn of the loop.

        Raises ``EngineDeadError`` if the loop has ended, ``TimeoutError`` after ``timeout``
        seconds without a turn.
        """
        ping: Future[None] = Future()
        with self._wake:
            self._require_alive()
            self._pings.append(ping)
            self._wake.notify()
        await asyncio.wait_for(asyncio.wrap_future(ping), timeout)

    def stop(self, timeout: float = 10.0) -> None:
        """End the loop and abort what is still open."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine loop ended: {self._failure}")
        if self._stopping:
            raise EngineDeadError("the engine is stopping")

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
            self._on_step(self._add_arrivals() + self.engine.abort_all())
        except BaseException:
            self._die(traceback.format_exc(limit=-3))
            raise
        finally:
            self._answer_pings()

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._stopping
                    or self._arrivals
                    or self._aborts
                    or self._pings
                    or self.engine.has_work
                )
            )
            return not self._stopping

    def _turn(self) -> None:
        chunks = self._add_arrivals()
        with self._wake:
            aborts, self._aborts = self._aborts, deque()
        for request_id in aborts:
            self.engine.abort(request_id)
        chunks += self.engine.step()
        if chunks:
            self._on_step(chunks)
        self._answer_pings()

    def _add_arrivals(self) -> list[TokenChunk]:
        """Queue what was handed over; returns the ends of requests that could not be queued.

        Under the lock, so that at no moment a request is neither an arrival nor in the engine.
        """
        failed: list[TokenChunk] = []
        with self._wake:
            for request in self._arrivals.values():
                try:
                    self.engine.add(request)
                except Exception as error:
                    logger.exception("request %s could not be queued", request.request_id)
                    told = RequestError(
                        f"the engine failed on this request: {type(error).__name__}",
                        code="internal_error",
                    )
                    failed += refused(request, told)
            self._arrivals.clear()
        return failed

    def _answer_pings(self) -> None:
        with self._wake:
            pings, self._pings = self._pings, deque()
        for ping in pings:
            if not ping.set_running_or_notify_cancel():
                continue
            if self._failure is None:
                ping.set_result(None)
            else:
                ping.set_exception(EngineDeadError(self._failure))

    def _die(self, reason: str) -> None:
        with self._wake:
            self._failure = reason
            lost, self._arrivals = self._arrivals, {}
        self._on_step(self.engine.fail_all(reason, also=list(lost.values())))
