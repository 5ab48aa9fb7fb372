"""One layer of the paged KV cache, in the model's dtype or in codes of 8 bits.

Shape suffixes as in ``api``, and B: the bytes of one head in one block.

A plain layer is a tensor ``kv_N2KSD`` of the model's dtype. A coded one holds for each token and
KV head, keys and values alike, ``head_dim`` codes of one byte and one float32 scale:

    number = code * scale        scale = max(|numbers|) / the largest code

``int8`` has the whole numbers from -127 to 127, ``fp8`` the numbers of e4m3 up to 448. A head in a
block has its codes first, token after token, then its scales, so that whatever copies, sends or
clears blocks moves both without knowing of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .kv_bytes import KVCodes, code_bytes, head_bytes

_CODE_DTYPES: dict[KVCodes, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST: dict[KVCodes, float] = {"int8": 127.0, "fp8": 448.0}
# Rows whose numbers are all smaller have codes of zero: the inverse of their scale is no float32.
_SMALLEST_MAX = 1e-30
# Numbers dequantized at once: bounds the float32 scratch memory at long contexts.
_MAX_NUMBERS = 2**22


class KVShape(NamedTuple):
    """What a layer is made of, however its numbers are stored."""

    num_blocks: int
    kv_heads: int
    block_size: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class CodedKV:
    """A layer in codes. Raises ``ValueError`` for data of another layout."""

    data_N2KB: Tensor
    """uint8."""
    codes: KVCodes
    block_size: int
    head_dim: int

    def __post_init__(self) -> None:
        data, size = self.data_N2KB, head_bytes(self.block_size, self.head_dim)
        if data.dtype != torch.uint8 or data.ndim != 4 or data.shape[1::2] != (2, size):
            raise ValueError(
                f"a layer in codes is {data.dtype} {list(data.shape)}; blocks of "
                f"{self.block_size} tokens with heads of {self.head_dim} are torch.uint8 "
                f"[N, 2, K, {size}]"
            )

    @property
    def device(self) -> torch.device:
        return self.data_N2KB.device

    def codes_of(self, data_XB: Tensor) -> Tensor:
        """The bytes of the codes in some heads' data, a view [..., S, D]."""
        numbers = data_XB[..., : self.block_size * self.head_dim]
        return numbers.view(*data_XB.shape[:-1], self.block_size, self.head_dim)

    def scales_of(self, data_XB: Tensor) -> Tensor:
        """The scales, a float32 view [..., S]."""
        return data_XB[..., code_bytes(self.block_size, self.head_dim) :].view(torch.float32)

    def dequantized(self, data_XB: Tensor) -> Tensor:
        """The numbers, float32 [..., S, D]."""
        return dequantize(self.codes_of(data_XB), self.scales_of(data_XB), self.codes)


KVLayer = Tensor | CodedKV


def quantize(x_XD: Tensor, codes: KVCodes) -> tuple[Tensor, Tensor]:
    """Codes as uint8 [..., D] and their scales, float32 [...].

    A NaN or an infinity makes its whole row NaN.
    """
    wide_XD = x_XD.float()
    amax_X1 = wide_XD.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST_MAX)
    # A number divided by a tensor would be rounded twice: torch multiplies with the reciprocal.
    scaled_XD = wide_XD * (torch.full_like(amax_X1, _LARGEST[codes]) / amax_X1)
    if codes == "int8":
        scaled_XD = scaled_XD.nan_to_num_(0).round_()
    found_XD = scaled_XD.to(_CODE_DTYPES[codes]).view(torch.uint8)
    return found_XD, (amax_X1 / _LARGEST[codes]).squeeze(-1)


def dequantize(codes_XD: Tensor, scales_X: Tensor, codes: KVCodes) -> Tensor:
    """The numbers that codes (of any one-byte dtype) stand for, float32 [..., D]."""
    return codes_XD.view(_CODE_DTYPES[codes]).float() * scales_X[..., None]


def layer_shape(kv: KVLayer) -> KVShape:
    """The shape of a layer in either form."""
    if isinstance(kv, CodedKV):
        num_blocks, _, kv_heads, _ = kv.data_N2KB.shape
        return KVShape(num_blocks, kv_heads, kv.block_size, kv.head_dim)
    num_blocks, _, kv_heads, block_size, head_dim = kv.shape
    return KVShape(num_blocks, kv_heads, block_size, head_dim)


def write_tokens(kv: KVLayer, slots_T: Tensor, kv_T2KD: Tensor) -> None:
    """Keys and values of new tokens to their slots, rounded as the layer stores them."""
    blocks_T, rows_T = slots_T // layer_shape(kv).block_size, slots_T % layer_shape(kv).block_size
    if not isinstance(kv, CodedKV):
        kv[blocks_T, :, :, rows_T] = kv_T2KD.to(kv.dtype)
        return
    codes_T2KD, scales_T2K = quantize(kv_T2KD, kv.codes)
    kv.codes_of(kv.data_N2KB)[blocks_T, :, :, rows_T] = codes_T2KD
    kv.scales_of(kv.data_N2KB)[blocks_T, :, :, rows_T] = scales_T2K


def read_blocks(kv: KVLayer, blocks: Sequence[int]) -> Tensor:
    """Whole blocks as float32 [n, 2, K, S, D]."""
    index = torch.tensor(blocks, device=kv.device)
    if isinstance(kv, CodedKV):
        return kv.dequantized(kv.data_N2KB[index])
    return kv[index].float()


def gather_heads(kv: KVLayer, rows_R: Tensor, out_RSD: Tensor) -> None:
    """Heads of blocks, ``(block * 2 + key or value) * K + head``, rounded to ``out``'s dtype."""
    if not isinstance(kv, CodedKV):
        row_size = kv.shape[3] * kv.shape[4]
        torch.index_select(kv.view(-1, row_size), 0, rows_R, out=out_RSD.view(-1, row_size))
        return
    heads_RB = kv.data_N2KB.view(-1, kv.data_N2KB.shape[-1])
    step = max(1, _MAX_NUMBERS // (kv.block_size * kv.head_dim))
    for first in range(0, len(rows_R), step):
        part = slice(first, first + step)
        out_RSD[part].copy_(kv.dequantized(heads_RB[rows_R[part]]))
