"""Tensors as integer words and back: the same bits, over the same memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from inference_pio.workers.kv.tensor_words import as_tensor, as_words, ticket_dtype
from inference_pio.workers.kv.ticket import Expected, KVLayout, decode_ticket, encode_ticket

from .ticket_samples import LAYOUT, chain_of, expected, header

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ticket_brings_a_tensor_back_bit_by_bit(dtype: torch.dtype) -> None:
    layout = KVLayout(LAYOUT.fingerprint, ticket_dtype(dtype), 3, 2, 8, 4)
    blocks = torch.randn(layout.shape(2)).to(dtype)
    blocks[0, 0, 0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    buffer = encode_ticket(header(layout=layout), as_words(blocks))
    wanted: Expected = expected(layout=layout, chain_at=chain_of().at)
    back = as_tensor(decode_ticket(buffer, wanted), layout.dtype)
    assert back.dtype is dtype
    assert back.shape == blocks.shape
    assert torch.equal(back.view(torch.uint8), blocks.view(torch.uint8))


def test_no_bytes_are_copied() -> None:
    blocks = torch.zeros(LAYOUT.shape(1), dtype=torch.bfloat16)
    words = as_words(blocks)
    words.flags.writeable = False
    tensor = as_tensor(words, "bfloat16")
    blocks[0] = 1.0
    assert tensor.data_ptr() == blocks.data_ptr()
    assert bool((tensor[0] == 1.0).all())


def test_a_part_of_a_tensor_is_laid_out_anew() -> None:
    pool = torch.arange(2 * 5 * 2 * 2 * 4 * 2, dtype=torch.int16).reshape(2, 5, 2, 2, 4, 2)
    words = as_words(pool.view(torch.bfloat16)[:, 1:3])
    assert np.array_equal(words, pool[:, 1:3].numpy())


def test_a_view_keeps_the_memory_alive() -> None:
    def view() -> torch.Tensor:
        words = np.full(LAYOUT.shape(64), 7, np.int16)
        words.flags.writeable = False
        return as_tensor(words, "float16")

    tensor = view()
    gc.collect()
    noise = [np.zeros(LAYOUT.shape(64), np.int16) for _ in range(32)]
    assert bool((tensor.view(torch.int16) == 7).all()), len(noise)


def test_an_element_type_that_cannot_travel_is_named() -> None:
    with pytest.raises(ValueError, match=r"float32, bfloat16, float16, got torch.float64"):
        ticket_dtype(torch.float64)
