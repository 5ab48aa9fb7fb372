"""Draws one token a row in torch's operations: temperature, top-k, top-p, min-p, inverse transform.

Shapes: G rows of one group, K candidates, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .api import Draw
from .candidates import best_first, top_with_equals
from .weights import (
    UNIT_BITS,
    drawn_mass,
    exponents,
    row_weights,
    top_p_limit,
    weights_of,
)

_MANY = 1024
"""More tokens than this are not sorted where the best of them may do."""
_SLACK = 1e-6
"""In exponents: more than the polynomial of ``weights_of`` is off."""


@dataclass(frozen=True, slots=True)
class DrawValues:
    """The numbers of one group of rows as columns, float64 [G, 1] (``top_k`` int64)."""

    scale: Tensor
    top_k: Tensor
    top_p: Tensor
    floor: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, draws: Sequence[Draw], num_candidates: int, device: torch.device) -> DrawValues:
        """From the rows; a ``top_k`` that is off or too large becomes ``num_candidates``."""
        table = torch.tensor(draws, dtype=torch.float64).to(device)
        scale, top_k, top_p, floor, uniform = (column.unsqueeze(1) for column in table.unbind(1))
        top_k = top_k.long().clamp(max=num_candidates)
        return cls(scale, top_k.where(top_k > 0, num_candidates), top_p, floor, uniform)


def kept_weights(values_GK: Tensor, settings: DrawValues, total_G1: Tensor | None = None) -> Tensor:
    """Weights of the candidates, 0 where a filter drops one; int64 [G, K].

    ``values_GK`` are logits in descending order. ``total_G1`` is the mass that ``top_p`` is a share
    of, where the candidates are not all tokens that top-k leaves.
    """
    exponents_GK = exponents(values_GK, values_GK[:, :1], settings.scale)
    kth_G1 = values_GK.gather(1, settings.top_k - 1)
    weights_GK = weights_of(exponents_GK) * (values_GK >= kth_G1)
    sums_GK = weights_GK.cumsum(1)
    limit_G1 = top_p_limit(sums_GK[:, -1:] if total_G1 is None else total_G1, settings.top_p)
    nucleus_GK = (sums_GK - weights_GK < limit_G1) | (settings.top_p >= 1)
    return weights_GK * (nucleus_GK & (exponents_GK >= settings.floor))


def pick(weights_GK: Tensor, uniform_G1: Tensor) -> Tensor:
    """The first place in each row where the running sum passes its share ``uniform``; [G]."""
    sums_GK = weights_GK.cumsum(1)
    mass_G1 = drawn_mass(sums_GK[:, -1:], uniform_G1)
    return torch.searchsorted(sums_GK, mass_G1, right=True).squeeze(1)


def has_hidden_ties(values_GK: Tensor, settings: DrawValues) -> Tensor:
    """Rows whose k-th best value reaches the last candidate: more of its equals may lie outside."""
    kth_G1 = values_GK.gather(1, settings.top_k - 1)
    return ((values_GK[:, -1:] == kth_G1) & (kth_G1 > -torch.inf)).squeeze(1)


def draw_alone(logits_N: Tensor, draw: Draw) -> int:
    """A token of a row that few candidates cannot hold: no top-k, a large one, or many equals."""
    total_11 = None
    if draw.top_k == 0:
        best = logits_N.amax()
        weights_N = row_weights(logits_N, best, draw.scale)
        if draw.unfiltered:
            settings = DrawValues.of([draw], len(logits_N), logits_N.device)
            return int(pick(weights_N.unsqueeze(0), settings.uniform))
        total_11 = weights_N.sum().view(1, 1)
        exponents_N = exponents(logits_N, best, draw.scale)
        values_1K, ids_1K = _passing(logits_N, exponents_N, weights_N, draw, int(total_11))
    else:
        # Banned tokens, at minus infinity, have no weight however many belong to the k best.
        values_1K, ids_1K = top_with_equals(logits_N, draw.top_k, torch.finfo(torch.float32).min)
    settings = DrawValues.of([draw], values_1K.shape[1], logits_N.device)
    weights_1K = kept_weights(values_1K, settings, total_11)
    return int(ids_1K[0, pick(weights_1K, settings.uniform)])


def _passing(
    logits_N: Tensor, exponents_N: Tensor, weights_N: Tensor, draw: Draw, total: int
) -> tuple[Tensor, Tensor]:
    """All tokens that top-p and min-p may leave, best first: values and ids, [1, K].

    ``total`` is the mass of all tokens.
    """
    limit = int(top_p_limit(torch.tensor(total), min(draw.top_p, 1.0)))
    # Tokens of this weight or less have less than ``total - limit`` together, so the nucleus ends
    # above them. This only narrows the field; the filters themselves decide.
    lightest = (total - limit) // len(logits_N) - 1
    reach = math.log2(lightest) - UNIT_BITS - _SLACK if lightest > 0 else -1.0 - UNIT_BITS - _SLACK
    ids_K = (exponents_N >= max(reach, draw.floor)).nonzero().squeeze(1)
    if len(ids_K) > _MANY:
        values_K = logits_N[ids_K]
        best_K, place_K = values_K.topk(_MANY, sorted=False)
        # More equals of the last may lie outside, so the nucleus must end above it.
        above_K = ids_K[place_K[best_K > best_K.min()]]
        if int(weights_N[above_K].sum()) >= limit:
            ids_K = ids_K[place_K].sort().values
    return best_first(logits_N, ids_K)
