"""A step's batch as the native kernels read it: ``Batch`` of ``types.h``."""

from __future__ import annotations

import ctypes
from array import array
from itertools import accumulate, chain

from ..context import ForwardContext
from ..pattern import FULL


class BatchStruct(ctypes.Structure):
    """The same fields in the same order as in ``types.h``."""

    _fields_ = (
        ("num_sequences", ctypes.c_int32),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_starts", ctypes.c_void_p),
    )


class NativeBatch:
    """Owns the arrays that ``struct`` points to; keep it until the last kernel has run."""

    def __init__(self, context: ForwardContext) -> None:
        if context.pattern != FULL:
            raise ValueError(f"the native kernels have full attention only, not {context.pattern}")
        tables = context.block_tables
        self._arrays = (
            array("i", context.query_starts),
            array("i", context.seq_lens),
            array("i", chain.from_iterable(tables)),
            array("q", accumulate(map(len, tables), initial=0)),
        )
        addresses = (kept.buffer_info()[0] for kept in self._arrays)
        self.struct = BatchStruct(context.num_sequences, *addresses)
