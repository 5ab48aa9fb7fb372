"""Packed weights that lie in memory of the caller."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference_pio.kernels.api import PackedLinear, PackedSwiGLU, Placeable
from inference_pio.kernels.native.library import KernelError, Library
from inference_pio.kernels.native_kernels import NativeKernels
from inference_pio.workers.model.quantization.quantize import MadeFormat, quantize

from .linear_samples import DTYPES, random

Pack = Callable[[NativeKernels, torch.dtype, int], PackedLinear | PackedSwiGLU]


def dense(kernels: NativeKernels, dtype: torch.dtype, seed: int) -> PackedLinear:
    return kernels.pack_linear(random(75, 130, dtype, seed), random(1, 75, dtype, 9)[0])


def swiglu(kernels: NativeKernels, dtype: torch.dtype, seed: int) -> PackedSwiGLU:
    return kernels.pack_swiglu(random(75, 130, dtype, seed), random(75, 130, dtype, seed + 1))


def quantized(format: MadeFormat) -> Pack:
    def pack(kernels: NativeKernels, dtype: torch.dtype, seed: int) -> PackedLinear:
        packed = kernels.pack_quantized(quantize(random(75, 130, dtype, seed), format), None, dtype)
        assert packed is not None
        return packed

    return pack


PACKS: dict[str, Pack] = {
    "dense": dense,
    "swiglu": swiglu,
    "int8": quantized("int8"),
    "int4": quantized("int4"),
    "w8a8": quantized("w8a8"),
    "w4a8": quantized("w4a8"),
    "nf4": quantized("nf4"),
}


def aligned(size: int) -> Tensor:
    whole = torch.zeros(size + 64, dtype=torch.uint8)
    start = -whole.data_ptr() % 64
    return whole[start : start + size]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PACKS)
def test_a_placed_weight_is_read_from_its_place(
    library: Library, kind: str, dtype: torch.dtype
) -> None:
    kernels = NativeKernels(library, 2)
    packed = PACKS[kind](kernels, dtype, 1)
    assert isinstance(packed, Placeable)
    x = random(5, 130, dtype, 3)
    expected = packed(x)
    panels = packed.panels().clone()
    memory = aligned(packed.num_bytes)
    packed.place(memory)
    empty = packed(x)
    memory.copy_(panels)
    assert torch.equal(packed(x), expected)
    assert not torch.equal(empty, expected)
    assert packed.panels().data_ptr() == memory.data_ptr()


def test_memory_may_hold_one_weight_after_the_other(library: Library) -> None:
    kernels = NativeKernels(library, 2)
    weights = [kernels.pack_linear(random(75, 130, torch.float32, seed)) for seed in (1, 2)]
    x = random(5, 130, torch.float32, 3)
    expected, kept = [w(x) for w in weights], []
    memory = aligned(weights[0].num_bytes)
    for weight in weights:
        kept.append(weight.panels().clone())
        weight.place(memory)
    for _ in range(2):
        for weight, panels, result in zip(weights, kept, expected, strict=True):
            memory.copy_(panels)
            assert torch.equal(weight(x), result)


def test_a_placed_weight_keeps_its_memory(library: Library) -> None:
    packed = dense(NativeKernels(library, 1), torch.float32, 1)
    assert isinstance(packed, Placeable)
    x = random(2, 130, torch.float32, 3)
    expected, memory = packed(x), aligned(packed.num_bytes)
    memory.copy_(packed.panels())
    packed.place(memory)
    del memory
    gc.collect()
    assert torch.equal(packed(x), expected)


def test_memory_that_does_not_fit_is_refused(library: Library) -> None:
    packed = dense(NativeKernels(library, 1), torch.float32, 1)
    assert isinstance(packed, Placeable)
    memory = aligned(packed.num_bytes + 1)
    for wrong in (memory, memory[:-2], memory[:-1].view(torch.int8)):
        with pytest.raises(ValueError, match=r"memory is torch\.u?int8 \["):
            packed.place(wrong)
    with pytest.raises(KernelError, match="not aligned to 64"):
        packed.place(memory[1:])
