from __future__ import annotations

import pytest

from inference_pio.deployments.config import SloConfig
from inference_pio.deployments.slo import SloWatch

ALL = SloConfig(ttft_s=1.0, first_answer_s=5.0, inter_token_s=0.1)


def watched(
    first: float | None = None,
    answer: float | None = None,
    pauses: tuple[tuple[float, int], ...] = (),
) -> SloWatch:
    watch = SloWatch()
    if first is not None:
        watch.first_token(first)
    if answer is not None:
        watch.first_answer(answer)
    for pause, count in pauses:
        watch.tokens(pause, count)
    return watch


@pytest.mark.parametrize(
    ("watch", "verdicts"),
    [
        (
            watched(1.0, 5.0, ((0.3, 2), (0.1, 2))),
            {"ttft": True, "first_answer": True, "inter_token": True},
        ),
        (
            watched(1.1, 5.1, ((0.3, 2), (0.2, 2))),
            {"ttft": False, "first_answer": False, "inter_token": False},
        ),
        (watched(0.5), {"ttft": True}),  # one token, no answer: nothing else to judge
        (watched(), {}),
    ],
)
def test_a_finished_request_is_judged_by_what_came(
    watch: SloWatch, verdicts: dict[str, bool]
) -> None:
    assert dict(watch.finished(ALL)) == verdicts


def test_only_what_is_promised_is_judged() -> None:
    watch = watched(0.5, 0.5, ((0.1, 1),))
    assert watch.finished(SloConfig()) == []
    assert watch.failed(SloConfig()) == []
    assert watch.finished(SloConfig(ttft_s=1)) == [("ttft", True)]


def test_a_failed_request_missed_what_it_had_not_kept() -> None:
    assert dict(watched().failed(ALL)) == {
        "ttft": False,
        "first_answer": False,
        "inter_token": False,
    }
    begun = watched(0.5, None, ((0.01, 1),))
    assert dict(begun.failed(ALL)) == {"ttft": True, "first_answer": False, "inter_token": False}
