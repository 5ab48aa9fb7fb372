"""Triton's sampling gives the tokens and log-probabilities of the definition, bit for bit."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.kernels.sampling.api import Draw, Edit, EditKind, Fault
from inference_pio.kernels.sampling.reference import ReferenceSampling
from inference_pio.kernels.triton import sampling
from inference_pio.kernels.triton.sampling import FEW, TritonSampling, chunk_size

from ..sampling.samples import KINDS, draws, hard_rows, random_edit

REFERENCE = ReferenceSampling()
TRITON = TritonSampling()
LISTS = [(16, 8), (sampling.ROOM, sampling.BINS)]
"""Room of a row's list, and bins: with little room every way to a token is taken."""
interpreted = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.sampled_from([1, 2, 63, 64, 65, 130, 200])


@pytest.fixture(params=LISTS, ids=str)
def lists(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    room, bins = request.param
    monkeypatch.setattr(sampling, "ROOM", room)
    monkeypatch.setattr(sampling, "BINS", bins)


def check(
    logits_RV: Tensor,
    num_tokens: int,
    row_draws: list[Draw],
    device: torch.device,
    edits: list[Edit] | None = None,
) -> None:
    mine, theirs = logits_RV.clone().to(device), logits_RV.clone()
    expected = REFERENCE.sample(theirs, num_tokens, row_draws, edits or [])
    got = TRITON.sample(mine, num_tokens, row_draws, edits or [])
    assert got.tolist() == expected.tolist()
    torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


@interpreted
@given(
    rows=st.lists(st.tuples(st.sampled_from(KINDS), draws), min_size=1, max_size=3),
    num_tokens=sizes,
    seed=st.integers(0, 10**6),
)
def test_tokens(
    lists: None,
    device: torch.device,
    rows: list[tuple[str, Draw]],
    num_tokens: int,
    seed: int,
) -> None:
    logits_RV = hard_rows([kind for kind, _ in rows], num_tokens, 3, seed)
    check(logits_RV, num_tokens, [draw for _, draw in rows], device)


WAYS = [
    Draw(),
    Draw.of(0.6, 20, 0.95, 0.0, 0.77),
    Draw.of(1.0, 0, 1.0, 0.0, 0.5),
    Draw.of(0.7, 0, 0.9, 0.0, 0.99),
    Draw.of(3.0, 0, 1.0, 0.01, 0.3),
    Draw.of(1.0, 300, 0.8, 1e-12, 1 - 2**-53),
    Draw.of(100.0, 600, 1.0, 0.0, 0.5),
    Draw.of(1.0, 10**12, 1 - 2**-53, 0.0, 0.0),
]
"""Every combination of launches."""


@pytest.mark.parametrize("draw", WAYS)
def test_every_way_to_a_token(lists: None, draw: Draw, device: torch.device) -> None:
    rows = hard_rows(["coarse", "normal"], 130, 5, seed=5)
    check(rows, 130, [draw] * 2, device)


def test_mixed_rows_are_drawn_as_alone(device: torch.device) -> None:
    rows = hard_rows(["normal"] * len(WAYS), 700, 3, seed=1).to(device)
    together = TRITON.sample(rows.clone(), 700, WAYS, [])
    assert together.tolist() == REFERENCE.sample(rows.cpu(), 700, WAYS, []).tolist()
    for number in (1, 3, 5):
        one = TRITON.sample(rows[number : number + 1].clone(), 700, [WAYS[number]], [])
        assert one.tolist() == [together[number]]


def test_rows_of_more_equals_than_there_is_room_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small top-k leaves them all, and nobody looked for bins."""
    monkeypatch.setattr(sampling, "ROOM", 64)
    size = 110
    row_draws = [Draw.of(1.0, 5, 1.0, 0.0, 0.9), Draw.of(1.0, 5, 0.3, 0.0, 0.5)]
    assert all(draw.top_k <= FEW for draw in row_draws)
    rows = torch.zeros(2, size)
    rows[1, ::3] = 0.5
    check(rows, size, row_draws, device)


def test_tokens_and_logprobs_stay_on_the_device(device: torch.device) -> None:
    rows = hard_rows(["normal", "coarse", "equal"], 300, 3, seed=4)
    row_draws = [Draw(), Draw.of(0.6, 0, 0.95, 0.0, 0.4), Draw.of(1.0, 100, 1.0, 0.0, 0.9)]
    edits = [random_edit(EditKind.ADD, 3, 300, seed=1)]
    tops = [4, None, 0]
    launched = TRITON.launch(rows.clone().to(device), 300, row_draws, edits, tops)
    there = launched.on_device_R
    assert there is not None
    assert there.device.type == device.type
    expected = REFERENCE.launch(rows.clone(), 300, row_draws, edits, tops)
    assert launched.read() == there.tolist() == expected.read()
    logprobs = launched.read_logprobs()
    assert logprobs == expected.read_logprobs()
    assert [None if one is None else len(one.top) for one in logprobs] == tops


@interpreted
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    num_tokens=sizes,
    count=st.sampled_from([0, 1, 5, 20]),
    seed=st.integers(0, 99),
)
def test_logprobs(
    lists: None, device: torch.device, kinds: list[str], num_tokens: int, count: int, seed: int
) -> None:
    logits_RV = hard_rows(kinds, num_tokens, 5, seed)
    mine = logits_RV.to(device)
    assert torch.equal(TRITON.log_sums(mine, num_tokens), REFERENCE.log_sums(logits_RV, num_tokens))
    values, ids = REFERENCE.top_tokens(logits_RV, num_tokens, count)
    our_values, our_ids = TRITON.top_tokens(mine, num_tokens, count)
    assert torch.equal(our_values.cpu(), values)
    assert torch.equal(our_ids.cpu(), ids)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logprobs_of_rows_at_fault(device: torch.device, bad: float) -> None:
    rows = hard_rows(["normal", "normal"], 300, 5, seed=1)
    rows[1, 299] = bad
    assert TRITON.log_sums(rows.to(device), 300).isnan().tolist() == [False, True]
    ids = TRITON.top_tokens(rows.to(device), 300, 3)[1].cpu()
    assert torch.equal(ids[0], REFERENCE.top_tokens(rows, 300, 3)[1][0])
    assert bool(((ids[1] >= 0) & (ids[1] < 300)).all())


@pytest.mark.parametrize("kind", EditKind)
def test_edits(kind: EditKind, device: torch.device) -> None:
    rows = hard_rows(["coarse"] * 2, 700, 3, seed=int(kind))
    edits = [random_edit(kind, 2, 700, seed=9 + number) for number in range(2)]
    check(rows, 700, [Draw(), Draw.of(0.6, 20, 0.95, 0.0, 0.4)], device, edits)


def test_faults_are_of_their_rows(device: torch.device) -> None:
    rows = hard_rows(["normal"] * 6, 700, 5, seed=3)
    size = 700
    rows[1, size - 1] = math.nan
    rows[2, :size] = -math.inf
    rows[3, 130] = math.inf
    rows[4, 128] = math.inf
    rows[4, 5] = math.nan
    expected = [Fault.NAN, Fault.NO_TOKEN, Fault.INFINITY, Fault.NAN]
    wide = Draw.of(1.0, 0, 0.9, 0.0, 0.4)
    row_draws = [Draw(), wide, Draw.of(1.0, 5, 0.9, 0.0, 0.4), Draw.of(1.0, 0, 1.0, 0.0, 0.4)]
    row_draws += [wide, Draw()]
    got = TRITON.sample(rows.clone().to(device), size, row_draws, [])
    assert got[1:5].tolist() == expected
    banned = random_edit(EditKind.BAN, 6, size, seed=1)
    check(rows, size, [Draw()] * 6, device, [banned])


def test_no_rows_are_no_tokens(device: torch.device) -> None:
    assert TRITON.sample(torch.empty(0, 9, device=device), 9, [], []).tolist() == []
    assert TRITON.log_sums(torch.empty(0, 9, device=device), 9).tolist() == []


def test_there_are_more_chunks_than_a_small_top_k() -> None:
    for num_tokens in (151_669, 65_536, 32_000, 200_019):
        assert num_tokens / chunk_size(num_tokens) > 1.9 * FEW
    assert chunk_size(1) == 64


NUM_TOKENS = 151_669


def large_rows(rng: random.Random, count: int) -> tuple[Tensor, list[Draw]]:
    """Rows over Qwen3's vocabulary, drawn in every way."""
    rows = hard_rows([rng.choice(KINDS) for _ in range(count)], NUM_TOKENS, 267, seed=0)
    return rows, [rng.choice(WAYS) for _ in range(count)]


@pytest.mark.slow
def test_the_vocabulary_of_qwen3(device: torch.device) -> None:
    rows = hard_rows(["normal", "coarse"], NUM_TOKENS, 267, seed=0)
    for draw in WAYS[1:6]:
        check(rows, NUM_TOKENS, [draw] * 2, device)
    ids = REFERENCE.top_tokens(rows, NUM_TOKENS, 20)[1]
    assert torch.equal(TRITON.top_tokens(rows.to(device), NUM_TOKENS, 20)[1].cpu(), ids)
    assert torch.equal(
        TRITON.log_sums(rows.to(device), NUM_TOKENS), REFERENCE.log_sums(rows, NUM_TOKENS)
    )


@pytest.mark.gpu
def test_a_large_vocabulary() -> None:
    rows, row_draws = large_rows(random.Random(0), 64)
    check(rows, NUM_TOKENS, row_draws, torch.device("cuda"))
