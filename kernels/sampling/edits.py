"""Edits and faults of logits in torch's operations, on any device."""

from __future__ import annotations

import numpy as np
import torch
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
    """Make one edit in place: all rows in one gather and one scatter."""
    numbers = np.arange(len(edit.starts) - 1, dtype=np.int64)
    device = logits_RV.device
    row_E = array_to(np.repeat(numbers, np.diff(edit.starts)), device)
    index = (row_E, array_to(edit.ids, device))
    if edit.kind is EditKind.BAN:
        logits_RV[index] = -torch.inf
        return
    values_E = logits_RV[index]
    if edit.kind is EditKind.KEEP:
        logits_RV[row_E] = -torch.inf
    elif edit.kind is EditKind.ADD:
        values_E += array_to(edit.values, device)
    else:
        factor_E = array_to(edit.values, device)
        values_E = torch.where(values_E > 0, values_E / factor_E, values_E * factor_E)
    logits_RV[index] = values_E
