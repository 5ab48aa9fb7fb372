"""Numbers on their way to a device and back, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def host_tensor(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list in memory of the host, from where it is copied to ``device``.

    For a CUDA device it is pinned: a copy with ``non_blocking`` then goes on while the host does,
    and torch's allocator gives the memory to nobody else before the copy is done.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def copied_to(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list as a tensor on ``device``."""
    host = host_tensor(values, dtype, device)
    return host if device.type == "cpu" else host.to(device, non_blocking=True)


def array_to(values: NDArray[np.int64] | NDArray[np.float32], device: torch.device) -> Tensor:
    """An array as a tensor on ``device``; on the CPU it is the array's own memory."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def pinned_memory(num_bytes: int) -> NDArray[np.uint8]:
    """Fresh memory of the host that CUDA devices copy from and to at full speed."""
    memory: NDArray[np.uint8] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def pin(memory: NDArray[np.uint8]) -> None:
    """Pin memory that is there, to the byte; to be undone by ``unpin`` before it is given back.

    torch's own pinned memory is rounded up to a power of two, too much for what takes most of a
    host. Raises ``RuntimeError`` where CUDA cannot.
    """
    address, runtime = memory.ctypes.data, torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostRegister(address, memory.nbytes, 0)))


def unpin(memory: NDArray[np.uint8]) -> None:
    """See ``pin``."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostUnregister(memory.ctypes.data)))


class HostArrival:
    """A tensor on its way to the host, behind what is queued on the device now."""

    def __init__(self, source: Tensor) -> None:
        self._host = source
        self._event: Any = None  # torch has no type for its constructor
        if source.is_cuda:
            self._host = torch.empty(
                source.shape, dtype=source.dtype, pin_memory=source.numel() > 0
            )
            self._host.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> Tensor:
        """The values; waits until they are there, and for nothing that was queued later."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
