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
from .kv_layer import KVLayer, layer_shape, read_blocks, write_tokens
from .pattern import bound_pages, choose_pages, page_bounds, page_scores
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

    def __call__(
        self, q_THD: Tensor, kv_N2KSD: KVLayer, bounds_N2KD: Tensor | None = None
    ) -> Tensor:
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
                rows_Q = torch.arange(start, end, device=q_THD.device) + offset
                keys_L = torch.arange(keys_LHD.shape[0], device=q_THD.device)
                visible_QL = self.context.pattern.visible(rows_Q[:, None], keys_L)
                visible_HQL = visible_QL.expand(num_heads, -1, -1).clone()
                for row in self._selecting(sequence, rows_Q):
                    seen_KL = self._seen_pages(q_THD[start + row], keys_LKD, int(rows_Q[row]))
                    visible_HQL[:, row] &= seen_KL.repeat_interleave(groups, dim=0)
                weights = scores.masked_fill(~visible_HQL, float("-inf")).softmax(dim=-1)
                out = torch.einsum("hql,lhd->qhd", weights, values_LHD)
                out_THD[start:end] = out.to(q_THD.dtype)
        return out_THD.view(num_tokens, num_heads * head_dim)

    def _selecting(self, sequence: int, rows_Q: Tensor) -> list[int]:
        """Which rows select pages."""
        if not self.context.select_starts:
            return []
        selecting: list[int] = torch.nonzero(rows_Q >= self.context.select_starts[sequence])[
            :, 0
        ].tolist()
        return selecting

    def _seen_pages(self, q_HD: Tensor, keys_LKD: Tensor, position: int) -> Tensor:
        """Whether the token at ``position`` sees each key, by its pages alone, [K, L]."""
        pages, size = self.context.pattern.pages, self.context.block_size
        assert pages is not None
        num_keys, num_kv_heads, head_dim = keys_LKD.shape
        last = position // size
        full_CSKD = keys_LKD[: last * size].view(last, size, num_kv_heads, head_dim)
        bounds_C2KD = page_bounds(full_CSKD.transpose(1, 2))
        scores_1KC = page_scores(q_HD.view(1, num_kv_heads, -1, head_dim), bounds_C2KD[None])
        own = torch.tensor([last], device=q_HD.device)
        seen_KM = torch.zeros(num_kv_heads, num_keys // size + 1, dtype=torch.bool)
        seen_KM = seen_KM.to(q_HD.device).scatter_(1, choose_pages(scores_1KC, own, pages)[0], True)
        return seen_KM.repeat_interleave(size, dim=1)[:, :num_keys]

    def _gather(self, kv_N2KSD: KVLayer, sequence: int) -> tuple[Tensor, Tensor]:
        """Of blocks that no row sees, zeros."""
        table = self.context.block_tables[sequence]
        positions = self.context.positions(sequence)
        seen = self.context.pattern.block_numbers(
            positions[0], positions[-1], self.context.block_size
        )
        read = read_blocks(kv_N2KSD, [table[number] for number in seen])
        found = read.new_zeros(len(table), *read.shape[1:])
        found[seen] = read
        kv_2LKD = found.permute(1, 0, 3, 2, 4).flatten(1, 2)
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
        kv_N2KSD: KVLayer,
        slots_T: Tensor,
        eps: float,
    ) -> Tensor:
        """See ``Kernels.qk_norm_rope_write``."""
        _, num_kv_heads, _, head_dim = layer_shape(kv_N2KSD)
        num_heads = weight_AD.shape[0] - num_kv_heads
        heads_THD = qkv_TC.view(qkv_TC.shape[0], -1, head_dim)
        qk_TAD = heads_THD[:, : weight_AD.shape[0]]
        normed_TAD = _normalised(qk_TAD, eps).to(qkv_TC.dtype) * weight_AD
        qk_TAD = rotate(normed_TAD, cos_TE, sin_TE)
        values_TKD = heads_THD[:, -num_kv_heads:].float()
        kv_T2KD = torch.stack((qk_TAD[:, num_heads:], values_TKD), dim=1)
        write_tokens(kv_N2KSD, slots_T, kv_T2KD)
        return qk_TAD[:, :num_heads].to(qkv_TC.dtype)

    def bound_pages(self, kv_N2KSD: KVLayer, bounds_N2KD: Tensor, blocks: Sequence[int]) -> None:
        """See ``Kernels.bound_pages``."""
        bound_pages(kv_N2KSD, bounds_N2KD, blocks)

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
