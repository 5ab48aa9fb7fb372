"""Each benchmark once, on the embedded model: that it measures what it says, not how fast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from inference_pio.benchmarks import accuracy, serving, speed
from inference_pio.benchmarks.floor import FloorProbe
from inference_pio.benchmarks.http_stream import Answer
from inference_pio.benchmarks.systems import OwnEngine
from inference_pio.embedded.tasks import KINDS
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.llm import LLM
from inference_pio.workers.types import SamplingParams

KV_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def own() -> OwnEngine:
    return OwnEngine(
        EngineConfig(kv_cache_bytes=KV_BYTES, max_num_seqs=8, prefix_caching=False, num_threads=1)
    )


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("embedded", kv_cache_bytes=KV_BYTES, num_threads=1) as llm:
        yield llm


def test_a_measurement_leaves_the_engine_empty(own: OwnEngine) -> None:
    before = own.engine.stats()
    assert own.decode_rate(batch=4, prompt=8, steps=5) > 0
    assert own.prefill_rate(64) > 0
    after = own.engine.stats()
    assert (after.running, after.waiting, after.kv_blocks_used) == (0, 0, 0)
    # Four prompts, then five steps of four tokens were timed, and one token after the prefill.
    assert after.generated_tokens - before.generated_tokens >= 4 + 5 * 4 + 1
    own.engine.check_integrity()


def test_rounds_become_rows_with_a_share_of_the_floor(own: OwnEngine, embedded_dir: Path) -> None:
    seen: list[str] = []
    found = speed.measure(
        [own],
        speed.shapes_of(embedded_dir, own.precision),
        FloorProbe(torch.device("cpu"), own.engine.loaded.model.dtype),
        [speed.Case("decode", 2), speed.Case("prefill", 32)],
        2,
        seen.append,
    )
    assert {key: len(rounds) for key, rounds in found.items()} == {
        ("decode b2", "inference-pio"): 2,
        ("prefill 32", "inference-pio"): 2,
    }
    assert len(seen) == 2 * 3  # a warm-up and two rounds of each case
    rows = speed.rows(found, [own], "inference-pio bench speed")
    assert [row.case for row in rows] == ["decode b2", "prefill 32"]
    assert all(row.low <= row.median <= row.high for row in rows)
    assert all(row.floor_share is not None for row in rows)


def test_offline_generates_every_token_that_was_asked_for(own: OwnEngine) -> None:
    before = own.engine.stats().generated_tokens
    asked = serving.questions(count=6, max_tokens=9, seed=3)
    assert len({str(question.messages) for question in asked}) == 6
    assert serving.offline_tokens_per_s(own.engine, asked, streams=4) > 0
    assert own.engine.stats().generated_tokens - before == 6 * 9


def test_throughput_counts_from_the_first_request_to_the_last_token() -> None:
    wave = serving.Wave(
        (
            Answer(1.0, 2.0, None, 3.0, 30, (0.5, 0.5)),
            Answer(2.0, 3.0, 4.0, 6.0, 70, (1.0,)),
        )
    )
    assert wave.tokens_per_s == 100 / 5.0
    rows = {r.case: r for r in serving.latency_rows([wave], "float32", "2 streams", "c")}
    assert rows["2 streams, time to first token"].median == 1000.0
    assert rows["2 streams, time to first answer token"].median == 2000.0
    assert rows["2 streams, inter-token latency"].high == 1000.0
    share = serving.offline_rows([40.0], [wave], "float32", "2 streams", "c")[-1]
    assert share.median == 0.5


def test_accuracy_asks_every_kind_in_both_modes(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=256)
    scores = accuracy.score_all(llm, 2, 0, params, lambda _: None)
    assert [(s.kind, s.thinking) for s in scores] == [
        (kind, thinking) for kind in KINDS for thinking in (True, False)
    ]
    assert all(s.thought_tokens == (0, 0) for s in scores if not s.thinking)
    by_kind = {(s.kind, s.thinking): s for s in scores}
    assert min(by_kind["arithmetic", True].thought_tokens) > 0
    assert by_kind["arithmetic", True].share == 1.0
    rows = accuracy.rows(scores, "float32", "c")
    assert len(rows) == 3 * len(KINDS)
    assert all(row.low <= row.median <= row.high for row in rows)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 100, 0.0, 0.0370), (100, 100, 0.9630, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval_matches_published_values(
    right: int, count: int, low: float, high: float
) -> None:
    assert accuracy.wilson(right, count) == pytest.approx((low, high), abs=5e-4)
