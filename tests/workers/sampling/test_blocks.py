from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.workers.sampling.blocks import block_maxima, block_weights


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


@pytest.mark.parametrize("num_tokens", [1, 128, 300])
def test_weights_are_those_of_the_softmax(num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    logits_N = torch.randn(num_tokens) * 5
    blocks_MB, sums_1M = block_weights(logits_N, 0.5)
    weights_P = blocks_MB.flatten()
    torch.testing.assert_close(
        weights_P[:num_tokens] / weights_P.sum(), (logits_N / 0.5).softmax(0)
    )
    assert weights_P[num_tokens:].sum() == 0
    torch.testing.assert_close(sums_1M[0], blocks_MB.double().sum(1), rtol=1e-6, atol=1e-9)
