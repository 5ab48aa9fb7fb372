"""The operations of a forward pass: one signature each, whatever computes them.

Shape suffixes: T new tokens of the whole batch, N cache blocks, S tokens in a block, H query
heads, K key/value heads, A = H + K, D head_dim, E = D / 2, C channels (any width).

One layer of the cache is ``kv_N2KSD``: keys at index 0 and values at index 1 of the second axis. A
head's keys in one block lie together, so gathering blocks gives each head one plain matrix. In
place of that tensor stands a ``CodedKV`` where the cache is quantized; see ``kv_layer``.

Where tokens select pages (``pattern``), ``bounds_N2KD`` goes with each layer: the smallest and the
largest key of every full block. Those of other blocks may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .context import ForwardContext
from .kv_layer import KVLayer
from .quantized import QuantizedWeight
from .sampling.api import SamplingKernels


class PackedLinear(Protocol):
    """A linear layer in the layout its kernel reads; the original weight is no longer needed."""

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``, plus ``residual`` where given."""
        ...

    def in_float32(self, x_TC: Tensor) -> Tensor:
        """``x @ weight.T + bias`` as float32, where the kernel can without rounding before.

        The next call may write over the result.
        """
        ...


class PackedSwiGLU(Protocol):
    """The gate and up projections with the activation that joins them."""

    def __call__(self, x_TC: Tensor) -> Tensor:
        """``silu(x @ gate.T) * (x @ up.T)``."""
        ...


class Attention(Protocol):
    """Attention of one step's batch, planned once and called for every layer."""

    def __call__(
        self, q_THD: Tensor, kv_N2KSD: KVLayer, bounds_N2KD: Tensor | None = None
    ) -> Tensor:
        """Causal attention of every new token over its own sequence, [T, H * D].

        Queries come scaled: scores are plain products. The context's pattern says which keys a
        token sees; only a pattern with pages needs ``bounds``.
        """
        ...


@runtime_checkable
class Placeable(Protocol):
    """A packed weight whose bytes may be kept elsewhere and brought into memory for each use."""

    @property
    def num_bytes(self) -> int:
        """Of the packed weight."""
        ...

    def panels(self) -> Tensor:
        """The packed weight, uint8 [num_bytes], where it lies now: no copy."""
        ...

    def place(self, memory: Tensor) -> None:
        """Read the packed weight from ``memory`` from now on: uint8 [num_bytes], aligned to 64.

        Nothing is copied there; what the weight lay in before is freed. ``memory`` belongs to the
        caller, who keeps it and fills it before each use with what ``panels`` had. Raises
        ``ValueError`` for memory of another size or alignment.
        """
        ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One block's packed weights."""

    input_norm: Tensor
    qkv: PackedLinear
    qk_norm_AD: Tensor
    """float32, as ``Kernels.qk_norm_rope_write`` takes it."""
    attention_out: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedSwiGLU
    down: PackedLinear


class LayerStack(Protocol):
    """Layers that follow each other, computed as one operation."""

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
        """The residual stream behind the last layer that runs, float32 [T, C].

        ``kv_layers`` has the ``kv_N2KSD`` of each layer that runs, into which the new tokens are
        written; ``first_layer`` is the first of them. ``hidden_TC`` may be what a call for the
        layers before gave: several calls give what one gives. ``bounds_layers`` has each one's
        ``bounds_N2KD`` where the context's pattern has pages; those of the blocks that the step
        fills are written too.
        """
        ...


class Kernels(Protocol):
    """One implementation of every operation."""

    @property
    def name(self) -> str:
        """What the implementation is called in logs and in ``INFERENCE_PIO_KERNELS``."""
        ...

    @property
    def sampling(self) -> SamplingKernels:
        """What turns the logits into tokens."""
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
        """Takes a weight of [out, in] and copies or keeps it as the kernel needs."""
        ...

    def pack_swiglu(self, gate: Tensor, up: Tensor) -> PackedSwiGLU:
        """Takes the two weights of [intermediate, hidden]."""
        ...

    def pack_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """A linear that computes with a quantized weight as it is, for activations of ``dtype``.

        ``None`` where there is no kernel for it; the caller then dequantizes it and calls
        ``pack_linear``.
        """
        ...

    def pack_quantized_swiglu(
        self, gate: QuantizedWeight, up: QuantizedWeight, dtype: torch.dtype
    ) -> PackedSwiGLU | None:
        """The same for gate and up projections."""
        ...

    def rms_norm(self, x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last axis: computed in float32, rounded to the weight's dtype.

        ``x`` is of that dtype or float32.
        """
        ...

    def qk_norm_rope_write(
        self,
        qkv_TC: Tensor,
        weight_AD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        kv_N2KSD: KVLayer,
        slots_T: Tensor,
        eps: float,
    ) -> Tensor:
        """QK-norm and RoPE on queries and keys, then keys and values into the cache.

        ``qkv_TC`` holds queries, keys and values of each token side by side and may be
        overwritten. ``weight_AD``, float32, has the norm weight of each query head, times the
        softmax scale, then of each key head. Returns the queries, [T, H, D].
        """
        ...

    def bound_pages(self, kv_N2KSD: KVLayer, bounds_N2KD: Tensor, blocks: Sequence[int]) -> None:
        """Writes the bounds of ``blocks``, which are full."""
        ...

    def plan_attention(self, context: ForwardContext) -> Attention:
        """What depends on the batch alone, done once a step."""
        ...

    def stack(self, layers: Sequence[DecoderLayer], eps: float) -> LayerStack | None:
        """Layers that one rank computes whole, for all tokens; ``eps`` is that of their norms.

        ``None`` where nothing is won over the operations one by one.
        """
        ...
