"""Sampling on the device: see ``sampling_code`` and ``draw_code``; nothing here waits for it.

What is launched depends on the rows' settings alone: where all filters leave few tokens, or none
filters, four or five kernels; else two more for each filter and draw that may have to look for one
bin of a row's tokens. Every row gets its token there, whatever its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..host_copy import HostArrival
from ..sampling.api import Draw, DrawnTokens, Edit, PendingTokens, RawLogits, SamplingKernels
from ..sampling.edits import apply_edit
from ..sampling.logprobs import LaunchedLogprobs, Logprobs
from ..sampling.weights import LOG2_E, POWER
from .draw_code import draw_by_id_kernel, draw_kernel
from .launch import OPTIONS
from .rows import with_plain_rows
from .sampling_code import chunk_best_kernel, field_kernel, find_kernel, gather_kernel
from .top_code import list_kernel, threshold_kernel, top_kernel

SMALLEST_CHUNK, LARGEST_CHUNK = 64, 1024
"""Tokens that one program looks through. Threshold and chunk go together: k chunks' best tokens
reach the k-th of them, so there should be more chunks than k; Qwen3's vocabulary has 149."""
CHUNKS = 256
"""As many as there are at most, until chunks are the largest."""
FEW = 64
"""A top-k up to this leaves few tokens, but for rows of many equals."""
ROOM = 2048
"""Tokens of a row's list."""
BINS = 1024
"""Of a row whose field may not fit its list."""
_POWERS = {f"P{degree}": POWER[degree] for degree in range(1, 8)}
_EXACT = {"enable_fp_fusion": False}
"""Of what computes weights."""
_UNFILTERED = Draw(scale=LOG2_E)


class TritonSampling(SamplingKernels):
    """See ``SamplingKernels``."""

    def sample(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> Tensor:
        """See ``SamplingKernels.sample``; the tokens lie on the host."""
        no_logprobs = [None] * len(draws)
        tokens = self.launch(logits_RV, num_tokens, draws, edits, no_logprobs).read()
        return torch.tensor(tokens, dtype=torch.int64)

    def launch(
        self,
        logits_RV: Tensor,
        num_tokens: int,
        draws: Sequence[Draw],
        edits: Sequence[Edit],
        tops: Sequence[int | None],
    ) -> PendingTokens:
        """See ``SamplingKernels.launch``."""
        if not draws:
            return DrawnTokens([], [])
        raw = RawLogits.of(logits_RV, tops)
        early = rows = Rows.of(logits_RV, num_tokens)
        if edits:
            for edit in edits:
                apply_edit(logits_RV, edit)
            rows = Rows.of(logits_RV, num_tokens)
        tokens_R = launch_draws(rows, draws, early.best_RC)
        return _LaunchedTokens(tokens_R, raw, raw.launch(self, num_tokens, tokens_R))

    def weight_sums(self, logits_RV: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """See ``SamplingKernels.weight_sums``."""
        if not len(logits_RV):
            return logits_RV.new_empty(0), logits_RV.new_empty(0, dtype=torch.int64)
        rows = Rows.of(logits_RV, num_tokens)
        draw = _Draw.of(rows, [_UNFILTERED] * len(logits_RV), has_bins=False)
        draw.find(rows.best_RC)
        draw.field()
        return rows.best_RC.amax(1), draw.masses_RC.sum(1)

    def top_tokens(self, logits_RV: Tensor, num_tokens: int, count: int) -> tuple[Tensor, Tensor]:
        """See ``SamplingKernels.top_tokens``."""
        num_rows, count = len(logits_RV), min(count, num_tokens)
        ids_RK = torch.empty(num_rows, count, dtype=torch.int64, device=logits_RV.device)
        if ids_RK.numel():
            rows = Rows.of(logits_RV, num_tokens)
            launch_top(rows, ids_RK)
        return logits_RV.gather(1, ids_RK), ids_RK


class _LaunchedTokens:
    """See ``PendingTokens``."""

    def __init__(self, tokens_R: Tensor, raw: RawLogits, logprobs: LaunchedLogprobs | None) -> None:
        self.on_device_R: Tensor | None = tokens_R
        self._arrival = HostArrival(tokens_R)
        self._raw = raw
        self._logprobs = logprobs

    def read(self) -> list[int]:
        """See ``PendingTokens.read``."""
        tokens: list[int] = self._arrival.read().tolist()
        return tokens

    def read_logprobs(self) -> list[Logprobs | None]:
        """See ``PendingTokens.read_logprobs``."""
        return self._raw.by_row(self._logprobs)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of logits, and what their chunks reach."""

    logits_RV: Tensor
    """The elements of a row lie side by side."""
    best_RC: Tensor
    """The best logit of each chunk, NaN where one is."""
    lowest_RC: Tensor
    """The lowest above minus infinity, infinity where none is."""
    sizes: dict[str, int]
    """Constants of the compiled kernels."""

    @classmethod
    def of(cls, logits_RV: Tensor, num_tokens: int) -> Rows:
        """Launches one pass over the logits as they are now."""
        logits_RV = with_plain_rows(logits_RV)
        num_rows, chunk = len(logits_RV), chunk_size(num_tokens)
        chunks = triton.cdiv(num_tokens, chunk)
        sizes = {"NUM_TOKENS": num_tokens, "CHUNKS": chunks, "CHUNK": chunk}
        best_RC, lowest_RC = torch.empty(2, num_rows, chunks, device=logits_RV.device)
        chunk_best_kernel[(num_rows, chunks)](
            logits_RV, best_RC, lowest_RC, logits_RV.stride(0), **sizes, num_warps=4, **OPTIONS
        )
        return cls(logits_RV, best_RC, lowest_RC, sizes)

    @property
    def stride(self) -> int:
        """Elements from one row to the next."""
        return self.logits_RV.stride(0)

    @property
    def chunks_tile(self) -> int:
        """Room for a row's chunks in registers."""
        return max(16, int(triton.next_power_of_2(self.best_RC.shape[1])))

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of so many numbers for each row."""
        return torch.empty(len(self.logits_RV), *shape, dtype=dtype, device=self.logits_RV.device)


def chunk_size(num_tokens: int) -> int:
    """Tokens of a chunk in a vocabulary of this size."""
    even = int(triton.next_power_of_2(triton.cdiv(num_tokens, CHUNKS)))
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, even))


def launch_draws(rows: Rows, draws: Sequence[Draw], early_RC: Tensor) -> Tensor:
    """Tokens and faults, on the device."""
    num_rounds = _num_rounds(draws)
    draw = _Draw.of(rows, draws, has_bins=num_rounds > 0)
    draw.find(early_RC)
    if all(one.greedy for one in draws):
        return draw.tokens_R
    draw.field()
    if any(one.unfiltered and not one.greedy for one in draws):
        draw.take_by_id()
    if all(one.unfiltered or one.greedy for one in draws):
        return draw.tokens_R
    draw.take(is_first=True, is_last=num_rounds == 0)
    for number in range(num_rounds):
        draw.gather()
        draw.take(is_first=False, is_last=number == num_rounds - 1)
    return draw.tokens_R


def _num_rounds(draws: Sequence[Draw]) -> int:
    """How often tokens of a bin are to be looked for: once for each stage that a row may need."""
    wide = [draw for draw in draws if not (draw.greedy or draw.unfiltered or 0 < draw.top_k <= FEW)]
    if not wide:
        return 0
    return 1 + any(draw.top_p < 1 for draw in wide) + any(draw.top_k for draw in wide)


@dataclass(frozen=True, slots=True)
class _Draw:
    """The memory of one pass over some rows, and its launches."""

    rows: Rows
    settings_R5: Tensor
    tokens_R: Tensor
    bounds_R3: Tensor
    state_R8: Tensor
    found_RN: Tensor
    masses_RC: Tensor
    floor_masses_RC: Tensor
    mass_bins_RB: Tensor
    count_bins_RB: Tensor
    has_bins: bool

    @classmethod
    def of(cls, rows: Rows, draws: Sequence[Draw], *, has_bins: bool) -> _Draw:
        device = rows.logits_RV.device
        table = torch.tensor(draws, dtype=torch.float64, pin_memory=device.type == "cuda")
        # A top-k that no row of these has anyway need not fit the kernels' integers.
        table[:, 1].clamp_(max=2**30)
        num_bins, num_chunks = BINS if has_bins else 1, rows.best_RC.shape[1]
        return cls(
            rows,
            table.to(device, non_blocking=True),
            rows.new(dtype=torch.int64),
            rows.new(3, dtype=torch.float32),
            rows.new(8, dtype=torch.int64),
            rows.new(ROOM, dtype=torch.int32),
            rows.new(num_chunks, dtype=torch.int64),
            rows.new(num_chunks, dtype=torch.int64),
            rows.new(num_bins, dtype=torch.int64),
            rows.new(num_bins, dtype=torch.int32),
            has_bins,
        )

    def find(self, early_RC: Tensor) -> None:
        rows = self.rows
        find_kernel[(len(early_RC),)](
            rows.logits_RV,
            rows.best_RC,
            rows.lowest_RC,
            early_RC,
            self.settings_R5,
            self.tokens_R,
            self.bounds_R3,
            self.state_R8,
            self.mass_bins_RB,
            self.count_bins_RB,
            rows.stride,
            CHUNKS_TILE=rows.chunks_tile,
            BINS=BINS,
            HAS_BINS=self.has_bins,
            **rows.sizes,
            num_warps=4,
            **OPTIONS,
        )

    def field(self) -> None:
        rows = self.rows
        field_kernel[tuple(rows.best_RC.shape)](
            rows.logits_RV,
            rows.best_RC,
            self.bounds_R3,
            self.settings_R5,
            self.state_R8,
            self.found_RN,
            self.masses_RC,
            self.floor_masses_RC,
            self.mass_bins_RB,
            self.count_bins_RB,
            rows.stride,
            ROOM=ROOM,
            BINS=BINS,
            HAS_BINS=self.has_bins,
            **rows.sizes,
            **_POWERS,
            num_warps=4,
            **_EXACT,
        )

    def gather(self) -> None:
        rows = self.rows
        gather_kernel[tuple(rows.best_RC.shape)](
            rows.logits_RV,
            rows.best_RC,
            self.bounds_R3,
            self.state_R8,
            self.found_RN,
            self.mass_bins_RB,
            self.count_bins_RB,
            rows.stride,
            ROOM=ROOM,
            BINS=BINS,
            **rows.sizes,
            num_warps=4,
            **_EXACT,
        )

    def take(self, *, is_first: bool, is_last: bool) -> None:
        rows = self.rows
        draw_kernel[(len(self.tokens_R),)](
            rows.logits_RV,
            rows.best_RC,
            self.bounds_R3,
            self.settings_R5,
            self.state_R8,
            self.found_RN,
            self.masses_RC,
            self.floor_masses_RC,
            self.tokens_R,
            rows.stride,
            CHUNKS_TILE=rows.chunks_tile,
            ROOM=ROOM,
            IS_FIRST=is_first,
            IS_LAST=is_last,
            **rows.sizes,
            **_POWERS,
            num_warps=16,
            **_EXACT,
        )

    def take_by_id(self) -> None:
        rows = self.rows
        draw_by_id_kernel[(len(self.tokens_R),)](
            rows.logits_RV,
            self.bounds_R3,
            self.settings_R5,
            self.masses_RC,
            self.tokens_R,
            rows.stride,
            CHUNKS_TILE=rows.chunks_tile,
            **rows.sizes,
            **_POWERS,
            num_warps=4,
            **_EXACT,
        )


def launch_top(rows: Rows, ids_RK: Tensor) -> None:
    """The best tokens of each row into ``ids_RK``."""
    num_rows, count = ids_RK.shape
    thresholds_R = rows.new(dtype=torch.float32)
    counts_R = rows.new(dtype=torch.int32)
    found_RN = rows.new(ROOM, dtype=torch.int32)
    threshold_kernel[(num_rows,)](
        rows.best_RC,
        thresholds_R,
        counts_R,
        count,
        CHUNKS=rows.sizes["CHUNKS"],
        CHUNKS_TILE=rows.chunks_tile,
        num_warps=4,
        **OPTIONS,
    )
    list_kernel[tuple(rows.best_RC.shape)](
        rows.logits_RV,
        rows.best_RC,
        thresholds_R,
        counts_R,
        found_RN,
        rows.stride,
        ROOM=ROOM,
        **rows.sizes,
        num_warps=4,
        **OPTIONS,
    )
    top_kernel[(num_rows,)](
        rows.logits_RV,
        rows.best_RC,
        thresholds_R,
        counts_R,
        found_RN,
        ids_RK,
        rows.stride,
        count,
        ROOM=ROOM,
        **rows.sizes,
        num_warps=8,
        **OPTIONS,
    )
