"""Changes rows of logits in place: penalties, then bias, then bans.

Shapes: ``logits_RV`` float32, one row a sequence. Edits touch only the entries they concern, all
rows in one gather and one scatter, so they cost by tokens seen and not by vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .row import SamplingRow

_Entries = list[tuple[int, NDArray[np.int64]]]
"""Pairs of a row and distinct token ids in it."""


def changes_logits(row: SamplingRow) -> bool:
    """Whether ``edit_logits`` may touch this row."""
    sampling = row.sampling
    penalised = (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )
    constrained = row.bias is not None or row.allowed is not None or bool(row.banned)
    return constrained or (penalised and row.penalties is not None)


def edit_logits(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Apply every row's penalties, bias and bans to ``logits_RV``, in place."""
    _repetition(logits_RV, rows)
    _presence_and_frequency(logits_RV, rows)
    _bias(logits_RV, rows)
    _bans(logits_RV, rows)


def _repetition(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries: _Entries = []
    factors: list[float] = []
    for number, row in enumerate(rows):
        factor = row.sampling.repetition_penalty
        if factor != 1 and row.penalties is not None:
            entries.append((number, row.penalties.window(row.sampling.repetition_window).ids))
            factors.append(factor)
    if not entries:
        return
    index = _index(logits_RV, entries)
    lengths = [len(ids) for _, ids in entries]
    factor_E = _to(np.repeat(np.array(factors, dtype=np.float32), lengths), logits_RV)
    values_E = logits_RV[index]
    logits_RV[index] = torch.where(values_E > 0, values_E / factor_E, values_E * factor_E)


def _presence_and_frequency(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries: _Entries = []
    amounts: list[NDArray[np.float32]] = []
    for number, row in enumerate(rows):
        presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
        if (presence or frequency) and row.penalties is not None:
            generated = row.penalties.generated
            entries.append((number, generated.ids))
            amounts.append((presence + frequency * generated.counts).astype(np.float32))
    if entries:
        index = _index(logits_RV, entries)
        logits_RV[index] = logits_RV[index] - _to(np.concatenate(amounts), logits_RV)


def _bias(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
    biases = [(number, row.bias) for number, row in enumerate(rows) if row.bias is not None]
    if biases:
        index = _index(logits_RV, [(number, bias.ids) for number, bias in biases])
        added_E = np.concatenate([bias.values for _, bias in biases])
        logits_RV[index] = logits_RV[index] + _to(added_E, logits_RV)


def _bans(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> None:
    for number, row in enumerate(rows):
        if row.allowed is not None:
            ids = _to(row.allowed, logits_RV)
            kept = logits_RV[number, ids]
            logits_RV[number].fill_(-torch.inf)
            logits_RV[number, ids] = kept
    entries = [
        (number, np.array(row.banned, dtype=np.int64))
        for number, row in enumerate(rows)
        if row.banned
    ]
    if entries:
        logits_RV[_index(logits_RV, entries)] = -torch.inf


def _index(logits_RV: Tensor, entries: _Entries) -> tuple[Tensor, Tensor]:
    numbers = np.array([number for number, _ in entries], dtype=np.int64)
    row_E = np.repeat(numbers, [len(ids) for _, ids in entries])
    id_E = np.concatenate([ids for _, ids in entries])
    return _to(row_E, logits_RV), _to(id_E, logits_RV)


def _to(values: NDArray[np.int64] | NDArray[np.float32], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)
