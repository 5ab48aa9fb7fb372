from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from inference_pio.workers.sampling.draw import DrawValues, kept_weights, pick
from inference_pio.workers.sampling.resolve import EffectiveSampling
from inference_pio.workers.sampling.row import SamplingRow


@pytest.mark.parametrize("seed", range(8))
def test_filters_keep_what_transformers_keeps(seed: int) -> None:
    torch.manual_seed(seed)
    samplings = [
        EffectiveSampling(temperature, top_p, top_k, min_p)
        for temperature in (0.3, 0.6, 1.0, 2.5)
        for top_p in (0.05, 0.8, 0.95, 1.0)
        for top_k in (0, 1, 7, 20)
        for min_p in (0.0, 0.02, 0.3, 1.0)
    ]
    logits_RN = torch.randn(len(samplings), 300, dtype=torch.float64) * 3
    values_RK, ids_RK = logits_RN.sort(dim=1, descending=True)
    rows = [SamplingRow(sampling, seed, 0) for sampling in samplings]
    weights_RK = kept_weights(values_RK, DrawValues.of(rows, 300, torch.device("cpu")))
    for number, sampling in enumerate(samplings):
        scores = logits_RN[number : number + 1] / sampling.temperature
        if sampling.top_k:
            scores = TopKLogitsWarper(sampling.top_k)(None, scores)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(None, scores)
        if sampling.min_p:
            scores = MinPLogitsWarper(sampling.min_p)(None, scores)
        expected = scores.softmax(1)[0]
        ours = torch.zeros(300, dtype=torch.float64)
        ours[ids_RK[number]] = weights_RK[number] / weights_RK[number].sum()
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


def test_equals_of_the_kth_stay() -> None:
    row = SamplingRow(EffectiveSampling(top_k=2), 0, 0)
    values_1K = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    weights_1K = kept_weights(values_1K, DrawValues.of([row], 5, torch.device("cpu")))
    assert (weights_1K > 0).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize(
    ("number", "place"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.74, 3), (0.76, 4), (1 - 2**-53, 4)]
)
def test_pick_inverts_the_running_sum_and_never_takes_a_weight_of_zero(
    number: float, place: int
) -> None:
    weights_1K = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    assert pick(weights_1K, torch.tensor([[number]], dtype=torch.float64)).tolist() == [place]
