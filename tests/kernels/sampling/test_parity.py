"""Every implementation gives the tokens, logits and log-sums of the definition, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_pio.kernels.native.library import LibraryError, cpu_flags, load, usable
from inference_pio.kernels.native.sampling import NativeSampling
from inference_pio.kernels.sampling.api import Draw, EditKind, Fault, SamplingKernels
from inference_pio.kernels.sampling.reference import ReferenceSampling
from inference_pio.kernels.sampling.torch_sampling import TorchSampling

from .samples import KINDS, draws, hard_rows, random_edit

REFERENCE = ReferenceSampling()
THREADS = (1, 3)
many = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.integers(1, 700) | st.sampled_from([128, 256, 5000, 9003])


@pytest.fixture(params=["torch", *usable(cpu_flags())])
def kernels(request: pytest.FixtureRequest) -> list[SamplingKernels]:
    """One implementation, on each number of threads."""
    if request.param == "torch":
        return [TorchSampling()]
    try:
        library = load(request.param)
    except LibraryError as error:
        pytest.skip(str(error))
    return [NativeSampling(library, library.team(count)) for count in THREADS]


@many
@given(st.lists(st.tuples(st.sampled_from(KINDS), draws), min_size=1, max_size=5), sizes, st.data())
def test_tokens(
    kernels: list[SamplingKernels],
    rows: list[tuple[str, Draw]],
    num_tokens: int,
    data: st.DataObject,
) -> None:
    seed, padding = data.draw(st.integers(0, 10**6)), data.draw(st.integers(0, 40))
    logits_RV = hard_rows([kind for kind, _ in rows], num_tokens, padding, seed)
    row_draws = [draw for _, draw in rows]
    expected = REFERENCE.sample(logits_RV.clone(), num_tokens, row_draws, [])
    for one in kernels:
        assert torch.equal(one.sample(logits_RV.clone(), num_tokens, row_draws, []), expected)


@many
@given(st.lists(draws, min_size=1, max_size=4), sizes, st.integers(0, 10**6), st.data())
def test_edits(
    kernels: list[SamplingKernels],
    row_draws: list[Draw],
    num_tokens: int,
    seed: int,
    data: st.DataObject,
) -> None:
    kinds = data.draw(st.lists(st.sampled_from(EditKind), min_size=1, max_size=5))
    edits = [
        random_edit(kind, len(row_draws), num_tokens, seed + number)
        for number, kind in enumerate(kinds)
    ]
    logits_RV = hard_rows(["coarse"] * len(row_draws), num_tokens, 3, seed)
    edited = logits_RV.clone()
    expected = REFERENCE.sample(edited, num_tokens, row_draws, edits)
    for one in kernels:
        ours = logits_RV.clone()
        assert torch.equal(one.sample(ours, num_tokens, row_draws, edits), expected)
        torch.testing.assert_close(ours, edited, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("draw", [Draw(), Draw.of(1.0, 0, 1.0, 0.0, 0.5), Draw.of(1, 5, 0.9, 0, 0)])
def test_faults_are_of_their_rows(kernels: list[SamplingKernels], draw: Draw) -> None:
    logits_RV = hard_rows(["normal"] * 6, 1000, 5, seed=3)
    logits_RV[1, 999] = math.nan
    logits_RV[2, :1000] = -math.inf
    logits_RV[3, 130] = math.inf
    logits_RV[4, 128] = math.inf
    logits_RV[4, 5] = math.nan
    fine = REFERENCE.sample(logits_RV.clone(), 1000, [draw] * 6, [])
    assert fine[1:5].tolist() == [Fault.NAN, Fault.NO_TOKEN, Fault.INFINITY, Fault.NAN]
    for one in kernels:
        assert torch.equal(one.sample(logits_RV.clone(), 1000, [draw] * 6, []), fine)
        for row in range(6):
            alone = one.sample(logits_RV[row : row + 1].clone(), 1000, [draw], [])
            assert torch.equal(alone, fine[row : row + 1])


@many
@given(st.lists(st.sampled_from(KINDS), max_size=4), sizes, st.integers(0, 60), st.integers(0, 99))
def test_logprobs(
    kernels: list[SamplingKernels], kinds: list[str], num_tokens: int, count: int, seed: int
) -> None:
    if not kinds:
        logits_RV = torch.zeros(0, num_tokens + 1)
    else:
        logits_RV = hard_rows(kinds, num_tokens, 5, seed)
    sums = REFERENCE.log_sums(logits_RV, num_tokens)
    if kinds:
        true = logits_RV[:, :num_tokens].double().logsumexp(1)
        torch.testing.assert_close(sums, true, rtol=1e-9, atol=1e-7)
    values, ids = REFERENCE.top_tokens(logits_RV, num_tokens, count)
    for one in kernels:
        assert torch.equal(one.log_sums(logits_RV, num_tokens), sums)
        our_values, our_ids = one.top_tokens(logits_RV, num_tokens, count)
        assert torch.equal(our_values, values)
        assert torch.equal(our_ids, ids)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logprobs_of_rows_at_fault(kernels: list[SamplingKernels], bad: float) -> None:
    logits_RV = hard_rows(["normal", "normal"], 700, 5, seed=1)
    logits_RV[1, 699] = bad
    for one in kernels:
        sums = one.log_sums(logits_RV, 700)
        assert sums.isnan().tolist() == [False, True]
        values, ids = one.top_tokens(logits_RV, 700, 3)
        assert torch.equal(ids[0], REFERENCE.top_tokens(logits_RV, 700, 3)[1][0])
        assert torch.equal(values[0], logits_RV[0, ids[0]])
        assert bool(((ids[1] >= 0) & (ids[1] < 700)).all())
