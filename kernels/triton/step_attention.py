"""One step's attention: which code attends for which of its sequences."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..api import Attention
from ..context import ForwardContext
from ..kv_layer import KVLayer, layer_shape
from . import flash
from .attention import attend_decode, attend_prefill, plan_batches, takes


class TritonAttention:
    """One step's attention; ``other`` plans it for what these kernels do not take."""

    def __init__(
        self, context: ForwardContext, other: Callable[[ForwardContext], Attention]
    ) -> None:
        self._context = context
        self._plan_other = other
        self._other: Attention | None = None
        self._decode, self._prefill = plan_batches(context)

    def __call__(
        self, q_THD: Tensor, kv_N2KSD: KVLayer, bounds_N2KD: Tensor | None = None
    ) -> Tensor:
        """See ``api.Attention``."""
        num_tokens, num_heads, head_dim = q_THD.shape
        qk_heads = num_heads + layer_shape(kv_N2KSD).kv_heads
        if not takes(kv_N2KSD, self._context.pattern, q_THD.dtype, qk_heads):
            if self._other is None:
                self._other = self._plan_other(self._context)
            return self._other(q_THD, kv_N2KSD, bounds_N2KD)
        assert q_THD.stride()[1:] == (head_dim, 1), "heads lie side by side"
        out_TC = q_THD.new_empty(num_tokens, num_heads * head_dim)
        if self._decode is not None:
            attend_decode(q_THD, kv_N2KSD, self._decode, out_TC)
        if self._prefill is not None:
            by_flash = flash.takes(q_THD, kv_N2KSD, self._prefill)
            attend = flash.attend if by_flash else attend_prefill
            attend(q_THD, kv_N2KSD, self._prefill, out_TC)
        return out_TC
