"""A stack of layers: the residual stream in float32, its sums fused with the norms behind them.

A step of decode rows alone runs from static buffers, as a CUDA graph (see ``decode_graphs``); any
other step launches its kernels one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..api import Attention, DecoderLayer, Kernels
from ..context import ForwardContext
from ..kv_layer import KVLayer
from .attention import takes
from .decode_graphs import DecodeGraphs, GraphRunner, Step, batch_bucket
from .rows import add_rms_norm, rms_norm


class TritonStack:
    """Layers of any packed weights; see ``LayerStack``."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[DecoderLayer],
        eps: float,
        runner: GraphRunner,
    ) -> None:
        self._kernels = kernels
        self._layers = tuple(layers)
        self._eps = eps
        self._graphs = DecodeGraphs(self._run, runner)

    def __call__(
        self,
        hidden_TC: Tensor,
        context: ForwardContext,
        cos_TE: Tensor,
        sin_TE: Tensor,
        kv_layers: Sequence[KVLayer],
        bounds_layers: Sequence[Tensor] = (),
        first_layer: int = 0,
    ) -> Tensor:
        """See ``LayerStack``."""
        layers = self._layers[first_layer : first_layer + len(kv_layers)]
        if not layers or len(layers) != len(kv_layers):
            raise ValueError(
                f"{len(kv_layers)} layers of KV came for {len(self._layers)} layers from layer "
                f"{first_layer}"
            )
        step = Step(
            layers,
            hidden_TC,
            cos_TE,
            sin_TE,
            context.slots_T,
            kv_layers,
            bounds_layers,
            context.filled_blocks if bounds_layers else (),
        )
        if len(layers) == len(self._layers) and self._is_graphed(context, kv_layers[0]):
            return self._graphs(step, context)
        return self._run(step, self._kernels.plan_attention(context))

    def _is_graphed(self, context: ForwardContext, kv_N2KSD: KVLayer) -> bool:
        """Whether a step is of decode rows alone that a graph has room for."""
        size = context.num_sequences
        if context.query_starts[-1] != size or batch_bucket(size) is None:
            return False
        first = self._layers[0]
        return takes(kv_N2KSD, context.pattern, first.input_norm.dtype, len(first.qk_norm_AD))

    def _run(self, step: Step, attention: Attention) -> Tensor:
        """The stream behind the last layer; reads ``step`` and changes the cache alone."""
        stream_TC = step.hidden_TC.to(torch.float32, copy=True)
        delta_TC: Tensor | None = None
        all_bounds: Sequence[Tensor | None] = step.bounds_layers or [None] * len(step.layers)
        for layer, kv_N2KSD, bounds_N2KD in zip(
            step.layers, step.kv_layers, all_bounds, strict=True
        ):
            normed_TC = self._norm(stream_TC, delta_TC, layer.input_norm)
            q_THD = self._kernels.qk_norm_rope_write(
                layer.qkv(normed_TC),
                layer.qk_norm_AD,
                step.cos_TE,
                step.sin_TE,
                kv_N2KSD,
                step.slots_T,
                self._eps,
            )
            if bounds_N2KD is not None:
                self._kernels.bound_pages(kv_N2KSD, bounds_N2KD, step.filled_blocks)
            delta_TC = layer.attention_out(attention(q_THD, kv_N2KSD, bounds_N2KD))
            normed_TC = self._norm(stream_TC, delta_TC, layer.mlp_norm)
            delta_TC = layer.down(layer.gate_up(normed_TC))
        assert delta_TC is not None, "a stack has layers"
        return stream_TC.add_(delta_TC)

    def _norm(self, stream_TC: Tensor, delta_TC: Tensor | None, weight_C: Tensor) -> Tensor:
        if delta_TC is None:
            return rms_norm(stream_TC, weight_C, self._eps)
        return add_rms_norm(stream_TC, delta_TC, weight_C, self._eps)
