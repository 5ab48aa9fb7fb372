"""Probabilities as whole numbers: the definition that every implementation repeats bit for bit.

A token's weight is ``2 ** exponent``, where the exponent is its logit's distance below the row's
best, times the draw's scale, in units of ``UNIT`` of the best token's weight and rounded to a whole
number. Integer sums are exact, so neither order nor threads nor device change what is drawn. What
rounding takes from a token is less than 3e-14 of the best one's probability.

Additions and products of float64 are rounded alike everywhere, library functions are not: the power
is a polynomial, in steps that no implementation may contract.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
"""The scale at temperature 1."""

UNIT_BITS = 44
"""The best token's weight is 2 ** 44; with 2 ** 18 tokens, sums stay below 2 ** 63."""

VANISHING = -64.0
"""Exponents are not taken lower; every weight below 2 ** -45 of the best one's is 0."""

_CACHED = 1 << 15
"""So many numbers pass all steps at once on a CPU: they and the steps' outcomes fit its caches."""

_TO_WHOLE = 1.5 * 2.0**52
"""Added, it rounds a number to a whole one, which then stands in its low bits."""

POWER = (
    1.0,
    0.6931471807045332,
    0.24022651066562742,
    0.05550410365988618,
    0.009618038131863205,
    0.0013333935057464252,
    0.00015466756371314627,
    1.5196156172870026e-05,
)
"""Of 2 ** r for |r| <= 1/2: a fit of least relative error, 4.7e-11, exact at 0."""


def exponents(values: Tensor, best: Tensor, scale: Tensor | float) -> Tensor:
    """Exponents of 2 of float32 logits, float64: 0 for ``best`` itself, and below it for others."""
    return (values.double() - best.double()).mul_(scale)


def row_weights(logits_N: Tensor, best: Tensor, scale: float) -> Tensor:
    """Weights of all tokens of one row, int64 [N]."""
    if logits_N.device.type != "cpu" or len(logits_N) <= _CACHED:
        return weights_of(exponents(logits_N, best, scale))
    weights_N = torch.empty(len(logits_N), dtype=torch.int64)
    for begin in range(0, len(logits_N), _CACHED):
        part = slice(begin, begin + _CACHED)
        weights_N[part] = weights_of(exponents(logits_N[part], best, scale))
    return weights_N


def weights_of(exponents: Tensor) -> Tensor:
    """Weights of exponents at or below 0, int64. Keeps ``exponents``."""
    clamped = exponents.clamp_min(VANISHING)
    shifted = clamped + _TO_WHOLE
    rest = clamped.sub_(shifted - _TO_WHOLE)
    power = rest * POWER[-1]
    for coefficient in POWER[-2:0:-1]:
        power.add_(coefficient).mul_(rest)
    power.add_(POWER[0])
    # The whole part of the exponent goes into the exponent's bits of the power.
    bits = shifted.view(torch.int64).add_(UNIT_BITS).bitwise_left_shift_(52)
    return bits.add_(power.view(torch.int64)).view(torch.float64).round_().long()


def top_p_limit(total: Tensor, top_p: Tensor | float) -> Tensor:
    """The mass from which on top-p drops tokens: at least 1, so that the best one stays."""
    return (total.double() * top_p).ceil_().long().clamp_(min=1)


def drawn_mass(kept: Tensor, uniform: Tensor | float) -> Tensor:
    """The mass that lies before the drawn one's last unit, of ``kept`` in all."""
    # Rounding must not lift it to the total.
    return torch.minimum((kept.double() * uniform).long(), kept - 1)


def log_sum_of(best_R: Tensor, total_R: Tensor) -> Tensor:
    """The logarithm of a sum of exponentials, from weights with the scale log2(e); float64."""
    logs_R = (total_R.double() * 2.0**-UNIT_BITS).log() + best_R.double()
    return logs_R.where(best_R.isfinite(), torch.nan)
