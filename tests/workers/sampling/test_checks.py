from __future__ import annotations

import pytest

from inference_pio.workers.sampling.checks import check_token_ids
from inference_pio.workers.types import RequestError, SamplingParams


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(logit_bias={100: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParams(stop_token_ids=(3, 100)), "stop_token_ids"),
        (SamplingParams(allowed_token_ids=(100,)), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=()), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=("3",)), "allowed_token_ids"),  # type: ignore[arg-type]
        (SamplingParams(stop_token_ids=(True,)), "stop_token_ids"),
        (SamplingParams(bad_words=((1, 2), (3, 2**70))), "bad_words"),
        (SamplingParams(bad_words=((),)), "bad_words"),
    ],
)
def test_ids_that_are_no_token_are_refused_by_field(params: SamplingParams, field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        check_token_ids(params, 100)
    assert caught.value.param == field


def test_every_token_of_the_model_is_taken() -> None:
    check_token_ids(
        SamplingParams(
            logit_bias={0: 1.0, 99: -1.0},
            stop_token_ids=(0, 99),
            allowed_token_ids=tuple(range(100)),
            bad_words=((0,), (99, 98)),
        ),
        100,
    )
