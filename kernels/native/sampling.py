"""Sampling by the native kernels, on torch tensors. Tensors lie on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..sampling.api import Draw, Edit, SamplingKernels
from ..sampling.edits import resolved
from ..sampling.weights import LOG2_E
from .library import Library, check

_LONG, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_LOGITS = (_POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG)


class _Edit(ctypes.Structure):
    """As in sampling.h."""

    _fields_ = (("kind", _LONG), ("starts", _POINTER), ("ids", _POINTER), ("values", _POINTER))


class NativeSampling(SamplingKernels):
    """See ``SamplingKernels``; every operation is one region of a team."""

    def __init__(self, library: Library, team: int) -> None:
        self._team = team
        self._cdll = library.cdll
        self._cdll.pio_sample.argtypes = [*_LOGITS, _POINTER, _POINTER, _LONG, _POINTER]
        self._cdll.pio_log_sums.argtypes = [*_LOGITS, _DOUBLE, _POINTER, _POINTER]
        self._cdll.pio_top_tokens.argtypes = [*_LOGITS, _LONG, _POINTER, _POINTER]
        for function in ("sample", "log_sums", "top_tokens"):
            getattr(self._cdll, f"pio_{function}").restype = ctypes.c_char_p

    def sample(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> Tensor:
        """See ``SamplingKernels.sample``. Raises ``KernelError`` for an edited id that no row has.

        Rows whose elements have gaps are refused: the edits must reach the caller's logits.
        """
        if len(logits_RV) and logits_RV.stride(1) != 1:
            raise ValueError(f"rows with strides {logits_RV.stride()}; their elements have no gaps")
        table = np.array(draws, dtype=np.float64).reshape(len(draws), len(Draw._fields))
        if len(table) != len(logits_RV):
            raise ValueError(f"{len(logits_RV)} rows of logits, but {len(table)} draws")
        edits = [resolved(edit) for edit in edits]
        tokens_R = torch.empty(len(logits_RV), dtype=torch.int64)
        check(
            self._cdll.pio_sample(
                *self._logits(logits_RV, num_tokens),
                table.ctypes.data,
                (_Edit * len(edits))(*(_pointers(edit, len(draws)) for edit in edits)),
                len(edits),
                tokens_R.data_ptr(),
            )
        )
        return tokens_R

    def weight_sums(self, logits_RV: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """See ``SamplingKernels.weight_sums``."""
        logits_RV = _with_plain_rows(logits_RV)
        best_R = torch.empty(len(logits_RV))
        total_R = torch.empty(len(logits_RV), dtype=torch.int64)
        check(
            self._cdll.pio_log_sums(
                *self._logits(logits_RV, num_tokens), LOG2_E, best_R.data_ptr(), total_R.data_ptr()
            )
        )
        return best_R, total_R

    def top_tokens(self, logits_RV: Tensor, num_tokens: int, count: int) -> tuple[Tensor, Tensor]:
        """See ``SamplingKernels.top_tokens``."""
        logits_RV = _with_plain_rows(logits_RV)
        shape = (len(logits_RV), min(count, num_tokens))
        values_RK, ids_RK = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
        if ids_RK.numel():
            check(
                self._cdll.pio_top_tokens(
                    *self._logits(logits_RV, num_tokens),
                    shape[1],
                    values_RK.data_ptr(),
                    ids_RK.data_ptr(),
                )
            )
        return values_RK, ids_RK

    def _logits(self, logits_RV: Tensor, num_tokens: int) -> tuple[int, ...]:
        if logits_RV.dtype != torch.float32 or not 0 < num_tokens <= logits_RV.shape[1]:
            raise ValueError(
                f"{num_tokens} tokens in logits of {logits_RV.dtype} {list(logits_RV.shape)}; "
                "float32 with at least so many columns is needed"
            )
        return (
            *(self._team, logits_RV.data_ptr()),
            *(*logits_RV.shape, logits_RV.stride(0), num_tokens),
        )


def _pointers(edit: Edit, num_rows: int) -> _Edit:
    assert len(edit.starts) == num_rows + 1
    assert all(array.flags.c_contiguous for array in (edit.starts, edit.ids, edit.values))
    return _Edit(
        int(edit.kind), edit.starts.ctypes.data, edit.ids.ctypes.data, edit.values.ctypes.data
    )


def _with_plain_rows(x_RV: Tensor) -> Tensor:
    """Rows may lie apart, but the elements of one lie side by side."""
    return x_RV if x_RV.stride(1) == 1 else x_RV.contiguous()
