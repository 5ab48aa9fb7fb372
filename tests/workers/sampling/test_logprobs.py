from __future__ import annotations

import math

import pytest
import torch

from inference_pio.kernels.dispatch import select_kernels
from inference_pio.workers.sampling.logprobs import token_logprobs

KERNELS = select_kernels(torch.device("cpu"), torch.float32).sampling


def logits_with_padding(rows: int, vocab_rows: int, num_tokens: int) -> torch.Tensor:
    torch.manual_seed(rows)
    logits_RV = torch.randn(rows, vocab_rows) * 4
    logits_RV[:, num_tokens:] = 1e9
    return logits_RV


@pytest.mark.parametrize("num_tokens", [40, 40_003])
def test_are_those_of_the_tokens_that_exist(num_tokens: int) -> None:
    logits_TV = logits_with_padding(3, num_tokens + 5, num_tokens)
    expected = logits_TV[:, :num_tokens].double().log_softmax(1)
    ids = [3, 0, num_tokens - 1]
    for top in (0, 5, 20):
        result = token_logprobs(KERNELS, logits_TV, ids, top, num_tokens)
        assert [logprob.token_id for logprob in result] == ids
        for row, logprob in enumerate(result):
            assert logprob.logprob == pytest.approx(float(expected[row, ids[row]]), abs=1e-5)
            values, best = expected[row].topk(top)
            assert [token_id for token_id, _ in logprob.top] == best.tolist()
            assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (logprob,) = token_logprobs(KERNELS, torch.zeros(1, 4), [1], 20, 4)
    assert [token_id for token_id, _ in logprob.top] == [0, 1, 2, 3]


def test_each_position_needs_its_token() -> None:
    with pytest.raises(ValueError, match="2 rows of logits need as many tokens: 1"):
        token_logprobs(KERNELS, torch.zeros(2, 4), [1], 0, 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_of_logits_that_are_no_numbers_are_none(bad: float) -> None:
    logits_TV = torch.zeros(2, 300)
    logits_TV[1, 280] = bad
    fine, wrong = token_logprobs(KERNELS, logits_TV, [5, 5], 2, 300)
    assert fine.logprob == pytest.approx(-math.log(300))
    assert math.isnan(wrong.logprob)
    assert all(math.isnan(logprob) for _, logprob in wrong.top)


def test_no_rows_have_none() -> None:
    assert token_logprobs(KERNELS, torch.zeros(0, 4), [], 2, 4) == []
