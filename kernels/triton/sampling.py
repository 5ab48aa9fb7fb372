"""Sampling on the device: see ``sampling_code``; nothing waits for it before tokens are read.

Rows without a top-k, with one above ``MAX_TOP_K``, or with more equals than there is room for are
drawn by torch's operations afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..host_copy import HostArrival
from ..sampling.api import Draw, DrawnTokens, Edit, PendingTokens
from ..sampling.edits import apply_edit
from ..sampling.torch_sampling import TorchSampling
from ..sampling.weights import POWER
from .launch import OPTIONS
from .rows import with_plain_rows
from .sampling_code import (
    chunk_best_kernel,
    collect_kernel,
    draw_kernel,
    find_kernel,
)

SMALLEST_CHUNK, LARGEST_CHUNK = 64, 1024
"""Tokens that one program looks through. Threshold and chunk go together: k chunks' best tokens
reach the k-th of them, so there should be more chunks than k; Qwen3's vocabulary has 149."""
CHUNKS = 256
"""As many as there are at most, until chunks are the largest."""
MAX_TOP_K = 64
ROOM = 512
"""Tokens that a row is drawn among: a few times as many as reach its threshold as a rule."""
UNDECIDED = -100


class TritonSampling(TorchSampling):
    """See ``SamplingKernels``."""

    def sample(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> Tensor:
        """See ``SamplingKernels.sample``; the tokens lie on the host."""
        tokens = self.launch(logits_RV, num_tokens, draws, edits).read()
        return torch.tensor(tokens, dtype=torch.int64)

    def launch(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> PendingTokens:
        """See ``SamplingKernels.launch``."""
        if not draws:
            return DrawnTokens([])
        early_RC = _chunk_best(logits_RV, num_tokens)
        for edit in edits:
            apply_edit(logits_RV, edit)
        best_RC = _chunk_best(logits_RV, num_tokens) if edits else early_RC
        tokens_R = _launch(logits_RV, num_tokens, draws, early_RC, best_RC)
        return _LaunchedTokens(tokens_R, logits_RV, num_tokens, draws)


class _LaunchedTokens:
    """See ``PendingTokens``; keeps the logits, of which undecided rows are drawn in the end."""

    def __init__(
        self, tokens_R: Tensor, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw]
    ) -> None:
        whole = all(draw.greedy or 0 < draw.top_k <= MAX_TOP_K for draw in draws)
        self.on_device_R = tokens_R if whole else None
        self.redrawn: frozenset[int] = frozenset()
        self._arrival = HostArrival(tokens_R)
        self._logits_RV, self._num_tokens, self._draws = logits_RV, num_tokens, draws

    def read(self) -> list[int]:
        """See ``PendingTokens.read``."""
        tokens: list[int] = self._arrival.read().tolist()
        rest = [number for number, token in enumerate(tokens) if token == UNDECIDED]
        if rest:
            draws = [self._draws[number] for number in rest]
            drawn = TorchSampling().sample(self._logits_RV[rest], self._num_tokens, draws, [])
            for number, token in zip(rest, drawn.tolist(), strict=True):
                tokens[number] = token
            self.redrawn = frozenset(rest)
        return tokens


def chunk_size(num_tokens: int) -> int:
    """Tokens of a chunk in a vocabulary of this size."""
    even = int(triton.next_power_of_2(triton.cdiv(num_tokens, CHUNKS)))
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, even))


def _chunk_best(logits_RV: Tensor, num_tokens: int) -> Tensor:
    """The best logit of each row's chunks, NaN where one is; [R, chunks]."""
    num_rows, chunk = len(logits_RV), chunk_size(num_tokens)
    chunks = triton.cdiv(num_tokens, chunk)
    best_RC = torch.empty(num_rows, chunks, device=logits_RV.device)
    logits_RV = with_plain_rows(logits_RV)
    chunk_best_kernel[(num_rows, chunks)](
        logits_RV,
        best_RC,
        logits_RV.stride(0),
        NUM_TOKENS=num_tokens,
        CHUNKS=chunks,
        CHUNK=chunk,
        num_warps=4,
        **OPTIONS,
    )
    return best_RC


def _launch(
    logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], early_RC: Tensor, best_RC: Tensor
) -> Tensor:
    """Tokens, faults and ``UNDECIDED``, on the device."""
    device, num_rows, chunks = logits_RV.device, len(logits_RV), best_RC.shape[1]
    logits_RV = with_plain_rows(logits_RV)
    pinned = device.type == "cuda"
    table = torch.tensor(draws, dtype=torch.float64, pin_memory=pinned)
    # A top-k that no row of these has anyway need not fit the kernel's integers.
    table[:, 1].clamp_(max=2**30)
    settings_R5 = table.to(device, non_blocking=True)
    tokens_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    rows_best_R = torch.empty(num_rows, device=device)
    thresholds_R = torch.empty(num_rows, device=device)
    counts_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    found = torch.empty(num_rows * ROOM, dtype=torch.int32, device=device)
    stride, chunk = logits_RV.stride(0), chunk_size(num_tokens)
    find_kernel[(num_rows,)](
        logits_RV,
        best_RC,
        early_RC,
        settings_R5,
        tokens_R,
        rows_best_R,
        thresholds_R,
        counts_R,
        stride,
        NUM_TOKENS=num_tokens,
        CHUNKS=chunks,
        CHUNK=chunk,
        CHUNKS_TILE=max(16, triton.next_power_of_2(chunks)),
        MAX_TOP_K=MAX_TOP_K,
        num_warps=4,
        **OPTIONS,
    )
    collect_kernel[(num_rows, chunks)](
        logits_RV,
        best_RC,
        thresholds_R,
        counts_R,
        found,
        stride,
        NUM_TOKENS=num_tokens,
        CHUNKS=chunks,
        CHUNK=chunk,
        ROOM=ROOM,
        num_warps=4,
        **OPTIONS,
    )
    draw_kernel[(num_rows,)](
        logits_RV,
        rows_best_R,
        thresholds_R,
        counts_R,
        found,
        settings_R5,
        tokens_R,
        stride,
        ROOM=ROOM,
        **{f"P{degree}": POWER[degree] for degree in range(1, 8)},
        num_warps=4,
        enable_fp_fusion=False,
    )
    return tokens_R
