"""Probabilities as whole numbers."""

from __future__ import annotations

import math

import pytest
import torch

from inference_pio.kernels.sampling.api import MAX_TOKENS
from inference_pio.kernels.sampling.weights import (
    UNIT_BITS,
    drawn_mass,
    exponents,
    log_sum_of,
    top_p_limit,
    weights_of,
)


def test_are_powers_of_two_rounded_once() -> None:
    torch.manual_seed(0)
    exponents_N = torch.cat((-torch.rand(100_000) * 50, -torch.arange(0, 50, 0.5))).double()
    expected_N = torch.exp2(exponents_N) * 2.0**UNIT_BITS
    off_N = (weights_of(exponents_N) - expected_N).abs()
    assert ((off_N - 0.5) / expected_N).max() < 5e-11


def test_the_best_tokens_is_exact_and_the_least_is_nothing() -> None:
    exponents_N = torch.tensor([0.0, -1.0, -44.9, -45.1, -64.0, -1e300, -math.inf])
    weights = weights_of(exponents_N.double()).tolist()
    assert weights == [2**UNIT_BITS, 2 ** (UNIT_BITS - 1), 1, 0, 0, 0, 0]


def test_the_largest_vocabulary_sums_up() -> None:
    assert MAX_TOKENS * int(weights_of(torch.zeros(1, dtype=torch.float64))) < 2**63


def test_exponents_of_banned_tokens_are_the_lowest() -> None:
    values = torch.tensor([3.5, 1.5, -math.inf])
    assert exponents(values, values[0], 0.5).tolist() == [0.0, -1.0, -math.inf]


@pytest.mark.parametrize(("top_p", "limit"), [(1e-300, 1), (0.5, 500), (0.9999, 1000), (1.0, 1000)])
def test_top_p_always_leaves_the_best(top_p: float, limit: int) -> None:
    assert int(top_p_limit(torch.tensor(1000), top_p)) == limit


@pytest.mark.parametrize("kept", [1, 2**44, 2**62 + 1])
def test_the_drawn_mass_lies_below_all_of_it(kept: int) -> None:
    assert int(drawn_mass(torch.tensor(kept), 0.0)) == 0
    assert int(drawn_mass(torch.tensor(kept), 1 - 2**-53)) in (kept - 1, int(kept * (1 - 2**-53)))


def test_log_sums_of_rows_at_fault_are_not_numbers() -> None:
    best = torch.tensor([0.0, math.nan, math.inf, -math.inf])
    sums = log_sum_of(best, torch.full((4,), 2**UNIT_BITS))
    assert sums[0] == 0
    assert sums[1:].isnan().all()
