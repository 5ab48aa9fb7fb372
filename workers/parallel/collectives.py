"""One group of ranks that exchange tensors, over a torch.distributed process group of its own.

No default group is made, so any number of engines live in one process. A collective whose peer is
dead or silent never ends by itself in gloo (nor do ``abort`` and ``shutdown`` end it): every wait
here looks up now and then whether the group is lost, and gives up with ``GroupLostError``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..executor import GroupLostError
from .store import PrefixStore, Store

_LOOK_UP = timedelta(seconds=0.25)
_CONNECT = timedelta(seconds=60)
_NEVER = timedelta(days=300)
"""Ranks wait for a command as long as an engine is idle; signs of life tell when to stop."""
_THREADS = 2
"""Operations in flight: a stage sends one part while it computes and sends the next."""


class Watch(Protocol):
    """Who knows whether the group is whole."""

    @property
    def lost(self) -> str | None:
        """Why the group is gone; ``None`` while it is there."""
        ...

    def wait_lost(self) -> str | None:
        """The same, given the time that it takes to notice a death."""
        ...


class Group:
    """Ranks of a group, numbered from 0 in it; every member calls the same methods in order."""

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        size: int,
        device: torch.device,
        address: str,
        watch: Watch,
    ) -> None:
        """Connects to the other members; listens on ``address`` only.

        Raises ``GroupLostError`` where one of them does not come.
        """
        self.rank = rank
        self.size = size
        self.device = device
        self._watch = watch
        named = PrefixStore(name, store)
        try:
            self._group = _connect(named, rank, size, device, address)
            self.all_reduce(torch.ones(1, device=device))
        except RuntimeError as error:
            raise GroupLostError(watch.wait_lost() or f"group {name}: {error}") from error

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        self.wait(self._group.allreduce([tensor]))
        return tensor

    def start_broadcast(self, tensor: Tensor, root: int = 0) -> dist.Work:
        """Send ``tensor`` to all, or receive it; both are there once ``wait`` returns."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        work: dist.Work = self._group.broadcast([tensor], options)
        return work

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """``start_broadcast``, waited for."""
        self.wait(self.start_broadcast(tensor, root))
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor; all have the same shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self.wait(self._group.allgather([found], [tensor]))
        return found

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor on rank 0, nothing elsewhere; all have the same shape."""
        options = dist.GatherOptions()
        options.rootRank = 0
        found = [torch.empty_like(tensor) for _ in range(self.size if self.rank == 0 else 0)]
        self.wait(self._group.gather([found] if found else [], [tensor], options))
        return found

    def scatter(self, out: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Part ``r`` of rank 0's ``parts`` into ``out`` of rank ``r``; all have its shape."""
        options = dist.ScatterOptions()
        options.rootRank = 0
        self.wait(self._group.scatter([out], [list(parts)] if parts else [], options))
        return out

    def all_to_all(
        self, flat: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Tensor:
        """Run ``r`` of ``flat`` goes to rank ``r``; returns what came, in rank order."""
        found = flat.new_empty(sum(receive_sizes))
        sizes = list(receive_sizes), list(send_sizes)
        self.wait(self._group.alltoall_base(found, flat, *sizes, dist.AllToAllOptions()))
        return found

    def wait(self, work: dist.Work) -> None:
        """Until an operation is done. Raises ``GroupLostError`` once it can no more be."""
        if self.device.type == "cuda":
            work.wait()  # only orders streams; the watch aborts the group
            return
        while True:
            try:
                work.wait(_LOOK_UP)
                return
            except RuntimeError as error:
                if work.is_completed():
                    reason = self._watch.wait_lost()
                    raise GroupLostError(reason or f"a rank left the group: {error}") from error
            if self._watch.lost is not None:
                raise GroupLostError(self._watch.lost)

    def close(self) -> None:
        """Leave the group; after a loss, without waiting for anyone."""
        if self.device.type == "cuda":
            self._group.abort()
        elif self._watch.lost is not None:
            _keep_for_ever(self._group)


def _keep_for_ever(group: object) -> None:
    """Keep the destructor of a group from running, also at the interpreter's end.

    It would wait for operations that never end where the peer's process lives on.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _connect(store: Store, rank: int, size: int, device: torch.device, address: str) -> Any:
    """A process group, whose methods torch does not type."""
    if device.type == "cuda":
        return dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = _CONNECT
    options._threads = _THREADS
    group = gloo(store, rank, size, options)
    group._set_default_timeout(_NEVER)
    return group
