"""``bench kernels``: every operation runs on memory of its own, and counts what it has to do."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch

from inference_pio.benchmarks import floor, kernels, kernels_attention, kernels_linear, kernels_rows
from inference_pio.benchmarks.floor import FloorProbe, Work
from inference_pio.benchmarks.kernels import Candidate, Case, Setup
from inference_pio.benchmarks.kernels_attention import Batch, keys_seen
from inference_pio.kernels.dispatch import select_kernels
from inference_pio.kernels.pattern import AttentionPattern
from inference_pio.workers.config import AttentionConfig
from inference_pio.workers.loading import attention_pattern
from inference_pio.workers.model.config import ModelConfig
from inference_pio.workers.model.random_checkpoint import CONFIGS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which everything runs in a moment; what is measured then means nothing."""
    monkeypatch.setattr(kernels, "WORKING_SET", 2**21)
    monkeypatch.setattr(kernels, "SECONDS", 1e-3)
    monkeypatch.setitem(floor.READ_BYTES, "cpu", 2**20)
    monkeypatch.setitem(floor.MATRIX, "cpu", 64)


@pytest.fixture
def setup(embedded_dir: Path) -> Setup:
    shapes = ModelConfig.from_folder(embedded_dir)
    return Setup(select_kernels(CPU, shapes.dtype), shapes, shapes.dtype, CPU)


def measured(setup: Setup, *cases: Case) -> dict[tuple[str, str], kernels.Measured]:
    probe = FloorProbe(setup.device, setup.dtype)
    found = kernels.measure(cases, probe, setup.device, 2, lambda _: None)
    return {(one.case, one.candidate): one for one in found}


@pytest.mark.parametrize("choice", ["", "torch"])
def test_every_operation_becomes_rows(
    choice: str, embedded_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", choice)
    shapes = ModelConfig.from_folder(embedded_dir)
    check_every_operation(Setup(select_kernels(CPU, shapes.dtype), shapes, shapes.dtype, CPU))


@pytest.mark.gpu
def test_every_operation_on_a_device(embedded_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(floor.READ_BYTES, "cuda", 2**20)
    monkeypatch.setitem(floor.MATRIX, "cuda", 64)
    shapes = ModelConfig.from_folder(embedded_dir)
    setup = Setup.here(shapes, shapes.dtype)
    assert setup.device.type == "cuda"
    check_every_operation(setup)


def check_every_operation(setup: Setup) -> None:
    notes: list[str] = []
    batches = (
        Batch("decode", 2, 70),
        Batch("decode", 1, 2048, patterns=True),
        Batch("prefill", 1, 100),
        Batch("decode", 1, 5000),  # more than the model's positions
    )
    cases = chain(
        kernels_linear.linear_cases(
            setup, kernels_linear.OPERATIONS, ("none", "int8"), notes, rows=(1, 3)
        ),
        kernels_attention.attention_cases(setup, ("decode", "prefill"), batches=batches),
        kernels_rows.row_cases(setup, ("norm", "rotation"), rows=(5,)),
    )
    rows = kernels.rows(list(measured(setup, *cases).values()), "x", "bench")
    names = {row.case for row in rows}
    assert names == {
        *(f"{name}, {count} rows" for name in kernels_linear.OPERATIONS for count in (1, 3)),
        *("decode attention b2, 70", "decode attention b1, 2048", "prefill attention, 100"),
        *("norm, 5 rows", "rotation and KV write, 5 rows"),
    }
    assert all(0 < row.low <= row.median <= row.high for row in rows)
    rates = [row for row in rows if row.unit != "ratio"]
    assert {row.unit for row in rates} <= {"GB/s", "TFLOP/s"}
    assert all(row.floor_share is not None and row.floor_share > 0 for row in rates)
    ratios = {(row.case, row.system) for row in rows if row.unit == "ratio"}
    assert ("layer, 3 rows", "int8 / bfloat16") in ratios
    assert ("decode attention b2, 70", "fp8 / bfloat16") in ratios
    assert ("decode attention b1, 2048", "top_pages:16 / bfloat16") in ratios
    assert ("norm, 5 rows", "bfloat16 / bfloat16") not in ratios
    assert notes == []


def test_a_rate_has_the_unit_of_what_limits_it() -> None:
    limits = floor.Floor(bytes_per_s=1e9, multiply_adds_per_s=1e9)
    rounds = (kernels.Round(2.0, limits), kernels.Round(4.0, limits))
    read = kernels.Measured("c", "plain", "float32", Work(1e9, 5e8), rounds)
    multiplied = kernels.Measured("c", "other", "float32", Work(5e8, 1e9), rounds[:1] * 2)
    one, other, ratio = kernels.rows([read, multiplied], "k", "bench")
    assert (one.unit, one.low, one.high, one.floor_share) == ("GB/s", 0.25, 0.5, 0.375)
    assert (other.unit, other.median, other.floor_share) == ("TFLOP/s", 0.001, 0.5)
    assert (ratio.system, ratio.low, ratio.high) == ("other / plain", 1.0, 2.0)


def test_the_linears_are_those_of_the_real_model(setup: Setup) -> None:
    real = ModelConfig.from_dict(CONFIGS["qwen3-0.6b"], "qwen3-0.6b")
    sized = Setup(setup.kernels, real, setup.dtype, CPU)
    layer = kernels_linear.parts_of(sized, "layer")
    assert 28 * sum(part.parameters for part in layer) == pytest.approx(440.4e6, rel=1e-3)
    (output,) = kernels_linear.parts_of(sized, "output")
    assert output.parameters == 151_936 * 1024


def test_quantized_weights_are_fewer_bytes_to_read(setup: Setup) -> None:
    formats = ("none", "int8", "int4")
    (case,) = kernels_linear.linear_cases(setup, ["gate_up"], formats, [], rows=(4,))
    plain, int8, int4 = (candidate.work for candidate in case.candidates)
    weights = 2 * setup.shapes.intermediate_size * setup.shapes.hidden_size
    assert plain == Work(2 * weights, 4 * weights)
    assert int8.read_bytes == weights + 4 * 2 * setup.shapes.intermediate_size
    assert int4.read_bytes == weights / 2 + 2 * weights / 32
    assert plain.multiply_adds == int4.multiply_adds


def test_logits_are_written_to_memory(setup: Setup) -> None:
    (case,) = kernels_linear.linear_cases(setup, ["output"], ("none",), [], rows=(4,))
    weights = setup.shapes.vocab_size * setup.shapes.hidden_size
    logits = 4 * setup.shapes.vocab_size
    assert case.candidates[0].work == Work(2 * weights + 4 * logits, 4 * weights)


def test_a_format_that_is_not_kept_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "reference")
    plain = Setup(select_kernels(CPU, setup.dtype), setup.shapes, setup.dtype, CPU)
    notes: list[str] = []
    cases = list(kernels_linear.linear_cases(plain, ["qkv"], ("none", "nf4"), notes, rows=(1,)))
    assert [len(case.candidates) for case in cases] == [1]
    assert notes == ["reference kernels bring nf4 to bfloat16"]
    assert not list(kernels_linear.linear_cases(plain, ["qkv"], ("nf4",), notes, rows=(1,)))


@pytest.mark.parametrize("label", [None, *kernels_attention.LABELS])
@pytest.mark.parametrize("kv_format", kernels_attention.KV_FORMATS)
def test_no_two_calls_read_the_same_blocks(
    setup: Setup, label: str | None, kv_format: kernels_attention.KVCacheDType
) -> None:
    pattern = AttentionPattern()
    if label is not None:
        pattern = attention_pattern(AttentionConfig.model_validate(label))
    batch = Batch("decode", 1, 2048)
    candidate = kernels_attention._candidate(setup, batch, kv_format, pattern, "x")
    own = [_last_block(call) for call in candidate.calls]
    assert len(own) >= 4
    # A call reads its last blocks, whatever is hidden: `work` says how many.
    seen = keys_seen(pattern, 2047, selects=True) // kernels_attention.BLOCK_SIZE
    bytes_of_a_block = own[0][1]
    assert all(b[0] - a[0] >= seen * bytes_of_a_block for a, b in pairwise(own))
    assert all(bool(torch.isfinite(call()).all()) for call in candidate.calls[:2])


def _last_block(call: kernels.Call) -> tuple[int, int]:
    """Where the last block of a call's layer begins, and its bytes."""
    assert isinstance(call, partial)
    layer = call.args[1]
    data = layer.data_N2KB if hasattr(layer, "data_N2KB") else layer
    return data[-1].data_ptr(), data[-1].nbytes


@pytest.mark.parametrize("label", ["full", *kernels_attention.LABELS])
@pytest.mark.parametrize("position", [0, 500, 1024, 1030, 3000])
def test_keys_are_counted_as_the_pattern_shows_them(label: str, position: int) -> None:
    pattern = attention_pattern(AttentionConfig.model_validate(label))
    rows_Q, keys_L = torch.tensor([[position]]), torch.arange(4000)
    visible = int(pattern.visible(rows_Q, keys_L).sum())
    assert keys_seen(pattern, position, selects=False) == visible
    pages = kernels_attention.BLOCK_SIZE * (pattern.num_pages or 64)
    assert keys_seen(pattern, position, selects=True) == min(visible, pages)


def test_calls_take_turns_over_all_memory(setup: Setup) -> None:
    seen: list[int] = []
    calls = [partial(seen.append, number) for number in range(50)]
    measured(setup, Case("c", [Candidate("n", "float32", Work(1, 1), calls)]))
    assert seen[:120] == [number % 50 for number in range(120)]


def test_a_case_is_gone_before_the_next_is_made(setup: Setup) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def cases() -> Iterator[Case]:
        for number in range(3):
            assert not any(one() is not None for one in made)
            memory = torch.zeros(4)
            made.append(weakref.ref(memory))
            call = partial(torch.sum, memory)
            del memory
            yield Case(str(number), [Candidate("n", "float32", Work(1, 1), [call])])
            del call

    probe = FloorProbe(CPU, setup.dtype)
    assert len(kernels.measure(cases(), probe, CPU, 1, lambda _: None)) == 3


@pytest.mark.parametrize("operation", ["layer", "decode"])
def test_memory_goes_with_its_case(setup: Setup, operation: str) -> None:
    if operation == "layer":
        cases = kernels_linear.linear_cases(setup, ["layer", "qkv"], ("none",), [], rows=(1,))
    else:
        batches = (Batch("decode", 1, 70), Batch("decode", 1, 80))
        cases = kernels_attention.attention_cases(setup, ("decode",), batches=batches)
    call = weakref.ref(next(cases).candidates[0].calls[0])
    next(cases)
    assert call() is None
