from __future__ import annotations

import pytest
import torch

from inference_pio.benchmarks.floor import Floor, FloorProbe, Shapes, Work

QWEN3_0_6B = Shapes(
    layers=28,
    hidden=1024,
    intermediate=3072,
    query_width=2048,
    kv_width=1024,
    vocab_rows=151_936,
    bytes_per_weight=2,
    bytes_per_head_weight=2,
    bytes_per_cache_value=2,
)


def test_parameters_are_those_of_the_real_model() -> None:
    assert QWEN3_0_6B.layer_parameters == pytest.approx(440.4e6, rel=1e-3)
    assert QWEN3_0_6B.head_parameters == pytest.approx(155.6e6, rel=1e-3)


def test_a_decode_step_reads_every_weight_once_and_the_cache() -> None:
    step = QWEN3_0_6B.decode_step(batch=1, context=0)
    assert step.read_bytes == pytest.approx(1192e6, rel=1e-3)
    token = 112 * 1024  # bytes of KV cache, bf16
    longer = QWEN3_0_6B.decode_step(batch=3, context=100)
    assert longer.read_bytes - step.read_bytes == 3 * 100 * token


def test_prefill_computes_the_layers_for_each_token_and_the_head_once() -> None:
    short, long = QWEN3_0_6B.prefill(1), QWEN3_0_6B.prefill(101)
    assert short.read_bytes == long.read_bytes
    attention = 2 * 28 * 2048 * (101 * 102 / 2 - 1)
    per_token = (long.multiply_adds - short.multiply_adds - attention) / 100
    assert per_token == QWEN3_0_6B.layer_parameters


def test_the_floor_is_the_slower_of_reading_and_computing() -> None:
    floor = Floor(bytes_per_s=100.0, multiply_adds_per_s=1000.0)
    assert floor.seconds(Work(read_bytes=200.0, multiply_adds=100.0)) == 2.0
    assert floor.seconds(Work(read_bytes=10.0, multiply_adds=5000.0)) == 5.0


def test_a_sample_is_a_plausible_rate() -> None:
    floor = FloorProbe(torch.device("cpu"), torch.float32).sample()
    # Any machine that runs this reads more than 100 MB/s and less than 100 TB/s.
    assert 1e8 < floor.bytes_per_s < 1e14
    assert 1e7 < floor.multiply_adds_per_s < 1e16
