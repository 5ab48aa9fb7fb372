"""The filters and the choice, as torch computes them and as they are defined."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from inference_pio.kernels.sampling import reference
from inference_pio.kernels.sampling.api import Draw
from inference_pio.kernels.sampling.draw import DrawValues, kept_weights, pick

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(8))
def test_filters_keep_what_transformers_keeps(seed: int) -> None:
    torch.manual_seed(seed)
    settings = list(
        itertools.product((0.3, 0.6, 1.0, 2.5), (0.05, 0.8, 0.95, 1.0), (0, 1, 7, 20), (0, 0.02, 1))
    )
    logits_RN = torch.randn(len(settings), 300) * 3
    values_RK, ids_RK = logits_RN.sort(dim=1, descending=True)
    draws = [Draw.of(t, top_k, top_p, min_p, 0.0) for t, top_p, top_k, min_p in settings]
    weights_RK = kept_weights(values_RK, DrawValues.of(draws, 300, CPU))
    for number, (temperature, top_p, top_k, min_p) in enumerate(settings):
        scores = logits_RN[number : number + 1].double() / temperature
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        if min_p:
            scores = MinPLogitsWarper(min_p)(None, scores)
        ours = torch.zeros(300, dtype=torch.float64)
        ours[ids_RK[number]] = weights_RK[number].double() / weights_RK[number].sum()
        torch.testing.assert_close(ours, scores.softmax(1)[0], rtol=1e-9, atol=1e-13)
        defined = reference.kept_weights(values_RK[number], draws[number])
        assert torch.equal(weights_RK[number], defined)


@pytest.mark.parametrize(
    "kept", [reference.kept_weights, lambda v, d: kept_weights(v[None], DrawValues.of([d], 5, CPU))]
)
def test_equals_of_the_kth_stay(kept) -> None:  # type: ignore[no-untyped-def]
    weights = kept(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]), Draw.of(1.0, 2, 1.0, 0.0, 0.0))
    assert (weights.flatten() > 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("number", "place"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.74, 3), (0.76, 4), (1 - 2**-53, 4)]
)
def test_pick_inverts_the_running_sum_and_never_takes_a_weight_of_zero(
    number: float, place: int
) -> None:
    weights_1K = torch.tensor([[0, 1, 0, 2, 1, 0]]) * 2**40
    assert pick(weights_1K, torch.tensor([[number]], dtype=torch.float64)).tolist() == [place]
    assert reference.pick(weights_1K[0], number) == place
