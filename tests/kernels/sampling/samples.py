"""Rows of logits and draws that are hard on a sampler."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.kernels.sampling.api import Draw, Edit, EditKind

draws = st.builds(
    Draw.of,
    temperature=st.sampled_from([2e-5, 0.01, 0.3, 0.7, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 20, 48, 49, 300, 1024, 5000, 10**6]),
    top_p=st.sampled_from([1e-9, 0.1, 0.8, 0.95, 0.999999, 1 - 2**-53, 1.0, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 1e-12, 0.01, 0.2, 1.0]),
    uniform=st.sampled_from([0.0, 2**-53, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
) | st.just(Draw())

KINDS = ("normal", "coarse", "equal", "two values", "wide", "banned", "zeros", "peaked", "steps")


def hard_row(kind: str, size: int, seed: int) -> Tensor:
    """One row of ``size`` logits; ``kind`` is one of ``KINDS``."""
    random = np.random.default_rng(seed)
    normal = random.normal(scale=3.0, size=size)
    if kind == "coarse":  # many equals, as bfloat16 models give
        normal = (normal * 4).round() / 4
    elif kind == "equal":
        normal[:] = normal[0]
    elif kind == "two values":
        normal = np.where(normal > 0, 1.0, -1.0)
    elif kind == "wide":
        normal = normal * 10.0 ** random.integers(-30, 37, size=size)
    elif kind == "banned":
        normal[random.permutation(size)[1:]] = -np.inf
    elif kind == "zeros":  # of both signs
        normal = np.where(normal > 0, 0.0, -0.0)
    elif kind == "peaked":
        normal[random.integers(size)] = 60.0
    elif kind == "steps":  # weights around where they vanish
        normal = -random.integers(0, 70, size=size) * 0.5 * np.log(2.0)
    return torch.from_numpy(normal).float()


def hard_rows(kinds: list[str], num_tokens: int, padding: int, seed: int) -> Tensor:
    """A row of each kind; padding columns that would win if they were looked at."""
    rows = [hard_row(kind, num_tokens, seed + number) for number, kind in enumerate(kinds)]
    logits_RV = torch.full((len(kinds), num_tokens + padding), torch.nan)
    logits_RV[:, :num_tokens] = torch.stack(rows)
    logits_RV[:, num_tokens + 1 :] = 1e9
    return logits_RV


def random_edit(kind: EditKind, num_rows: int, num_tokens: int, seed: int) -> Edit:
    """An edit with entries in some rows; its values are sometimes extreme."""
    random = np.random.default_rng(seed)
    most = min(num_tokens, 40)
    counts = random.integers(0, most + 1, size=num_rows) * random.integers(0, 2, size=num_rows)
    ids = [random.permutation(num_tokens)[:count] for count in counts]
    values = random.choice([0.5, 1.0, 1.5, 2.0, 7.3], size=counts.sum())
    if kind is EditKind.ADD:
        values = values * random.choice([-50.0, -0.3, 0.0, 20.0], size=counts.sum())
    starts = np.concatenate(([0], counts.cumsum()))
    return Edit(
        kind,
        starts.astype(np.int64),
        np.concatenate([np.zeros(0), *ids]).astype(np.int64),
        values.astype(np.float32),
    )
