"""Pages that tokens select from a cache in codes."""

from __future__ import annotations

import pytest
import torch

from inference_pio import LLM, SamplingParams
from inference_pio.kernels.api import Kernels
from inference_pio.kernels.kv_bytes import head_bytes
from inference_pio.kernels.kv_layer import CodedKV, KVCodes, read_blocks, write_tokens
from inference_pio.kernels.native.library import cpu_flags, load, usable
from inference_pio.kernels.native_kernels import NativeKernels
from inference_pio.kernels.pattern import page_bounds
from inference_pio.kernels.reference import ReferenceKernels
from inference_pio.kernels.torch_ops import TorchKernels

CODES: list[KVCodes] = ["int8", "fp8"]
BLOCKS, HEADS, SIZE, DIM = 5, 3, 8, 24


def kernel_sets() -> list[Kernels]:
    native = [NativeKernels(load(name), 2) for name in usable(cpu_flags())]
    return [ReferenceKernels(), TorchKernels(), *native]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kernels", kernel_sets(), ids=lambda kernels: str(kernels.name))
def test_bounds_are_those_of_the_numbers_that_codes_stand_for(
    kernels: Kernels, codes: KVCodes
) -> None:
    torch.manual_seed(0)
    data = torch.zeros(BLOCKS, 2, HEADS, head_bytes(SIZE, DIM), dtype=torch.uint8)
    layer = CodedKV(data, codes, SIZE, DIM)
    slots = torch.arange(BLOCKS * SIZE)
    # Rows of very different size have scales of their own.
    kv_T2KD = (
        torch.randn(len(slots), 2, HEADS, DIM)
        * torch.logspace(-3, 3, len(slots))[:, None, None, None]
    )
    write_tokens(layer, slots, kv_T2KD)
    bounds = torch.full((BLOCKS, 2, HEADS, DIM), float("nan"))
    kernels.bound_pages(layer, bounds, [3, 1])
    expected = page_bounds(read_blocks(layer, [1, 3])[:, 0])
    torch.testing.assert_close(bounds[[1, 3]], expected, rtol=1e-6, atol=0)
    assert bounds[[0, 2, 4]].isnan().all()


@pytest.mark.parametrize("codes", CODES)
def test_an_engine_selects_among_codes(codes: KVCodes) -> None:
    question = [{"role": "user", "content": "What is 417 + 58 - 903?"}]
    options = {"attention": "top_pages:3", "block_size": 16, "kv_cache_bytes": 1 << 22}
    with LLM("embedded", kv_cache_dtype=codes, dtype="float32", **options) as llm:
        answer = llm.chat(question, SamplingParams(temperature=0))
    assert answer.choices[0].content == "-428"
