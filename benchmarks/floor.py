"""What the hardware allows right now: the rate of reading memory and of multiplying matrices.

Memory bandwidth of shared machines changes by a factor of two within minutes, so a floor is only
worth something beside the measurement that it judges: it is sampled in every round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = {"cpu": 512 * 2**20, "cuda": 4 * 2**30}
"""Far above every cache; on a GPU also so much that starting to read takes no share."""
MATRIX = {"cpu": 1536, "cuda": 8192}
"""Large enough for the peak rate; on a CPU small enough for 50 ms on one core."""
SMALL_MATRIX = 256
TRIES = 3


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward pass has to do at least."""

    read_bytes: float
    multiply_adds: float


@dataclass(frozen=True, slots=True)
class Floor:
    """Rates that the machine reached a moment ago."""

    bytes_per_s: float
    multiply_adds_per_s: float

    def seconds(self, work: Work) -> float:
        """The shortest time for ``work``: reading and computing overlap at best."""
        return max(
            work.read_bytes / self.bytes_per_s, work.multiply_adds / self.multiply_adds_per_s
        )

    def mean(self, later: Floor) -> Floor:
        """What held between two samples."""
        return Floor(
            (self.bytes_per_s + later.bytes_per_s) / 2,
            (self.multiply_adds_per_s + later.multiply_adds_per_s) / 2,
        )


class FloorProbe:
    """Holds the buffers, so that a sample costs no allocation."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        size = MATRIX[device.type]
        self._memory = torch.ones(READ_BYTES[device.type] // 4, device=device)
        if device.type == "cpu":
            dtype = min((dtype, torch.float32), key=self._small_product)
        self._left = torch.ones(size, size, dtype=dtype, device=device)
        self._right = torch.ones(size, size, dtype=dtype, device=device)
        self.sample()  # first touches and library start-up are not the machine's rate

    def sample(self) -> Floor:
        """The best of a few tries, on torch's current threads."""
        read = min(self._seconds(self._memory.sum) for _ in range(TRIES))
        multiply = min(
            self._seconds(lambda: torch.mm(self._left, self._right)) for _ in range(TRIES)
        )
        return Floor(self._memory.nbytes / read, len(self._left) ** 3 / multiply)

    def _small_product(self, dtype: torch.dtype) -> float:
        """Seconds: a CPU without instructions for a type may multiply it far below its peak."""
        small = torch.ones(SMALL_MATRIX, SMALL_MATRIX, dtype=dtype, device=self._device)
        return min(self._seconds(lambda: torch.mm(small, small)) for _ in range(TRIES))

    def _seconds(self, action: Callable[[], torch.Tensor]) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        action()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of a checkpoint that decide how much work a token is."""

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    kv_width: int
    vocab_rows: int
    bytes_per_weight: float
    """Of the layers' matrices, scales included."""
    bytes_per_head_weight: float
    bytes_per_cache_value: float

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices; norms are too small to matter."""
        attention = self.hidden * (2 * self.query_width + 2 * self.kv_width)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocab_rows

    @property
    def _weight_bytes(self) -> float:
        return (
            self.layer_parameters * self.bytes_per_weight
            + self.head_parameters * self.bytes_per_head_weight
        )

    def decode_step(self, batch: int, context: int) -> Work:
        """One token for each of ``batch`` sequences of ``context`` tokens."""
        parameters = self.layer_parameters + self.head_parameters
        keys_and_values = 2 * self.layers * self.kv_width * context * batch
        attention = 2 * self.layers * self.query_width * context * batch
        return Work(
            read_bytes=self._weight_bytes + keys_and_values * self.bytes_per_cache_value,
            multiply_adds=parameters * batch + attention,
        )

    def prefill(self, length: int) -> Work:
        """One prompt of ``length`` tokens, with the logits of its last."""
        causal_pairs = length * (length + 1) / 2
        attention = 2 * self.layers * self.query_width * causal_pairs
        return Work(
            read_bytes=self._weight_bytes,
            multiply_adds=self.layer_parameters * length + self.head_parameters + attention,
        )
