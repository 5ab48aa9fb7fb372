from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.kernels.sampling.blocks import block_maxima
from inference_pio.kernels.sampling.candidates import best_tokens, top_candidates


def coarse_logits(rows: int, vocab_rows: int, seed: int) -> torch.Tensor:
    """Logits with many equals, as bfloat16 models give."""
    numbers = np.random.default_rng(seed).normal(scale=3.0, size=(rows, vocab_rows))
    return torch.from_numpy((numbers * 4).round() / 4).float()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_best_token_is_the_first_of_equals(num_tokens: int, seed: int) -> None:
    logits_RV = coarse_logits(4, num_tokens + 5, seed)
    logits_RV[:, num_tokens:] = 1e9
    rows = torch.tensor([2, 0])
    best = best_tokens(logits_RV, block_maxima(logits_RV, num_tokens), rows, num_tokens)
    assert best.tolist() == [int(logits_RV[row, :num_tokens].numpy().argmax()) for row in (2, 0)]


@pytest.mark.parametrize("num_tokens", [50, 1000, 40_000, 40_003])
@pytest.mark.parametrize("count", [1, 64, 1088])
def test_candidates_are_the_best_in_order(num_tokens: int, count: int) -> None:
    logits_RV = coarse_logits(3, num_tokens + 7, seed=num_tokens + count)
    logits_RV[:, num_tokens:] = 1e9
    logits_RV[1, : num_tokens - 2] = -torch.inf
    rows = torch.tensor([2, 1])
    values_GK, ids_GK = top_candidates(
        logits_RV, block_maxima(logits_RV, num_tokens), rows, count, num_tokens
    )
    for place, row in enumerate((2, 1)):
        tokens = logits_RV[row, :num_tokens]
        assert torch.equal(values_GK[place], tokens.sort(descending=True).values[:count])
        finite = values_GK[place] > -torch.inf
        ids = ids_GK[place][finite]
        assert torch.equal(tokens[ids], values_GK[place][finite])
        pairs = list(zip((-values_GK[place][finite]).tolist(), ids.tolist(), strict=True))
        assert pairs == sorted(set(pairs))
