"""Tensors as integer words and back: the same bits, over the same memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from inference_pio.workers.kv.tensor_words import as_tensor, ticket_dtype
from inference_pio.workers.kv.ticket import Expected, KVLayout, decode_ticket, encode_ticket

from .ticket_samples import LAYOUT, chain_of, expected, header

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ticket_brings_a_tensor_back_bit_by_bit(dtype: torch.dtype) -> None:
    layout = KVLayout(LAYOUT.fingerprint, ticket_dtype(dtype), 3, 2, 8, 4)
    blocks = torch.randn(layout.shape(2)).to(dtype)
    blocks[0, 0, 0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    about = header(layout=layout)
    buffer = np.empty(about.num_bytes, np.uint8)
    encode_ticket(about, buffer, lambda words: as_tensor(words, layout.dtype).copy_(blocks))
    wanted: Expected = expected(layout=layout, chain_at=chain_of().at)
    back = as_tensor(decode_ticket(buffer, wanted), layout.dtype)
    assert back.dtype is dtype
    assert back.shape == blocks.shape
    assert torch.equal(back.view(torch.uint8), blocks.view(torch.uint8))


def test_no_bytes_are_copied() -> None:
    words = np.zeros(LAYOUT.shape(1), np.int16)
    as_tensor(words, "bfloat16")[0] = 1.0
    words.flags.writeable = False
    tensor = as_tensor(words, "bfloat16")
    assert tensor.data_ptr() == words.__array_interface__["data"][0]
    assert bool((tensor[0] == 1.0).all())
    assert not tensor[1:].any()


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
