"""Where a prompt is prefilled: the estimate against a walk through the pipeline, the decision
against brute force over a grid."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.kv.remote_prefill import (
    PrefillInputs,
    RateMeter,
    decide,
    local_seconds,
    remote_seconds,
)

INPUTS = PrefillInputs(
    when="auto",
    has_peer=True,
    num_tokens=1000,
    num_missing_here=1000,
    num_missing_there=1000,
    num_queued_here=0,
    num_queued_there=0,
    tokens_per_s_here=100.0,
    tokens_per_s_there=100.0,
    bandwidth=1e6,
    bytes_per_token=1000,
    chunk_tokens=250,
    num_imports=0,
)

GRID: dict[str, tuple[float | int, ...]] = {
    "num_missing_here": (1, 250, 251, 1000),
    "num_missing_there": (0, 1, 500, 1000),
    "num_queued_here": (0, 300, 5000),
    "num_queued_there": (0, 300, 5000),
    "tokens_per_s_here": (10.0, 100.0, 1000.0),
    "tokens_per_s_there": (10.0, 100.0, 1000.0),
    "bandwidth": (1e4, 1e5, 1e8),
    "bytes_per_token": (1, 1000),
    "chunk_tokens": (64, 2000),
}
FAVOURS_REMOTE = {
    "num_missing_there": -1,
    "num_queued_here": 1,
    "num_queued_there": -1,
    "tokens_per_s_here": -1,
    "tokens_per_s_there": 1,
    "bandwidth": 1,
    "bytes_per_token": -1,
    "chunk_tokens": -1,
}
"""Whether more of it may only turn an answer towards remote, or only away from it."""


def grid() -> list[PrefillInputs]:
    """Three thousand points of the grid."""
    points = list(itertools.product(*GRID.values()))
    drawn = random.Random(0).sample(points, 3000)
    return [replace(INPUTS, **dict(zip(GRID, point, strict=True))) for point in drawn]


def pipeline_seconds(inputs: PrefillInputs) -> float:
    """Chunks are computed one by one; each is sent when it is there and the one before is."""
    rate, bandwidth = inputs.tokens_per_s_there, inputs.bandwidth
    assert rate is not None
    assert bandwidth is not None
    computed = inputs.num_queued_there / rate
    sent, left = 0.0, inputs.num_missing_here
    while left:
        chunk = min(left, inputs.chunk_tokens)
        computed += chunk / rate
        sent = max(sent, computed) + chunk * inputs.bytes_per_token / bandwidth
        left -= chunk
    return sent


def test_the_faster_place_is_chosen_everywhere() -> None:
    answers = set()
    for inputs in grid():
        decision = decide(inputs)
        assert decision.local_s == local_seconds(inputs)
        assert decision.remote_s == remote_seconds(inputs)
        assert decision.remote == (decision.remote_s < decision.local_s)
        assert decision.reason == "faster"
        answers.add(decision.remote)
    assert answers == {True, False}


@pytest.mark.parametrize("name", FAVOURS_REMOTE)
def test_more_of_one_thing_turns_the_answer_one_way_only(name: str) -> None:
    turned = 0
    for inputs in grid():
        answers = [decide(replace(inputs, **{name: value})).remote for value in GRID[name]]
        towards = sorted(answers, reverse=FAVOURS_REMOTE[name] < 0)
        assert answers == towards, (name, inputs)
        turned += len(set(answers)) > 1
    assert turned, f"no answer of the grid depends on {name}"


@given(st.data())
def test_estimates_grow_with_every_token(data: st.DataObject) -> None:
    """Also across the border of a chunk."""
    inputs = replace(
        INPUTS,
        num_missing_here=data.draw(st.integers(1, 600)),
        num_missing_there=data.draw(st.integers(0, 600)),
        chunk_tokens=data.draw(st.integers(1, 300)),
        bandwidth=data.draw(st.sampled_from([1e3, 1e5, 1e7])),
    )
    for name in ("num_missing_here", "num_missing_there", "num_queued_there", "num_queued_here"):
        more = replace(inputs, **{name: getattr(inputs, name) + 1})
        assert remote_seconds(more) >= remote_seconds(inputs), name
        assert local_seconds(more) >= local_seconds(inputs), name


@given(
    chunks=st.integers(1, 12),
    chunk=st.integers(1, 300),
    rest=st.integers(0, 299),
    queued=st.integers(0, 500),
    bandwidth=st.sampled_from([1e3, 3e4, 1e5, 3e5, 1e7]),
)
def test_the_remote_estimate_is_that_of_the_pipeline(
    chunks: int, chunk: int, rest: int, queued: int, bandwidth: float
) -> None:
    """Exact for whole chunks; for others never too low, and by less than a chunk too high."""
    tokens = chunks * chunk
    whole = replace(
        INPUTS,
        num_tokens=tokens,
        num_missing_here=tokens,
        num_missing_there=tokens,
        num_queued_there=queued,
        chunk_tokens=chunk,
        bandwidth=bandwidth,
    )
    assert remote_seconds(whole) == pytest.approx(pipeline_seconds(whole))
    tokens += rest % chunk
    other = replace(whole, num_tokens=tokens, num_missing_here=tokens, num_missing_there=tokens)
    estimate, walked = remote_seconds(other), pipeline_seconds(other)
    one_chunk = chunk * (1 / 100.0 + 1000 / bandwidth)
    assert walked - 1e-9 <= estimate <= walked + one_chunk + 1e-9


def test_without_overlap_computing_and_sending_add_up() -> None:
    inputs = replace(INPUTS, chunk_tokens=1000)
    assert remote_seconds(inputs) == pytest.approx(10.0 + 1.0)
    assert remote_seconds(INPUTS) == pytest.approx(10.0 + 0.25)


def test_hits_over_there_need_no_time_but_travel() -> None:
    inputs = replace(INPUTS, num_missing_there=0)
    assert remote_seconds(inputs) == pytest.approx(1.0)


def test_unknown_hits_over_there_count_as_none() -> None:
    inputs = replace(INPUTS, num_missing_here=100, num_missing_there=None)
    assert remote_seconds(inputs) == remote_seconds(replace(inputs, num_missing_there=1000))


# --- what is decided without an estimate ---------------------------------------------------------


@pytest.mark.parametrize("inputs", grid()[:200])
def test_always_and_never_are_obeyed(inputs: PrefillInputs) -> None:
    always, never = decide(replace(inputs, when="always")), decide(replace(inputs, when="never"))
    assert (always.remote, always.reason) == (True, "forced")
    assert (never.remote, never.reason) == (False, "forced")


@pytest.mark.parametrize("when", ["auto", "always", "never"])
def test_nothing_to_prefill_stays_here(when: str) -> None:
    decision = decide(replace(INPUTS, when=when, num_missing_here=0))  # type: ignore[arg-type]
    assert (decision.remote, decision.reason) == (False, "nothing_missing")


@pytest.mark.parametrize("when", ["auto", "always"])
def test_without_a_peer_it_stays_here(when: str) -> None:
    decision = decide(replace(INPUTS, when=when, has_peer=False))  # type: ignore[arg-type]
    assert (decision.remote, decision.reason) == (False, "no_peer")


@pytest.mark.parametrize(
    "unknown",
    [
        {"tokens_per_s_there": None},
        {"bandwidth": None},
        {"tokens_per_s_there": None, "bandwidth": None, "tokens_per_s_here": None},
    ],
)
def test_one_prompt_at_a_time_measures_an_unknown_path(unknown: dict[str, None]) -> None:
    first = decide(replace(INPUTS, **unknown))
    assert (first.remote, first.reason) == (True, "probe")
    assert first.remote_s == inf
    second = decide(replace(INPUTS, **unknown, num_imports=1))
    assert (second.remote, second.reason) == (False, "unmeasured")


def test_a_rate_that_is_missing_only_here_is_measured_here() -> None:
    decision = decide(replace(INPUTS, tokens_per_s_here=None))
    assert (decision.remote, decision.reason) == (False, "unmeasured")
    assert decision.local_s == inf


def test_a_path_on_which_nothing_ever_came_is_not_taken() -> None:
    assert not decide(replace(INPUTS, bandwidth=0.0)).remote
    assert not decide(replace(INPUTS, tokens_per_s_there=0.0)).remote
    assert not decide(replace(INPUTS, bandwidth=0.0, tokens_per_s_here=0.0)).remote


# --- the meter ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.001, 10), st.floats(0.001, 30)), min_size=1)
)
def test_a_rate_is_the_fading_sum_of_amounts_over_that_of_times(
    measured: list[tuple[float, float, float]],
) -> None:
    meter, now, taken = RateMeter(half_life_s=5.0), 0.0, []
    for amount, seconds, pause in measured:
        now += pause
        meter.add(amount, seconds, now)
        taken.append((amount, seconds, now))
    amount, seconds = (
        sum(value * 0.5 ** ((now - at) / 5.0) for *values, at in taken for value in [values[i]])
        for i in (0, 1)
    )
    assert meter.rate(now) == pytest.approx(amount / seconds)
    assert meter.rate(now + 1000) == meter.rate(now), "idle time lowers no rate"


def test_a_meter_follows_a_change_within_some_half_lives() -> None:
    meter = RateMeter(half_life_s=2.0)
    for second in range(50):
        meter.add(100.0, 1.0, float(second))
    for second in range(50, 60):
        meter.add(900.0, 1.0, float(second))
    assert 850.0 < (meter.rate(60.0) or 0.0) < 900.0


def test_without_a_measurement_there_is_no_rate() -> None:
    meter = RateMeter(half_life_s=0.5)
    assert meter.rate(1e9) is None
    meter.add(3.0, 2.0, 1e9)
    assert meter.rate(1e12) == 1.5
    assert RateMeter(half_life_s=0.5, forget_s=0.5).rate(0.0) is None


def test_an_old_measurement_is_forgotten() -> None:
    meter = RateMeter(half_life_s=2.0, forget_s=30.0)
    assert meter.rate(0.0) is None
    meter.add(0.0, 5.0, 0.0)  # a failure
    assert meter.rate(30.0) == 0.0
    assert meter.rate(30.1) is None
    meter.add(50.0, 1.0, 40.0)
    assert meter.rate(40.0) == 50.0, "nothing of the failure is left"


@pytest.mark.parametrize(("amount", "seconds"), [(-1.0, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_what_is_no_measurement_is_refused(amount: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="a rate is measured over time"):
        RateMeter(half_life_s=1.0).add(amount, seconds, 0.0)


@pytest.mark.parametrize("times", [{"half_life_s": 0.0}, {"half_life_s": 1.0, "forget_s": 0.0}])
def test_times_of_a_meter_are_positive(times: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="times are positive"):
        RateMeter(**times)
