"""A step's batch as the native kernels read it: ``Batch`` of ``types.h``."""

from __future__ import annotations

import ctypes
from array import array
from itertools import accumulate, chain

from ..context import ForwardContext

NO_WINDOW = 2**31 - 1
"""As ``Pattern`` of ``types.h`` has it."""


class BatchStruct(ctypes.Structure):
    """The same fields in the same order as in ``types.h``."""

    _fields_ = (
        ("num_sequences", ctypes.c_int32),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_starts", ctypes.c_void_p),
        ("select_starts", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("window", "sinks", "pages")),
    )


class NativeBatch:
    """Owns the arrays that ``struct`` points to; keep it until the last kernel has run."""

    def __init__(self, context: ForwardContext) -> None:
        tables = context.block_tables
        self._arrays = (
            array("i", context.query_starts),
            array("i", context.seq_lens),
            array("i", chain.from_iterable(tables)),
            array("q", accumulate(map(len, tables), initial=0)),
            array("i", context.select_starts),
        )
        addresses = (kept.buffer_info()[0] if kept else None for kept in self._arrays)
        pattern = context.pattern
        self.struct = BatchStruct(
            context.num_sequences,
            *addresses,
            NO_WINDOW if pattern.window is None else min(pattern.window, NO_WINDOW),
            min(pattern.sinks, NO_WINDOW),
            min(pattern.pages or 0, NO_WINDOW),
        )
