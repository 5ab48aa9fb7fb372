"""A device that computes behind the host's back: a thread, in order, after a delay.

It stands for a CUDA device where there is none. What the host is given has its shape at once and
its values later; whoever looks at them waits, and whoever hands them back to the device does not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from inference_pio.kernels.sampling.api import Draw, Edit, SamplingKernels
from inference_pio.kernels.sampling.logprobs import Logprobs
from inference_pio.workers.batch import BatchInputs
from inference_pio.workers.executor import LocalExecutor
from inference_pio.workers.model.streaming.layer_stream import StreamStats
from inference_pio.workers.types import BlockId

DELAY_S = 0.0005

_KNOWN_AT_ONCE = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.__len__,
}


class Late(Tensor):
    """A result of the device. Every operation of the host on its values waits for them."""

    job: Future[None]

    @classmethod
    def of(cls, values: Tensor, job: Future[None]) -> Late:
        late = values.as_subclass(cls)
        late.job = job
        return late

    @property
    def plain(self) -> Tensor:
        """The same memory, for the device, which comes to it in order."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _KNOWN_AT_ONCE:
            for operand in args:
                if isinstance(operand, Late):
                    operand.job.result()
            args = tuple(a.plain if isinstance(a, Late) else a for a in args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class LatePending:
    """Tokens of the device; see ``PendingTokens``."""

    def __init__(self, device: LateDevice, tokens_R: Late, logprobs: list[Logprobs | None]) -> None:
        self.on_device_R = tokens_R
        self._device = device
        self._logprobs = logprobs
        self._number = device.num_launched

    def read(self) -> list[int]:
        tokens: list[int] = self.on_device_R.tolist()
        self._device.events.append(f"read {self._number}")
        return tokens

    def read_logprobs(self) -> list[Logprobs | None]:
        self.on_device_R.job.result()
        return self._logprobs


class LateSampling(SamplingKernels):
    """Sampling on the device."""

    def __init__(self, device: LateDevice, inner: SamplingKernels) -> None:
        self._device = device
        self._inner = inner

    def launch(
        self,
        logits_RV: Tensor,
        num_tokens: int,
        draws: Sequence[Draw],
        edits: Sequence[Edit],
        tops: Sequence[int | None],
    ) -> LatePending:
        tokens_R = torch.full((len(draws),), -1, dtype=torch.int64)
        logprobs: list[Logprobs | None] = []

        def draw() -> None:
            plain = logits_RV
            if isinstance(logits_RV, Late):
                logits_RV.job.result()
                plain = logits_RV.plain
            drawn = self._inner.launch(plain, num_tokens, draws, [_here(e) for e in edits], tops)
            tokens_R.copy_(torch.tensor(drawn.read()))
            logprobs.extend(drawn.read_logprobs())

        return LatePending(self._device, Late.of(tokens_R, self._device.queue(draw)), logprobs)

    def sample(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> Tensor:
        no_logprobs = [None] * len(draws)
        return torch.tensor(self.launch(logits_RV, num_tokens, draws, edits, no_logprobs).read())

    def weight_sums(self, logits_RV: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        return self._inner.weight_sums(logits_RV, num_tokens)

    def top_tokens(self, logits_RV: Tensor, num_tokens: int, count: int) -> tuple[Tensor, Tensor]:
        return self._inner.top_tokens(logits_RV, num_tokens, count)


def _here(edit: Edit) -> Edit:
    """The edit as the device sees it: what it has drawn before is in its memory."""
    unread = edit.unread
    if unread is None:
        return edit
    assert isinstance(unread.tokens_N, Late)
    return replace(edit, unread=replace(unread, tokens_N=unread.tokens_N.plain))


class LateDevice:
    """The thread, what it was given, and what the host saw of it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        """``launch n`` and ``read n`` of each step, and ``read blocks``, as the host did them."""
        self.num_launched = 0
        self.num_computed = 0
        self.is_held = False
        """Whether a forward waits for a ``release`` of its own."""
        self._released = threading.Semaphore(0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    def queue(self, work: Callable[[], None]) -> Future[None]:
        """Have something done behind all that was queued before."""

        def run() -> None:
            time.sleep(DELAY_S)
            with torch.inference_mode():
                work()

        return self._thread.submit(run)

    def launch(self, work: Callable[[], None]) -> Future[None]:
        """``queue`` a forward."""
        self.num_launched += 1
        self.events.append(f"launch {self.num_launched}")
        held = self.is_held

        def run() -> None:
            if held:
                assert self._released.acquire(timeout=60), "the host waits for what is held"
            work()
            self.num_computed += 1

        return self.queue(run)

    def release(self) -> None:
        """Let one more held forward run."""
        self._released.release()

    def close(self) -> None:
        self._thread.shutdown()


class LateExecutor:
    """A ``LocalExecutor`` on such a device; see ``Executor``."""

    is_asynchronous = True

    def __init__(self, inner: LocalExecutor) -> None:
        self.inner = inner
        self.device = LateDevice()
        self.sampling = LateSampling(self.device, inner.sampling)

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def forward(self, inputs: BatchInputs) -> Tensor:
        logits_RV = torch.full((len(inputs.sample_rows), self.vocab_size), torch.nan)
        unread = inputs.unread
        if unread is not None:
            assert isinstance(unread.tokens_R, Late)
            unread = replace(unread, tokens_R=unread.tokens_R.plain)
        # The device reads its inputs at the launch; the engine goes on changing its lists.
        items = [replace(item, block_table=tuple(item.block_table)) for item in inputs.items]
        taken = replace(inputs, items=items, unread=unread)

        def compute() -> None:
            logits_RV.copy_(self.inner.forward(taken))

        return Late.of(logits_RV, self.device.launch(compute))

    def logits(self, rows: Sequence[int]) -> Tensor:
        found: list[Tensor] = []
        self.device.queue(lambda: found.append(self.inner.logits(rows))).result()
        return found[0]

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        self.device.queue(lambda: self.inner.copy_blocks(pairs))

    def read_blocks(self, block_ids: Sequence[BlockId], out_Ln2KSD: Tensor) -> None:
        self.device.events.append("read blocks")
        self.device.queue(lambda: self.inner.read_blocks(block_ids, out_Ln2KSD)).result()

    def write_blocks(self, block_ids: Sequence[BlockId], blocks_Ln2KSD: Tensor) -> None:
        self.device.queue(lambda: self.inner.write_blocks(block_ids, blocks_Ln2KSD)).result()

    def check(self) -> None:
        self.inner.check()

    def stream_stats(self) -> StreamStats:
        return self.inner.stream_stats()

    def close(self) -> None:
        self.device.close()
        self.inner.close()
