"""What only the native sampling has: threads that share a row, and operands that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference_pio.kernels.native.library import KernelError, Library
from inference_pio.kernels.native.sampling import NativeSampling
from inference_pio.kernels.sampling.api import Draw, Edit, EditKind
from inference_pio.kernels.sampling.reference import ReferenceSampling

GREEDY = Draw()
DRAWS = (
    GREEDY,
    Draw.of(0.7, 20, 0.95, 0.0, 0.3),
    Draw.of(1.0, 0, 0.95, 0.0, 0.999),
    Draw.of(1.0, 0, 1.0, 0.0, 0.7),
    Draw.of(1.5, 0, 0.9, 0.001, 0.5),
    Draw.of(1.0, 3000, 1.0, 0.0, 0.9),
)


def sampling(library: Library, num_threads: int = 2) -> NativeSampling:
    return NativeSampling(library, library.team(num_threads))


def test_a_large_vocabulary_on_any_number_of_threads(library: Library) -> None:
    """Whole rows for each thread, and parts of a row for each."""
    torch.manual_seed(0)
    num_tokens = 40_003
    logits_RV = torch.randn(len(DRAWS), num_tokens + 61) * 3
    edit = Edit(
        EditKind.BAN,
        np.arange(len(DRAWS) + 1, dtype=np.int64),
        logits_RV[:, :num_tokens].argmax(1).numpy(),
        np.zeros(0, dtype=np.float32),
    )
    expected = ReferenceSampling().sample(logits_RV.clone(), num_tokens, DRAWS, [edit])
    for num_threads in (1, 2, 5, 6, 7, 16):
        threads = sampling(library, num_threads)
        assert torch.equal(threads.sample(logits_RV.clone(), num_tokens, DRAWS, [edit]), expected)


def test_rows_may_lie_apart(library: Library) -> None:
    torch.manual_seed(0)
    wide = torch.randn(3, 2, 500)
    logits_RV = wide[:, 0]
    expected = ReferenceSampling().sample(logits_RV.clone(), 490, DRAWS[:3], [])
    assert torch.equal(sampling(library).sample(logits_RV, 490, DRAWS[:3], []), expected)


@pytest.mark.parametrize("wrong", [-1, 10])
def test_an_edited_id_that_no_row_has_is_an_error(library: Library, wrong: int) -> None:
    edit = Edit(
        EditKind.BAN,
        np.array([0, 2], dtype=np.int64),
        np.array([4, wrong], dtype=np.int64),
        np.zeros(0, dtype=np.float32),
    )
    logits_RV = torch.ones(1, 10)
    with pytest.raises(KernelError, match=rf"edited token 1 is {wrong}; it lies in \[0, 9\]"):
        sampling(library).sample(logits_RV, 9, [GREEDY], [edit])
    assert bool((logits_RV == 1).all())


def test_operands_that_do_not_fit(library: Library) -> None:
    for logits_RV, num_tokens, message in (
        (torch.zeros(1, 4).double(), 4, r"4 tokens in logits of torch\.float64 \[1, 4\]"),
        (torch.zeros(1, 4), 5, "at least so many columns"),
        (torch.zeros(1, 4), 0, "0 tokens"),
        (torch.zeros(4, 1).repeat(1, 2).t()[:1], 4, "no gaps"),
        (torch.zeros(2, 4), 4, "2 rows of logits, but 1 draws"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling(library).sample(logits_RV, num_tokens, [GREEDY], [])


def test_no_rows_give_nothing(library: Library) -> None:
    empty = torch.zeros(0, 8)
    assert sampling(library).sample(empty, 8, [], []).tolist() == []
    assert sampling(library).log_sums(empty, 8).tolist() == []
    assert sampling(library).top_tokens(torch.zeros(2, 8), 8, 0)[1].shape == (2, 0)
