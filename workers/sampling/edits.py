"""What rows change about their logits: penalties, then bias, then bans.

Edits touch only the entries they concern, so they cost by tokens seen and not by vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...kernels.sampling.api import Edit, EditKind
from .row import SamplingRow

_Ids = NDArray[np.int64]
_Values = NDArray[np.float32]
_NO_IDS = np.zeros(0, dtype=np.int64)
_NO_VALUES = np.zeros(0, dtype=np.float32)


def edits_of(rows: Sequence[SamplingRow]) -> list[Edit]:
    """Every row's penalties, bias and bans, in the order in which they are made."""
    penalised = [row for row in rows if row.penalties is not None]
    edits = []
    if penalised:
        edits.append(_edit(EditKind.PENALISE, [_repetition(row) for row in rows]))
        edits.append(_edit(EditKind.ADD, [_presence_and_frequency(row) for row in rows]))
    if any(_constrained(row) for row in rows):
        edits.append(_edit(EditKind.ADD, [_bias(row) for row in rows]))
        edits.append(_edit(EditKind.KEEP, [(row.allowed, _NO_VALUES) for row in rows]))
        edits.append(_edit(EditKind.BAN, [(_banned(row), _NO_VALUES) for row in rows]))
    return [edit for edit in edits if len(edit.ids)]


def _constrained(row: SamplingRow) -> bool:
    return row.bias is not None or row.allowed is not None or bool(row.banned)


def _repetition(row: SamplingRow) -> tuple[_Ids | None, _Values]:
    factor = row.sampling.repetition_penalty
    if factor == 1 or row.penalties is None:
        return None, _NO_VALUES
    ids = row.penalties.window(row.sampling.repetition_window).ids
    return ids, np.full(len(ids), factor, dtype=np.float32)


def _presence_and_frequency(row: SamplingRow) -> tuple[_Ids | None, _Values]:
    presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
    if row.penalties is None or not (presence or frequency):
        return None, _NO_VALUES
    generated = row.penalties.generated
    return generated.ids, -(presence + frequency * generated.counts).astype(np.float32)


def _bias(row: SamplingRow) -> tuple[_Ids | None, _Values]:
    return (None, _NO_VALUES) if row.bias is None else (row.bias.ids, row.bias.values)


def _banned(row: SamplingRow) -> _Ids | None:
    return np.array(row.banned, dtype=np.int64) if row.banned else None


def _edit(kind: EditKind, entries: Sequence[tuple[_Ids | None, _Values]]) -> Edit:
    ids = [_NO_IDS if row_ids is None else row_ids for row_ids, _ in entries]
    starts = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(row_ids) for row_ids in ids], out=starts[1:])
    return Edit(kind, starts, np.concatenate(ids), np.concatenate([v for _, v in entries]))
