"""Paged attention of one step's batch by the native kernels, on torch tensors."""

from __future__ import annotations

import ctypes
import weakref

from torch import Tensor

from ..context import ForwardContext
from ..kv_layer import KVLayer, layer_shape
from .batch import NativeBatch
from .dtypes import native_dtype
from .kv_layers import native_kv_address, native_kv_format
from .library import Library, check
from .pages import expect_bounds

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class AttentionPool:
    """The native attentions of one team, one for each shape and dtype; they keep their memory.

    Not for several threads at once.
    """

    def __init__(self, library: Library, team: int) -> None:
        self._team = team
        self._cdll = library.cdll
        self._handles: dict[tuple[int, ...], int] = {}
        self._planned: dict[int, NativeAttention] = {}
        self._cdll.pio_attention_new.argtypes = [
            *(_POINTER, _INT),
            *(_INT, _INT, _INT, _INT),
            _POINTER,
        ]
        self._cdll.pio_attention_delete.argtypes = [_POINTER]
        self._cdll.pio_attention_delete.restype = None
        self._cdll.pio_attention_plan.argtypes = [_POINTER, _POINTER, _LONG]
        self._cdll.pio_attention_run.argtypes = [
            *(_POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER, _POINTER, _POINTER)
        ]
        for name in ("new", "plan", "run"):
            getattr(self._cdll, f"pio_attention_{name}").restype = ctypes.c_char_p

    def plan(self, context: ForwardContext) -> NativeAttention:
        """See ``Kernels.plan_attention``."""
        return NativeAttention(self, context)

    def run(
        self,
        attention: NativeAttention,
        q_THD: Tensor,
        kv_N2KSD: KVLayer,
        bounds_N2KD: Tensor | None,
    ) -> Tensor:
        """See ``api.Attention``; the plan is made again where another one came between."""
        num_tokens, num_heads, head_dim = q_THD.shape
        num_blocks, kv_heads, block_size, _ = layer_shape(kv_N2KSD)
        kv_format = native_kv_format(kv_N2KSD, q_THD.dtype)
        handle = self._handle(native_dtype(q_THD), num_heads, kv_heads, head_dim, block_size)
        if self._planned.get(handle) is not attention:
            self._planned.pop(handle, None)  # a plan that fails leaves none behind
            batch = attention.batch.struct
            check(self._cdll.pio_attention_plan(handle, ctypes.byref(batch), num_blocks))
            self._planned[handle] = attention
        out_TC = q_THD.new_empty(num_tokens, num_heads * head_dim)
        check(
            self._cdll.pio_attention_run(
                handle,
                *(q_THD.data_ptr(), num_tokens, q_THD.stride(0)),
                *(kv_format, native_kv_address(kv_N2KSD)),
                None if bounds_N2KD is None else bounds_N2KD.data_ptr(),
                out_TC.data_ptr(),
            )
        )
        return out_TC

    def _handle(self, *shape: int) -> int:
        if shape not in self._handles:
            address = ctypes.c_void_p()
            check(self._cdll.pio_attention_new(self._team, *shape, ctypes.byref(address)))
            assert address.value is not None
            weakref.finalize(self, self._cdll.pio_attention_delete, address.value)
            self._handles[shape] = address.value
        return self._handles[shape]


class NativeAttention:
    """One step's attention; see ``api.Attention``."""

    def __init__(self, pool: AttentionPool, context: ForwardContext) -> None:
        self._pool = pool
        self._context = context
        self.batch = NativeBatch(context)

    def __call__(
        self, q_THD: Tensor, kv_N2KSD: KVLayer, bounds_N2KD: Tensor | None = None
    ) -> Tensor:
        """See ``api.Attention``.

        Raises ``ValueError`` for operands that are not of this step or not of one another, for
        bounds that are missing, and
        ``KernelError`` for a block that the cache does not have.
        """
        context, shape = self._context, layer_shape(kv_N2KSD)
        if q_THD.shape[0] != context.query_starts[-1] or shape.block_size != context.block_size:
            raise ValueError(
                f"{q_THD.shape[0]} queries over blocks of {shape.block_size} tokens; the step has "
                f"{context.query_starts[-1]} over blocks of {context.block_size}"
            )
        if q_THD.shape[2] != shape.head_dim:
            raise ValueError(
                f"queries have heads of {q_THD.shape[2]}, the cache has heads of {shape.head_dim}"
            )
        if context.pattern.pages is not None:
            expect_bounds(bounds_N2KD, kv_N2KSD, q_THD.dtype)
        if q_THD.stride()[1:] != (q_THD.shape[2], 1):
            q_THD = q_THD.contiguous()
        return self._pool.run(self, q_THD, kv_N2KSD, bounds_N2KD)
