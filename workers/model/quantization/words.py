"""Codes packed into 32-bit words, the lowest bits first."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, W * 32 / bits]: a word's codes are neighbours in its row."""
    return _codes(words, bits).flatten(1)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 [W, C] -> uint8 [W * 32 / bits, C]: a word's codes are neighbours in its column."""
    return _codes(words, bits).transpose(1, 2).flatten(0, 1)


def _codes(words: Tensor, bits: int) -> Tensor:
    """uint8, with a last axis over the codes of a word."""
    octets = words.contiguous().view(torch.uint8).view(*words.shape, 4)  # little-endian
    if bits == 8:
        return octets
    assert bits == 4, "formats with other widths are refused by their layout"
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
