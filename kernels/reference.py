"""The definition of every operation in plain torch: float32 inside, one sequence at a time.

Other implementations are tested against this one; it runs on any device and is not fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .api import DecoderLayer, PackedLinear, PackedSwiGLU
from .context import ForwardContext
from .quantized import QuantizedWeight
from .sampling.reference import ReferenceSampling

# Rows of a prompt whose scores are held at once: bounds the memory at long contexts.
QUERY_CHUNK = 256


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """The weight as it came."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        out = torch.nn.functional.linear(x_TC, self.weight, self.bias)
        return out if residual_TC is None else out + residual_TC

    def in_float32(self, x_TC: Tensor) -> Tensor:
        """See ``PackedLinear.in_float32``; rounded before, as transformers does."""
        return self(x_TC).float()


@dataclass(frozen=True, slots=True)
class ReferenceSwiGLU:
    """Two linears and the product."""

    gate: Tensor
    up: Tensor

    def __call__(self, x_TC: Tensor) -> Tensor:
        gate = torch.nn.functional.linear(x_TC, self.gate)
        up = torch.nn.functional.linear(x_TC, self.up)
        return torch.nn.functional.silu(gate) * up


@dataclass(frozen=True, slots=True)
class ReferenceAttention:
    """Scores, mask, softmax and values of one sequence after the other."""

    context: ForwardContext

    def __call__(self, q_THD: Tensor, kv_N2KSD: Tensor) -> Tensor:
        num_tokens, num_heads, head_dim = q_THD.shape
        out_THD = torch.empty_like(q_THD)
        for sequence in range(self.context.num_sequences):
            keys_LKD, values_LKD = self._gather(kv_N2KSD, sequence)
            groups = num_heads // keys_LKD.shape[1]
            keys_LHD = keys_LKD.repeat_interleave(groups, dim=1)
            values_LHD = values_LKD.repeat_interleave(groups, dim=1)
            for start, end in self._chunks(sequence):
                scores = torch.einsum("qhd,lhd->hql", q_THD[start:end].float(), keys_LHD)
                # Row t of the sequence's new tokens stands at the key of the same token.
                offset = keys_LHD.shape[0] - self.context.query_starts[sequence + 1]
                rows = torch.arange(start, end, device=q_THD.device)[:, None] + offset
                visible_QL = torch.arange(keys_LHD.shape[0], device=q_THD.device) <= rows
                weights = scores.masked_fill(~visible_QL, float("-inf")).softmax(dim=-1)
                out = torch.einsum("hql,lhd->qhd", weights, values_LHD)
                out_THD[start:end] = out.to(q_THD.dtype)
        return out_THD.view(num_tokens, num_heads * head_dim)

    def _gather(self, kv_N2KSD: Tensor, sequence: int) -> tuple[Tensor, Tensor]:
        table = torch.tensor(self.context.block_tables[sequence], device=kv_N2KSD.device)
        kv_2LKD = kv_N2KSD[table].permute(1, 0, 3, 2, 4).flatten(1, 2).float()
        keys_LKD, values_LKD = kv_2LKD[:, : self.context.seq_lens[sequence]]
        return keys_LKD, values_LKD

    def _chunks(self, sequence: int) -> Iterator[tuple[int, int]]:
        start, end = self.context.query_starts[sequence : sequence + 2]
        for first in range(start, end, QUERY_CHUNK):
            yield first, min(first + QUERY_CHUNK, end)


class ReferenceKernels:
    """Every operation as the formula has it."""

    name = "reference"

    def __init__(self) -> None:
        self.sampling = ReferenceSampling()

    def pack_linear(self, weight: Tensor, bias: Tensor | None = None) -> ReferenceLinear:
        """Copies the weight, so that the caller may unmap its file."""
        return ReferenceLinear(weight.clone(), bias.clone() if bias is not None else None)

    def pack_swiglu(self, gate: Tensor, up: Tensor) -> ReferenceSwiGLU:
        """Copies both weights."""
        return ReferenceSwiGLU(gate.clone(), up.clone())

    def pack_quantized(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """No kernel of its own: the weight is dequantized."""
        return None

    def pack_quantized_swiglu(
        self, gate: QuantizedWeight, up: QuantizedWeight, dtype: torch.dtype
    ) -> PackedSwiGLU | None:
        """As ``pack_quantized``."""
        return None

    def rms_norm(self, x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        """See ``Kernels.rms_norm``; the rounding before the weight is transformers'."""
        return _normalised(x_TC, eps).to(weight_C.dtype) * weight_C

    def qk_norm_rope_write(
        self,
        qkv_TC: Tensor,
        weight_AD: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
        kv_N2KSD: Tensor,
        slots_T: Tensor,
        eps: float,
    ) -> Tensor:
        """See ``Kernels.qk_norm_rope_write``."""
        _, _, num_kv_heads, block_size, head_dim = kv_N2KSD.shape
        num_heads = weight_AD.shape[0] - num_kv_heads
        heads_THD = qkv_TC.view(qkv_TC.shape[0], -1, head_dim)
        qk_TAD = heads_THD[:, : weight_AD.shape[0]]
        normed_TAD = _normalised(qk_TAD, eps).to(qkv_TC.dtype) * weight_AD
        qk_TAD = rotate(normed_TAD, cos_TE, sin_TE).to(qkv_TC.dtype)
        kv_T2KD = torch.stack((qk_TAD[:, num_heads:], heads_THD[:, -num_kv_heads:]), dim=1)
        kv_N2KSD[slots_T // block_size, :, :, slots_T % block_size] = kv_T2KD
        return qk_TAD[:, :num_heads]

    def plan_attention(self, context: ForwardContext) -> ReferenceAttention:
        """See ``Kernels.plan_attention``."""
        return ReferenceAttention(context)

    def stack(self, layers: Sequence[DecoderLayer], eps: float) -> None:
        """One operation after the other."""


def rotate(x_TAD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """RoPE in float32: channel i turns with channel i + E (Qwen's and Llama's pairing)."""
    first, second = x_TAD.float().chunk(2, dim=-1)
    cos, sin = cos_TE[:, None], sin_TE[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) over the last axis, in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
