"""Edits and faults of logits in torch's operations, on any device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..host_copy import array_to
from .api import Edit, EditKind, Fault


def find_faults(best_R: Tensor) -> list[int]:
    """The fault of each row whose best logit is ``best_R`` (NaN where one is), 0 where none."""
    fault_R = torch.zeros(len(best_R), dtype=torch.int64, device=best_R.device)
    fault_R[best_R.isnan()] = int(Fault.NAN)
    fault_R[best_R == torch.inf] = int(Fault.INFINITY)
    fault_R[best_R == -torch.inf] = int(Fault.NO_TOKEN)
    found: list[int] = fault_R.tolist()
    return found


def apply_edit(logits_RV: Tensor, edit: Edit) -> None:
    """Make one edit in place: all rows in one gather and one scatter, and no wait for a device."""
    device = logits_RV.device
    row_E = array_to(_rows(edit), device)
    ids_E = array_to(edit.ids, device)
    if edit.kind is EditKind.BAN:
        logits_RV[row_E, ids_E] = -torch.inf
        return
    if edit.kind is EditKind.KEEP:
        values_E = logits_RV[row_E, ids_E]
        logits_RV[row_E] = -torch.inf
        logits_RV[row_E, ids_E] = values_E
        return
    changes_E = array_to(edit.values, device)
    if edit.unread is None:
        _change(logits_RV, edit.kind, row_E, ids_E, changes_E)
        return
    unread = edit.unread
    places_R = array_to(unread.places_R, device)
    token_R = unread.tokens_N.index_select(0, places_R.clamp(min=0)).where(places_R >= 0, -1)
    is_unread_E = ids_E == token_R[row_E]
    changes_E = array_to(unread.values_E, device).where(is_unread_E, changes_E)
    _change(logits_RV, edit.kind, row_E, ids_E, changes_E)
    is_listed_R = torch.zeros_like(token_R).scatter_reduce_(0, row_E, is_unread_E.long(), "amax")
    is_alone_R = (token_R >= 0) & (is_listed_R == 0)
    # Of other rows token 0 changes by what leaves every logit as it is, zeros of both signs too.
    nothing = 1.0 if edit.kind is EditKind.PENALISE else -0.0
    changes_R = array_to(unread.values_R, device).where(is_alone_R, nothing)
    row_R = torch.arange(len(token_R), device=device)
    _change(logits_RV, edit.kind, row_R, token_R.clamp(min=0), changes_R)


def _change(
    logits_RV: Tensor, kind: EditKind, row_E: Tensor, ids_E: Tensor, changes_E: Tensor
) -> None:
    values_E = logits_RV[row_E, ids_E]
    if kind is EditKind.ADD:
        values_E += changes_E
    else:
        values_E = torch.where(values_E > 0, values_E / changes_E, values_E * changes_E)
    logits_RV[row_E, ids_E] = values_E


def resolved(edit: Edit) -> Edit:
    """The same edit with its unread tokens read, which this waits for."""
    unread = edit.unread
    if unread is None:
        return edit
    row_E = _rows(edit)
    tokens_N = np.array(unread.tokens_N.tolist(), dtype=np.int64)
    token_R = np.where(unread.places_R >= 0, tokens_N[unread.places_R], -1)
    is_unread_E = edit.ids == token_R[row_E]
    is_alone_R = token_R >= 0
    is_alone_R[row_E[is_unread_E]] = False
    rows = is_alone_R.nonzero()[0]
    ends = edit.starts[rows + 1]
    values_E = np.where(is_unread_E, unread.values_E, edit.values)
    return Edit(
        edit.kind,
        edit.starts + np.concatenate(([0], is_alone_R.cumsum())),
        np.insert(edit.ids, ends, token_R[rows]),
        np.insert(values_E, ends, unread.values_R[rows]),
    )


def _rows(edit: Edit) -> NDArray[np.int64]:
    """The row of each entry."""
    return np.repeat(np.arange(len(edit.starts) - 1, dtype=np.int64), np.diff(edit.starts))
