"""Triton's sampling gives the tokens of the definition, bit for bit."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from inference_pio.kernels.sampling.api import Draw, Edit, EditKind, Fault
from inference_pio.kernels.sampling.reference import ReferenceSampling
from inference_pio.kernels.sampling.torch_sampling import TorchSampling
from inference_pio.kernels.triton import sampling
from inference_pio.kernels.triton.sampling import MAX_TOP_K, ROOM, TritonSampling, chunk_size

from ..sampling.samples import KINDS, hard_rows, random_edit

REFERENCE = ReferenceSampling()
UNIFORMS = [0.0, 2**-53, 0.3, 0.77, 1 - 2**-53]


def random_draw(rng: random.Random) -> Draw:
    return Draw.of(
        temperature=rng.choice([0.01, 0.6, 1.0, 3.0, 100.0]),
        top_k=rng.choice([1, 2, 20, 50, MAX_TOP_K]),
        top_p=rng.choice([1e-9, 0.1, 0.8, 0.95, 1 - 2**-53, 1.0]),
        min_p=rng.choice([0.0, 0.0, 1e-12, 0.2, 1.0]),
        uniform=rng.choice(UNIFORMS),
    )


def check(
    logits_RV: Tensor,
    num_tokens: int,
    draws: list[Draw],
    device: torch.device,
    edits: list[Edit] | None = None,
) -> None:
    mine, theirs = logits_RV.clone().to(device), logits_RV.clone()
    expected = REFERENCE.sample(theirs, num_tokens, draws, edits or [])
    got = TritonSampling().sample(mine, num_tokens, draws, edits or [])
    assert got.tolist() == expected.tolist()
    torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


class OnlyHere(TorchSampling):
    """Refuses what the kernels should have drawn themselves."""

    def sample(self, *operands: object) -> Tensor:
        raise AssertionError("no row is left to torch")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchSampling, "sample", OnlyHere.sample)


@pytest.mark.parametrize(
    ("num_tokens", "kinds"),
    [(1, KINDS[:1]), (300, KINDS[::3]), (301, KINDS[1::3]), (1500, KINDS[2::3])],
)
def test_tokens(num_tokens: int, kinds: tuple[str, ...], device: torch.device) -> None:
    rng = random.Random(num_tokens)
    draws = [random_draw(rng) for _ in kinds]
    check(hard_rows(list(kinds), num_tokens, 3, seed=num_tokens), num_tokens, draws, device)


def test_the_kernels_draw_ordinary_rows_themselves(alone: None, device: torch.device) -> None:
    rows = hard_rows(["normal"] * 3, 1600, 5, seed=2)
    draws = [Draw.of(0.6, 20, 0.95, 0.0, uniform) for uniform in (0.1, 0.4, 0.99)]
    draws[0] = Draw()
    check(rows, 1600, draws, device)


def test_rows_that_the_kernels_leave_are_drawn_by_torch(device: torch.device) -> None:
    rows = hard_rows(["normal", "normal", "normal", "equal", "coarse"], 1000, 0, seed=4)
    draws = [
        Draw.of(1.0, 0, 1.0, 0.0, 0.5),
        Draw.of(1.0, 0, 0.9, 0.0, 0.5),
        Draw.of(1.0, MAX_TOP_K + 1, 1.0, 0.0, 0.5),
        Draw.of(1.0, 5, 1.0, 0.0, 0.9),  # every token is the fifth best
        Draw.of(1.0, 10**12, 1.0, 0.0, 0.9),
    ]
    assert rows[3].unique().numel() == 1
    assert ROOM < 1000
    check(rows, 1000, draws, device)


def test_tokens_stay_on_the_device_for_a_step_behind(device: torch.device) -> None:
    rows = hard_rows(["normal", "normal", "equal"], 1000, 0, seed=4).to(device)
    draws = [Draw(), Draw.of(0.6, 4, 0.95, 0.0, 0.4), Draw.of(1.0, 5, 1.0, 0.0, 0.9)]
    launched = TritonSampling().launch(rows.clone(), 1000, draws, [])
    there = launched.on_device_R
    assert there is not None
    tokens = launched.read()
    assert tokens == REFERENCE.sample(rows.cpu(), 1000, draws, []).tolist()
    assert launched.redrawn == {2}, "there is no room for a thousand equals"
    assert there.tolist() == [*tokens[:2], sampling.UNDECIDED]


def test_rows_that_the_host_draws_are_not_promised(device: torch.device) -> None:
    rows = hard_rows(["normal", "normal"], 300, 0, seed=4).to(device)
    for draw in (Draw.of(1.0, 0, 0.9, 0.0, 0.5), Draw.of(1.0, MAX_TOP_K + 1, 1.0, 0.0, 0.5)):
        launched = TritonSampling().launch(rows.clone(), 300, [Draw(), draw], [])
        assert launched.on_device_R is None
        assert launched.read() == REFERENCE.sample(rows.cpu(), 300, [Draw(), draw], []).tolist()


def test_a_row_does_not_depend_on_its_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    rows = hard_rows(["normal", "coarse", "wide"], 1000, 3, seed=1).to(device)
    draws = [random_draw(rng) for _ in rows]
    together = TritonSampling().sample(rows.clone(), 1000, draws, [])
    for number, draw in enumerate(draws):
        one = TritonSampling().sample(rows[number : number + 1].clone(), 1000, [draw], [])
        assert one.tolist() == [together[number]]


@pytest.mark.parametrize("kind", EditKind)
def test_edits(kind: EditKind, device: torch.device) -> None:
    rng = random.Random(int(kind))
    rows = hard_rows(["coarse"] * 2, 700, 3, seed=int(kind))
    edits = [random_edit(kind, 2, 700, seed=9 + number) for number in range(2)]
    check(rows, 700, [Draw(), random_draw(rng)], device, edits)


def test_faults_are_of_their_rows(device: torch.device) -> None:
    rows = hard_rows(["normal"] * 6, 700, 5, seed=3)
    size = 700
    rows[1, size - 1] = math.nan
    rows[2, :size] = -math.inf
    rows[3, 130] = math.inf
    rows[4, 128] = math.inf
    rows[4, 5] = math.nan
    expected = [Fault.NAN, Fault.NO_TOKEN, Fault.INFINITY, Fault.NAN]
    draws = [Draw(), *[Draw.of(1.0, 5, 0.9, 0.0, 0.4)] * 3, Draw(), Draw()]
    got = TritonSampling().sample(rows.clone().to(device), size, draws, [])
    assert got[1:5].tolist() == expected
    banned = random_edit(EditKind.BAN, 6, size, seed=1)
    check(rows, size, [Draw()] * 6, device, [banned])


def test_no_rows_are_no_tokens(device: torch.device) -> None:
    assert TritonSampling().sample(torch.empty(0, 9, device=device), 9, [], []).tolist() == []


def test_there_are_more_chunks_than_the_largest_top_k() -> None:
    for num_tokens in (151_669, 65_536, 32_000, 200_019):
        assert num_tokens / chunk_size(num_tokens) > 1.9 * MAX_TOP_K
    assert chunk_size(1) == 64


def test_undecided_is_no_fault() -> None:
    assert sampling.UNDECIDED not in set(Fault)


@pytest.mark.gpu
def test_a_large_vocabulary() -> None:
    rng = random.Random(0)
    draws = [random_draw(rng) for _ in range(40)]
    rows = hard_rows([rng.choice(KINDS) for _ in draws], 151_669, 267, seed=0)
    check(rows, 151_669, draws, torch.device("cuda"))
