from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.kernels.sampling.blocks import block_maxima


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 700), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_block_maxima_cover_every_token_and_no_padding(
    num_tokens: int, padding: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits_RV = torch.randn(3, num_tokens + padding)
    logits_RV[:, num_tokens:] = 1e9
    maxima_RM = block_maxima(logits_RV, num_tokens)
    assert maxima_RM.shape[1] == -(-num_tokens // 128)
    for block in range(maxima_RM.shape[1]):
        tokens = logits_RV[:, block * 128 : min(num_tokens, block * 128 + 128)]
        assert torch.equal(maxima_RM[:, block], tokens.max(1).values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 200, 256])
def test_what_is_not_a_number_shows_in_the_maximum(bad: float, place: int) -> None:
    logits_RV = torch.zeros(2, 260)
    logits_RV[1, place] = bad
    maxima_RM = block_maxima(logits_RV, 257)
    assert maxima_RM.isfinite().logical_not().nonzero().tolist() == [[1, place // 128]]
