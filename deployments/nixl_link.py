"""This process's end of NIXL: memory that others may read, and reading theirs.

A thread of its own owns the agent, which is not made for several:
1. jobs (lend, take back, fetch) come to it through a queue, in order;
2. while something is lent or fetched it wakes every ``POLL_S`` and lets the agent work: where no
   hardware does, the process that lends sends the bytes itself. Otherwise it sleeps;
3. a fetch ends with its bytes or with NIXL's word that it failed. That its caller has gone ends
   nothing: NIXL may write into the memory until then, which therefore stays.

The agent is the NIXL transport of Ray Direct Transport, below Ray's references: those of Ray 2.60
are freed through a group of methods that Serve's replicas do not have, so there they would stay.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.experimental.rdt.nixl_tensor_transport import (
    NixlCommunicatorMetadata,
    NixlTensorTransport,
    NixlTransportMetadata,
)

from ..workers.kv.ticket import Buffer
from .arena import Arena
from .kv_transport import MAX_FETCHES, TransferError
from .nixl_network import listen_on_cluster_network

POLL_S = 0.001
"""Measured on loopback TCP: 1.3 GB/s with this, as much as with a twentieth of it."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class _PolledTransport(NixlTensorTransport):
    """Ray's NIXL transport without NIXL's own thread, which keeps a core busy for ever."""

    _nixl_agent: Any

    def _make_nixl_agent(self, backend: str) -> Any:
        api = import_module("nixl._api")
        config = api.nixl_agent_config(backends=[backend], enable_prog_thread=False)
        return api.nixl_agent(uuid.uuid4().hex, config)

    def progress(self) -> None:
        """Let the agent do what others wait for."""
        self._nixl_agent.get_new_notifs()

    def forget(self, agent_name: str) -> None:
        """Meet a remote agent anew the next time: a lost connection is never opened again."""
        if self._remote_agents.pop(agent_name, None) is not None:
            self._nixl_agent.remove_remote_agent(agent_name)


@dataclass(slots=True)
class _Fetch:
    """A transfer under way into ``array``."""

    request: Any
    array: Buffer
    agent_name: str
    done: Future[Buffer]


class NixlLink:
    """One agent and its thread."""

    def __init__(self, lend_bytes: int = 0) -> None:
        """``lend_bytes`` of memory are set aside for ``lend``.

        Raises ``RuntimeError`` where NIXL is not installed or does not start.
        """
        self._transport = _PolledTransport()  # type: ignore[no-untyped-call]
        try:
            self._transport.get_nixl_agent()  # type: ignore[no-untyped-call]
        except ImportError as error:
            raise RuntimeError(
                f"NIXL is missing here ({error}): pip install 'inference-pio[nixl]'"
            ) from None
        self._arena: Arena | None = None
        if lend_bytes:
            self._arena = Arena(lend_bytes)
            self._memory: Buffer = np.zeros(lend_bytes, np.uint8)
            # Once for good: other agents must be met anew whenever memory is deregistered.
            self._transport.register_nixl_memory(torch.from_numpy(self._memory))
        self._lent: dict[str, tuple[int, Any, Any]] = {}  # place, metadata, tensor
        self._fetches: dict[str, _Fetch] = {}
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="nixl", daemon=True)
        self._thread.start()

    @property
    def lend_bytes(self) -> int:
        """What ``lend`` has room for, all tickets together."""
        return self._arena.size if self._arena is not None else 0

    @property
    def lent_bytes(self) -> int:
        """What is lent now."""
        return self._arena.used if self._arena is not None else 0

    @property
    def num_fetches(self) -> int:
        """Transfers into this process that have not ended, whether or not anybody waits."""
        return len(self._fetches)

    async def lend(self, key: str, buffer: Buffer) -> Any:
        """Copy a ticket to where others can read it; what they need to ``fetch`` it.

        ``None`` while there is no room. It stays until ``take_back``, which a caller that is
        cancelled meanwhile owes as well.
        """
        return await self._in_thread(partial(self._lend, key, buffer))

    def take_back(self, key: str) -> None:
        """Free the place of a ticket; it is known from the moment ``lend`` was called."""
        self._jobs.put(partial(self._take_back, key))

    async def fetch(self, metadata: Any) -> Buffer:
        """Read the ticket that ``lend`` described. Raises ``TransferError``."""
        self._expect_alive()
        done: Future[Buffer] = Future()
        self._jobs.put(partial(self._start, metadata, done))
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the thread; open fetches fail."""
        self._jobs.put(None)
        self._thread.join()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        self._expect_alive()
        done: Future[T] = Future()

        def job() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        self._jobs.put(job)
        return await asyncio.wrap_future(done)

    def _expect_alive(self) -> None:
        if not self._thread.is_alive():
            raise TransferError("the link to other processes has been closed")

    # --- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=POLL_S if self._lent or self._fetches else None)
            except Empty:
                pass
            else:
                if job is None:
                    break
                try:
                    job()
                except Exception:
                    logger.exception("NIXL could not take a ticket back")
            self._progress()
        for fetch in self._fetches.values():
            fetch.done.set_exception(TransferError("this process ends"))

    def _progress(self) -> None:
        if self._lent:
            try:
                self._transport.progress()
            except Exception:
                # A reader's connection; it sees the same and reads no further.
                logger.warning("NIXL could not serve a reader", exc_info=True)
        for key in list(self._fetches):
            self._look_at(key)

    def _lend(self, key: str, buffer: Buffer) -> Any:
        assert self._arena is not None, "nothing was set aside to lend"
        place = self._arena.take(buffer.nbytes)
        if place is None:
            return None
        try:
            here = self._memory[place : place + buffer.nbytes]
            np.copyto(here, buffer)
            tensor = torch.from_numpy(here)
            metadata = self._transport.extract_tensor_transport_metadata(key, [tensor])
        except BaseException:
            self._arena.free(place)
            raise
        self._lent[key] = (place, metadata, tensor)
        return metadata

    def _take_back(self, key: str) -> None:
        lent = self._lent.pop(key, None)
        if lent is None:
            return  # there was no room for it
        assert self._arena is not None
        place, metadata, tensor = lent
        self._arena.free(place)
        self._transport.garbage_collect(key, metadata, [tensor])

    def _start(self, metadata: Any, done: Future[Buffer]) -> None:
        if not done.set_running_or_notify_cancel():
            return  # from here on a caller that goes does not stop NIXL
        try:
            if len(self._fetches) >= MAX_FETCHES:
                raise TransferError(f"{len(self._fetches)} transfers neither end nor fail")
            array: Buffer = np.empty(_checked_size(metadata), np.uint8)
            key, name = uuid.uuid4().hex, metadata.nixl_agent_name
            request = self._transport.fetch_multiple_tensors(
                key, metadata, NixlCommunicatorMetadata(), [torch.from_numpy(array)]
            )
        except TransferError as error:
            done.set_exception(error)
        except Exception as error:
            self._forget(metadata.nixl_agent_name)
            done.set_exception(_plain(error))
        else:
            self._fetches[key] = _Fetch(request, array, name, done)

    def _look_at(self, key: str) -> None:
        fetch = self._fetches[key]
        try:
            self._transport.wait_fetch_complete(fetch.request, timeout=0)
        except TimeoutError:
            return
        except Exception as error:
            failure: TransferError | None = _plain(error)
        else:
            failure = None
        del self._fetches[key]
        # The request's end deregisters the array, which belongs into this thread: the caller must
        # get neither it nor an error whose frames hold it.
        fetch.request = None
        if failure is None:
            fetch.done.set_result(fetch.array)
        else:
            self._forget(fetch.agent_name)
            fetch.done.set_exception(failure)

    def _forget(self, agent_name: str) -> None:
        """After a failure; not while another fetch uses the same connection."""
        if all(fetch.agent_name != agent_name for fetch in self._fetches.values()):
            try:
                self._transport.forget(agent_name)
            except Exception as error:
                logger.info("NIXL had forgotten %s before: %s", agent_name, error)


def open_link(lend_bytes: int = 0) -> NixlLink:
    """A link on the cluster's network; call it in a replica. Raises what ``NixlLink`` raises, and
    ``ValueError`` where this node has no device for it."""
    listen_on_cluster_network(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    return NixlLink(lend_bytes)


def _checked_size(metadata: Any) -> int:
    """Bytes of a ticket. Raises ``TransferError`` for anything but one row of bytes in memory."""
    if type(metadata) is not NixlTransportMetadata:
        raise TransferError(f"a ticket is described by NIXL, {type(metadata).__name__} came")
    match metadata.tensor_meta:
        case [((int(size),), torch.uint8)] if size > 0 and metadata.tensor_device == "cpu":
            return size
    raise TransferError(
        f"a ticket is one row of bytes in host memory; {metadata.tensor_meta!r} on "
        f"{metadata.tensor_device!r} came"
    )


def _plain(error: Exception) -> TransferError:
    """The same without its frames; Ray puts the whole traceback into its text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TransferError(lines[-1].strip())
