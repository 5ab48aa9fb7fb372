"""The engine in a thread of its own.

1. ``start`` launches the thread; it sleeps while there is nothing to do, and while all there is
   waits for another engine: until a ticket, an arrival or the nearest deadline.
2. ``submit`` checks a request where it is called, so a bad one is refused at once, and hands it
   over, as ``add_prefill`` does; whatever else is told to the engine (an abort, a KV ticket) is
   handed over too, and heard in order, after the arrivals.
3. Each turn takes what was handed over, runs one engine step and gives all that came out of it to
   ``on_step`` in one call.
4. ``health`` is answered by a turn of the loop, so a hung or dead engine cannot look healthy.
5. ``stop`` ends the thread, and with it the engine; requests still open are aborted and told so.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from .config import EngineConfig
from .engine import Engine
from .kv.ticket import Buffer
from .parallel.launcher import RankLauncher
from .request_desk import refused
from .types import (
    EngineStats,
    GenerateRequest,
    PrefillEnd,
    PrefillRequest,
    QueueFullError,
    RequestError,
    StepOutput,
)

logger = logging.getLogger(__name__)

OnStep = Callable[[StepOutput], None]


class EngineDeadError(RuntimeError):
    """The engine loop has ended; only a new process helps."""


def build_engine(config: EngineConfig, launcher: RankLauncher | None = None) -> Engine:
    """Load an engine that another thread will drive; raises what ``Engine`` raises.

    The loading runs in a thread that ends with it. OpenMP keeps a team of threads for every thread
    that has run a parallel loop, and once the teams together outnumber the cores, libgomp stops
    spinning between loops: decoding 16 sequences of the 0.6B model on two cores gave 170 tokens/s
    instead of 227 beside the team that loading had left in the main thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="load") as loader:
        return loader.submit(Engine, config, launcher).result()


class AsyncEngine:
    """A thread that drives one :class:`Engine`; any thread may call any public method."""

    def __init__(self, engine: Engine, on_step: OnStep) -> None:
        self.engine = engine
        self._on_step = on_step
        self._wake = threading.Condition()
        self._arrivals: dict[str, GenerateRequest] = {}  # by id, in order
        self._prefills: dict[tuple[str, int], PrefillRequest] = {}
        self._orders: deque[Callable[[], None]] = deque()  # calls of the engine, in order
        self._pings: deque[Future[None]] = deque()
        self._stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Launch the loop."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the loop has neither ended nor been told to."""
        return self._failure is None and not self._stopping

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
            self._require_place()
            self._arrivals[name] = request
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request; one that has ended already, or was never known, is left as it is."""
        self._order(partial(self.engine.abort, request_id))

    def add_prefill(self, request: PrefillRequest) -> None:
        """Hand over a prefill for another engine; what is wrong with its tokens shows as its end.

        Raises ``RequestError`` where its id and attempt are in use, ``QueueFullError`` and
        ``EngineDeadError`` as ``submit`` does.
        """
        name = (request.request_id, request.attempt)
        with self._wake:
            self._require_alive()
            if name in self._prefills or self.engine.is_prefilling(*name):
                raise RequestError(
                    f"attempt {name[1]} of prefill {name[0]!r} is in use", param="attempt"
                )
            self._require_place()
            self._prefills[name] = request
            self._wake.notify()

    def abort_prefill(self, request_id: str, attempt: int) -> None:
        """End a prefill; one that has ended already, or was never known, is left as it is."""
        self._order(partial(self.engine.abort_prefill, request_id, attempt))

    def import_ticket(self, request_id: str, attempt: int, buffer: Buffer) -> None:
        """Hand over a ticket of what was wanted; ``buffer`` must not change any more."""
        self._order(partial(self.engine.import_ticket, request_id, attempt, buffer))

    def end_import(self, request_id: str, attempt: int, reason: str | None) -> None:
        """No more tickets come; ``reason`` is a stable word where the far side failed."""
        self._order(partial(self.engine.end_import, request_id, attempt, reason))

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

    def _order(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._orders.append(call)
            self._wake.notify()

    def _require_place(self) -> None:
        limit = self.engine.config.max_waiting
        waiting = self.engine.num_waiting + len(self._arrivals) + len(self._prefills)
        if waiting >= limit:
            raise QueueFullError(
                f"{waiting} requests are waiting and max_waiting is {limit}; try again later",
                code="queue_full",
            )

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise EngineDeadError(f"the engine loop ended: {self._failure}")
        if self._stopping:
            raise EngineDeadError("the engine is stopping")

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
            failed = self._add_arrivals()
            self._tell(failed, self.engine.abort_all())
        except BaseException:
            self._die(traceback.format_exc(limit=-3))
            raise
        finally:
            self._answer_pings()
            self.engine.close()

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._stopping
                    or self._arrivals
                    or self._prefills
                    or self._orders
                    or self._pings
                    or self.engine.has_work
                ),
                timeout=self._seconds_to_deadline(),
            )
            return not self._stopping

    def _seconds_to_deadline(self) -> float | None:
        """How long the loop may sleep: what waits for another engine ends at its deadline."""
        deadline = self.engine.next_deadline()
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _turn(self) -> None:
        failed = self._add_arrivals()
        with self._wake:
            orders, self._orders = self._orders, deque()
        for order in orders:
            order()
        self._tell(failed, self.engine.step())
        self._answer_pings()

    def _tell(self, failed: StepOutput, output: StepOutput) -> None:
        output.chunks[:0] = failed.chunks
        output.prefill_ends[:0] = failed.prefill_ends
        if output:
            self._on_step(output)

    def _add_arrivals(self) -> StepOutput:
        """Queue what was handed over; returns the ends of what could not be queued.

        Under the lock, so that at no moment a request is neither an arrival nor in the engine.
        """
        failed = StepOutput()
        with self._wake:
            for request in self._arrivals.values():
                try:
                    self.engine.add(request)
                except Exception as error:
                    failed.chunks += refused(request, _told(request.request_id, error))
            self._arrivals.clear()
            for name, prefill in self._prefills.items():
                try:
                    self.engine.add_prefill(prefill)
                except Exception as error:
                    failed.prefill_ends.append(PrefillEnd(*name, _told(name[0], error)))
            self._prefills.clear()
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
            prefills, self._prefills = self._prefills, {}
        self._on_step(
            self.engine.fail_all(
                reason, also=list(lost.values()), also_prefills=list(prefills.values())
            )
        )


def _told(request_id: str, error: Exception) -> RequestError:
    """What the caller is told of an error at queueing; only their own mistakes in full."""
    if isinstance(error, RequestError):
        return error
    logger.error("request %s could not be queued", request_id, exc_info=error)
    return RequestError(
        f"the engine failed on this request: {type(error).__name__}", code="internal_error"
    )
