from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference_pio.deployments.check.memory import (
    PUBLISHED,
    UnknownModelError,
    engine_memory,
    model_shapes,
)
from inference_pio.workers.config import EngineConfig

LARGE = "Qwen/Qwen3-4B-Instruct-2507"
SMALL = "Qwen/Qwen3-0.6B"


def engine(model: str = LARGE, **fields: Any) -> EngineConfig:
    return EngineConfig.model_validate({"model": model, "kv_cache_bytes": 2**32, **fields})


def test_published_models_are_known_without_a_download() -> None:
    assert {model_shapes(name).num_layers for name in PUBLISHED} == {28, 36}


def test_the_packed_weights_of_the_published_models() -> None:
    # 596,049,920 and 4,022,468,096 parameters, all but a copy of nothing: the table is the head.
    assert engine_memory(engine(SMALL))[0].weights == 2 * 596_049_920
    assert engine_memory(engine(LARGE))[0].weights == 2 * 4_022_468_096


def test_a_file_of_weights_is_as_large_as_the_plan_says(embedded_dir: Path) -> None:
    on_disk = (embedded_dir / "model.safetensors").stat().st_size
    (rank,) = engine_memory(engine("embedded"))
    assert 0.98 < rank.weights / on_disk <= 1.0


def test_a_grid_splits_weights_and_kv() -> None:
    (whole,) = engine_memory(engine())
    ranks = engine_memory(engine(parallel={"tensor": 2, "pipeline": 2}))
    assert len(ranks) == 4
    assert sum(rank.kv or 0 for rank in ranks) == whole.kv
    # Only the norms lie on both tensor ranks.
    assert 1.0 <= sum(rank.weights for rank in ranks) / whole.weights < 1.001


def test_kv_heads_that_ranks_share_are_counted_on_each() -> None:
    (whole,) = engine_memory(engine())
    ranks = engine_memory(engine(parallel={"tensor": 16}))
    assert sum(rank.kv or 0 for rank in ranks) == 2 * (whole.kv or 0)


def test_splitting_by_tokens_doubles_the_layers() -> None:
    plain = engine_memory(engine(parallel={"tensor": 2}))[0].weights
    doubled = engine_memory(engine(parallel={"tensor": 2, "sequence_from": 64}))[0].weights
    vocabulary = 2 * 151936 * 2560
    assert doubled == pytest.approx(plain + 2 * 4_022_468_096 - vocabulary, rel=1e-4)


def test_weights_take_no_more_than_their_limit() -> None:
    limits = (None, 3 * 2**30, 2**40)
    found = [engine_memory(engine(weight_memory_bytes=limit))[0].weights for limit in limits]
    assert found == [found[0], 3 * 2**30, found[0]]


def test_dtype_counts() -> None:
    (bfloat16,), (float32,) = (
        engine_memory(engine(SMALL)),
        engine_memory(engine(SMALL, dtype="float32")),
    )
    assert float32.weights == 2 * bfloat16.weights


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_kv_in_codes_has_more_tokens_in_the_same_memory(codes: str) -> None:
    fields = {"max_model_len": 40_000, "kv_cache_bytes": 2**32}
    # A byte for each of 128 channels, and four for their scale, where bfloat16 has 256 bytes.
    needed = 40_000 * 36 * 8 * 2 * (128 + 4)
    assert needed < 2**32 < needed * 256 / 132
    with pytest.raises(ValueError, match="one token takes 147456 bytes"):
        engine_memory(engine(**fields))
    (rank,) = engine_memory(engine(**fields, kv_cache_dtype=codes))
    assert 2**32 - 64 * needed / 40_000 < (rank.kv or 0) <= 2**32
    with pytest.raises(ValueError, match="one token takes 76032 bytes"):
        engine_memory(engine(max_model_len=40_000, kv_cache_bytes=2**30, kv_cache_dtype=codes))


def test_kv_that_is_not_told_is_unknown() -> None:
    assert engine_memory(engine(kv_cache_bytes=None))[0].kv is None


def test_a_pool_is_never_larger_than_a_full_batch_fills() -> None:
    (rank,) = engine_memory(engine("embedded", max_num_seqs=1, max_model_len=128, block_size=64))
    assert rank.kv == 128 * 2 * 5 * 2 * 32 * 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"parallel": {"tensor": 3}}, "cannot be split over 3"),
        ({"parallel": {"pipeline": 40}}, "40 pipeline stages for 36 layers"),
        ({"kv_cache_bytes": 2**28, "max_model_len": 32768}, "fewer than max_model_len"),
        ({"max_model_len": 300_000}, "limit of Qwen/Qwen3-4B-Instruct-2507 is 262144"),
    ],
)
def test_an_engine_that_could_not_start_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        engine_memory(engine(**fields))


def test_other_models_are_unknown() -> None:
    with pytest.raises(UnknownModelError, match="someone/else"):
        engine_memory(engine("someone/else"))


def test_host_memory_for_evicted_blocks_is_on_rank_0() -> None:
    config = EngineConfig.model_validate(
        {"parallel": {"tensor": 2}, "kv_paging": {"host_bytes": 10**6}}
    )
    assert [rank.tier for rank in engine_memory(config)] == [10**6, 0]
