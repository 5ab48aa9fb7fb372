"""What rows change about their logits: penalties, then bias, then bans.

Edits touch only the entries they concern, so they cost by tokens seen and not by vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.sampling.api import Edit, EditKind, UnreadEntries
from .row import SamplingRow

_Ids = NDArray[np.int64]
_Values = NDArray[np.float32]
_NO_IDS = np.zeros(0, dtype=np.int64)
_NO_VALUES = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class UnreadRows:
    """Tokens that the host has not read: that before row r's is ``tokens_N[places_R[r]]``, where
    the logits are; -1 where the host knows it."""

    tokens_N: Tensor
    places_R: Sequence[int]


def edits_of(rows: Sequence[SamplingRow], unread: UnreadRows | None = None) -> list[Edit]:
    """Every row's penalties, bias and bans, in the order in which they are made.

    Penalties count tokens that are unread as well, each in the window of its row.
    """
    edits = []
    if any(row.penalties is not None for row in rows):
        edits.append(_penalties(EditKind.PENALISE, [_repetition(row) for row in rows], unread))
        edits.append(_penalties(EditKind.ADD, [_presence_and_frequency(r) for r in rows], unread))
    if any(_constrained(row) for row in rows):
        edits.append(_edit(EditKind.ADD, [_bias(row) for row in rows]))
        edits.append(_edit(EditKind.KEEP, [(row.allowed, _NO_VALUES) for row in rows]))
        edits.append(_edit(EditKind.BAN, [(_banned(row), _NO_VALUES) for row in rows]))
    return [edit for edit in edits if len(edit.ids) or edit.unread is not None]


def _constrained(row: SamplingRow) -> bool:
    return row.bias is not None or row.allowed is not None or bool(row.banned)


class _Counted(NamedTuple):
    """A row's entries for one penalty, and what one more token changes about them."""

    ids: _Ids
    values: _Values
    values_if_again: _Values
    """Each entry's if its id comes once more."""
    value_if_new: np.float32
    """Of an id that has no entry yet."""


_NOTHING = _Counted(_NO_IDS, _NO_VALUES, _NO_VALUES, np.float32(0))


def _repetition(row: SamplingRow) -> _Counted | None:
    factor = np.float32(row.sampling.repetition_penalty)
    if factor == 1 or row.penalties is None:
        return None
    ids = row.penalties.window(row.sampling.repetition_window).ids
    values = np.full(len(ids), factor)
    return _Counted(ids, values, values, factor)


def _presence_and_frequency(row: SamplingRow) -> _Counted | None:
    presence, frequency = row.sampling.presence_penalty, row.sampling.frequency_penalty
    if row.penalties is None or not (presence or frequency):
        return None

    def values(counts: NDArray[np.int64]) -> _Values:
        return -(presence + frequency * counts).astype(np.float32)

    generated = row.penalties.generated
    counts, once = generated.counts, np.ones(1, dtype=np.int64)
    return _Counted(generated.ids, values(counts), values(counts + 1), values(once)[0])


def _penalties(kind: EditKind, rows: Sequence[_Counted | None], unread: UnreadRows | None) -> Edit:
    counted = [_NOTHING if row is None else row for row in rows]
    edit = _edit(kind, [(row.ids, row.values) for row in counted])
    places = [
        -1 if row is None else place
        for row, place in zip(rows, unread.places_R if unread is not None else (), strict=False)
    ]
    if unread is None or all(place < 0 for place in places):
        return edit
    entries = UnreadEntries(
        unread.tokens_N,
        np.array(places, dtype=np.int64),
        np.array([row.value_if_new for row in counted], dtype=np.float32),
        np.concatenate([row.values_if_again for row in counted]),
    )
    return replace(edit, unread=entries)


def _bias(row: SamplingRow) -> tuple[_Ids | None, _Values]:
    return (None, _NO_VALUES) if row.bias is None else (row.bias.ids, row.bias.values)


def _banned(row: SamplingRow) -> _Ids | None:
    return np.array(row.banned, dtype=np.int64) if row.banned else None


def _edit(kind: EditKind, entries: Sequence[tuple[_Ids | None, _Values]]) -> Edit:
    ids = [_NO_IDS if row_ids is None else row_ids for row_ids, _ in entries]
    starts = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(row_ids) for row_ids in ids], out=starts[1:])
    return Edit(kind, starts, np.concatenate(ids), np.concatenate([v for _, v in entries]))
