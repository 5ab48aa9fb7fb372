"""bitsandbytes checkpoints in NF4.

For a linear of [out, in], flattened and cut into blocks of ``blocksize`` values:
    weight                uint8 [out * in / 2, 1]   two codes a byte, the first in the high half
    weight.absmax         float32 [blocks], or uint8 where the scales are quantized themselves
    weight.quant_map      float32 [16]              the table
    weight.quant_state.bitsandbytes__nf4            JSON as bytes: blocksize, shape, and so on
and for quantized scales, in blocks of ``nested_blocksize``:
    weight.nested_absmax, weight.nested_quant_map [256], and ``nested_offset`` in the JSON.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from ....kernels.quantized import NF4_VALUES, QuantizedWeight, pack_pairs
from ..config import CheckpointError
from .layout import Settings, Shape, Tensors, check_dtype

_STATE = "weight.quant_state.bitsandbytes__nf4"


class BitsAndBytesLayout:
    """``quant_method: bitsandbytes`` with ``load_in_4bit`` and ``bnb_4bit_quant_type: nf4``."""

    name = "bitsandbytes"

    def __init__(self, settings: Settings) -> None:
        if not settings.raw.get("load_in_4bit", settings.raw.get("_load_in_4bit", False)):
            raise settings.error("load_in_4bit", "only 4-bit checkpoints are read")
        settings.one_of("bnb_4bit_quant_type", ("nf4",))
        settings.one_of("bnb_4bit_quant_storage", ("uint8",), "uint8")

    def holds(self, tensors: Tensors, prefix: str) -> bool:
        """See ``Layout.holds``."""
        weight = f"{prefix}.weight"
        packed = weight in tensors and tensors.stored_dtype(weight) == "U8"
        return packed or f"{weight}.absmax" in tensors

    def expected(self, tensors: Tensors, prefix: str, shape: Shape) -> dict[str, Shape | None]:
        """Blocks are only known from the JSON, so their shapes are checked while reading."""
        names: dict[str, Shape | None] = {
            f"{prefix}.weight": (math.ceil(math.prod(shape) / 2), 1),
            f"{prefix}.weight.absmax": None,
            f"{prefix}.weight.quant_map": (16,),
            f"{prefix}.{_STATE}": None,
        }
        if any(f"{prefix}.weight.nested_{part}" in tensors for part in ("absmax", "quant_map")):
            names[f"{prefix}.weight.nested_absmax"] = None
            names[f"{prefix}.weight.nested_quant_map"] = (256,)
        return names

    def ignored(self, prefix: str) -> frozenset[str]:
        """See ``Layout.ignored``."""
        return frozenset()

    def read(self, tensors: Tensors, prefix: str, shape: Shape) -> QuantizedWeight:
        """Blocks that cross rows become groups that do not: their common divisor."""
        state = _state(tensors, prefix)
        if state.get("shape") != list(shape):
            raise CheckpointError(
                f"{tensors.folder}: {prefix}.{_STATE} has shape {state.get('shape')!r}, "
                f"config.json asks for {list(shape)}"
            )
        block = _positive(tensors, prefix, state, "blocksize")
        _check_table(tensors, prefix)
        pairs = tensors.view(f"{prefix}.weight").view(-1)
        codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).view(-1)[: math.prod(shape)]
        scales = _scales(tensors, prefix, state, math.ceil(math.prod(shape) / block))
        group = math.gcd(block, shape[1])
        starts = torch.arange(0, math.prod(shape), group)
        return QuantizedWeight(
            format="nf4",
            shape=(shape[0], shape[1]),
            codes=pack_pairs(codes.view(shape)),
            scales_OG=scales[starts // block].view(shape[0], -1),
            group_size=group,
        )


def _state(tensors: Tensors, prefix: str) -> dict[str, Any]:
    name = f"{prefix}.{_STATE}"
    check_dtype(tensors, name, ("U8",))
    try:
        state = json.loads(bytes(tensors.view(name).tolist()))
    except ValueError as error:
        raise CheckpointError(f"{tensors.folder}: {name} is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{tensors.folder}: {name} holds no JSON object")
    return state


def _positive(tensors: Tensors, prefix: str, state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{tensors.folder}: {key} in {prefix}.{_STATE} is {value!r}; a size is expected"
        )
    return value


def _check_table(tensors: Tensors, prefix: str) -> None:
    name = f"{prefix}.weight.quant_map"
    check_dtype(tensors, name, ("F32",))
    if not torch.equal(tensors.view(name), torch.tensor(NF4_VALUES)):
        raise CheckpointError(f"{tensors.folder}: {name} is not the table of NF4")


def _scales(tensors: Tensors, prefix: str, state: dict[str, Any], blocks: int) -> Tensor:
    """The scale of each block, float32."""
    name = f"{prefix}.weight.absmax"
    check_dtype(tensors, name, ("F32", "U8"))
    absmax = tensors.view(name)
    _check_length(tensors, name, absmax, blocks)
    if absmax.dtype == torch.float32:
        return absmax
    nested = f"{prefix}.weight.nested_absmax"
    if nested not in tensors:
        raise CheckpointError(
            f"{tensors.folder}: {name} is quantized, but {nested} is missing; "
            f"{prefix} cannot be read without it"
        )
    offset = state.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float):
        raise CheckpointError(
            f"{tensors.folder}: nested_offset in {prefix}.{_STATE} is {offset!r}; "
            "a number is expected"
        )
    size = _positive(tensors, prefix, state, "nested_blocksize")
    outer = tensors.view(nested).float()
    _check_length(tensors, nested, outer, math.ceil(blocks / size))
    table = tensors.view(f"{prefix}.weight.nested_quant_map").float()
    return table[absmax.int()] * outer.repeat_interleave(size)[:blocks] + offset


def _check_length(tensors: Tensors, name: str, values: Tensor, expected: int) -> None:
    if values.shape != (expected,):
        raise CheckpointError(
            f"{tensors.folder}: {name} has shape {list(values.shape)}; "
            f"this linear has {expected} blocks"
        )
