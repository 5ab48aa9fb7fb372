"""Draws one token a row: temperature, top-k, top-p, min-p, then inverse transform sampling.

The order is that of transformers: each filter sees what the one before it left, renormalised.
Tokens equal to the k-th best all stay, as there. Everything works on candidates in canonical
order (best first, equals by id) in float64, so a row's token depends on that row alone.

Shapes: G rows of one group, K candidates, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import BLOCK, block_weights
from .noise import uniform
from .row import SamplingRow

_MANY = 1024
"""More tokens than this are not sorted where the best of them may do."""
_SLACK = 1e-3
"""In logits: more than float32 rounds off at any size that logits have."""


@dataclass(frozen=True, slots=True)
class DrawValues:
    """The numbers of one group of rows as columns, float64 [G, 1] (``top_k`` int64)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[SamplingRow], num_candidates: int, device: torch.device
    ) -> DrawValues:
        """From the rows; a ``top_k`` that is off or too large becomes ``num_candidates``."""
        table = torch.tensor(
            [
                (
                    row.sampling.temperature,
                    row.sampling.top_p,
                    row.sampling.min_p,
                    uniform(row.seed, row.step),
                )
                for row in rows
            ],
            dtype=torch.float64,
        ).to(device)
        top_k = torch.tensor(
            [min(row.sampling.top_k or num_candidates, num_candidates) for row in rows]
        ).to(device)
        temperature, top_p, min_p, number = (column.unsqueeze(1) for column in table.unbind(1))
        return cls(temperature, top_k.unsqueeze(1), top_p, min_p, number)


def kept_weights(values_GK: Tensor, settings: DrawValues, total_G1: Tensor | None = None) -> Tensor:
    """Unnormalised probabilities of the candidates, 0 where a filter drops one; [G, K] float64.

    ``values_GK`` are logits in descending order. ``total_G1`` is the mass that ``top_p`` is a share
    of, in units of the best token's, where the candidates are not all tokens that top-k leaves.
    """
    scaled_GK = (values_GK.double() - values_GK[:, :1]) / settings.temperature
    kth_G1 = values_GK.gather(1, settings.top_k - 1)
    weights_GK = scaled_GK.exp() * (values_GK >= kth_G1)
    sums_GK = weights_GK.cumsum(1)
    total_G1 = sums_GK[:, -1:] if total_G1 is None else total_G1
    before_GK = torch.zeros_like(sums_GK)
    before_GK[:, 1:] = sums_GK[:, :-1]
    nucleus_GK = (before_GK < settings.top_p * total_G1) | (settings.top_p >= 1)
    return weights_GK * (nucleus_GK & (scaled_GK >= settings.min_p.log()))


def pick(weights_GK: Tensor, uniform_G1: Tensor) -> Tensor:
    """The first place in each row where the running sum passes its share ``uniform``; [G]."""
    sums_GK = weights_GK.cumsum(1)
    total_G1 = sums_GK[:, -1:]
    # Rounding must not lift the target to the total: the place found always has a weight.
    target_G1 = torch.minimum(uniform_G1 * total_G1, total_G1.nextafter(torch.zeros_like(total_G1)))
    return (sums_GK > target_G1).int().argmax(1)


def has_hidden_ties(values_GK: Tensor, settings: DrawValues) -> Tensor:
    """Rows whose k-th best value reaches the last candidate: more of its equals may lie outside."""
    kth_G1 = values_GK.gather(1, settings.top_k - 1)
    return ((values_GK[:, -1:] == kth_G1) & (kth_G1 > -torch.inf)).squeeze(1)


def draw_alone(logits_N: Tensor, row: SamplingRow) -> int:
    """A token of a row that few candidates cannot hold: no top-k, a large one, or many equals."""
    sampling = row.sampling
    if sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p == 0:
        return _draw_unfiltered(logits_N, row)
    if sampling.top_k == 0:
        total = float(block_weights(logits_N, sampling.temperature)[1].sum())
        values_1K, ids_1K = _passing(logits_N, row, total)
        total_11 = torch.tensor([[total]], dtype=torch.float64, device=logits_N.device)
    else:
        values_1K, ids_1K = _top(logits_N, sampling.top_k)
        total_11 = None
    settings = DrawValues.of([row], values_1K.shape[1], logits_N.device)
    weights_1K = kept_weights(values_1K, settings, total_11)
    return int(ids_1K[0, pick(weights_1K, settings.uniform)])


def _draw_unfiltered(logits_N: Tensor, row: SamplingRow) -> int:
    """A token of the whole distribution: first its block, then its place there."""
    blocks_MB, sums_1M = block_weights(logits_N, row.sampling.temperature)
    number_11 = DrawValues.of([row], 1, logits_N.device).uniform
    block = pick(sums_1M, number_11)
    before = sums_1M[:, : int(block)].sum(1, keepdim=True)
    # What is left of the number after the blocks before, as a share of this block.
    share_11 = (number_11 * sums_1M.sum(1, keepdim=True) - before) / sums_1M[:, block]
    place = pick(blocks_MB[block].double(), share_11.clamp(min=0.0))
    return int(block) * BLOCK + int(place)


def _passing(logits_N: Tensor, row: SamplingRow, total: float) -> tuple[Tensor, Tensor]:
    """All tokens that top-p and min-p may leave, best first: values and ids, [1, K].

    ``total`` is the mass of all tokens, in units of the best token's.
    """
    sampling = row.sampling
    # Tokens lighter than this share have less than 1 - top_p together, so the nucleus ends above.
    lightest = max((1 - sampling.top_p) * total / len(logits_N), sampling.min_p)
    reach = sampling.temperature * math.log(lightest)
    # This only narrows the field; the filters themselves decide.
    ids_K = (logits_N >= logits_N.max() + (reach - _SLACK)).nonzero().squeeze(1)
    values_K = logits_N[ids_K]
    if len(ids_K) > _MANY:
        best_K, place_K = values_K.topk(_MANY, sorted=False)
        weights_K = ((best_K - best_K.max()).double() / sampling.temperature).exp()
        # More equals of the last may lie outside, so the nucleus must end above it.
        if float(weights_K[best_K > best_K.min()].sum()) > sampling.top_p * total:
            ids_K = ids_K[place_K].sort().values
    return _best_first(logits_N, ids_K)


def _top(logits_N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` best tokens and all equals of the last, best first: values and ids, [1, K]."""
    kth = logits_N.topk(min(top_k, len(logits_N)), sorted=False).values.min()
    # Banned tokens, at minus infinity, have no weight however many belong to the k best.
    ids_K = (logits_N >= kth.clamp(min=torch.finfo(logits_N.dtype).min)).nonzero().squeeze(1)
    return _best_first(logits_N, ids_K)


def _best_first(logits_N: Tensor, ids_K: Tensor) -> tuple[Tensor, Tensor]:
    """Values and ids of ascending ``ids_K`` in canonical order, [1, K] each."""
    values_K, order_K = logits_N[ids_K].sort(descending=True, stable=True)
    return values_K.unsqueeze(0), ids_K[order_K].unsqueeze(0)
