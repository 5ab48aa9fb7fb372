"""How a grid starts: what ranks must agree on, and what is refused before or after they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_pio.workers.config import EngineConfig
from inference_pio.workers.executor import GroupLostError
from inference_pio.workers.model.cache import KVCache
from inference_pio.workers.model.config import CheckpointError, ModelConfig
from inference_pio.workers.model.shard import ShardSpec
from inference_pio.workers.parallel.grid import start_grid
from inference_pio.workers.parallel.launcher import RankSpec
from inference_pio.workers.types import BlockId

MakeCheckpoint = Callable[..., Path]
Launcher = Callable[..., Any]


def config(folder: Path, *, num_blocks: int = 20, **options: Any) -> EngineConfig:
    shapes = ModelConfig.from_folder(folder)
    size = KVCache.bytes_per_block(shapes, 16, shapes.dtype)
    values = {"block_size": 16, "parallel": {"tensor": 2}, "kv_cache_bytes": num_blocks * size}
    return EngineConfig(model=str(folder), **(values | options))


@pytest.fixture
def folder(make_text_checkpoint: MakeCheckpoint) -> Path:
    return make_text_checkpoint()


def assert_ended(launcher: Any) -> None:
    assert launcher.started
    assert not any(rank.is_alive() for rank in launcher.started)


def test_the_pool_is_the_smallest_of_any_rank(folder: Path, thread_ranks: Launcher) -> None:
    small = config(folder, num_blocks=7).kv_cache_bytes
    loaded, executor = start_grid(config(folder), thread_ranks(kv_cache_bytes=small))
    assert (loaded.num_blocks, loaded.max_model_len) == (7, 7 * 16)
    shapes = ModelConfig.from_folder(folder)
    last = torch.ones(shapes.num_layers, 1, 2, shapes.num_kv_heads, 16, shapes.head_dim)
    executor.read_blocks([BlockId(6)], last)
    assert not last.any()
    executor.close()
    large, executor = start_grid(config(folder), thread_ranks(kv_cache_bytes=10 * small))
    assert large.num_blocks == 20
    executor.close()


def test_ranks_on_one_machine_share_its_memory(
    folder: Path, thread_ranks: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = ModelConfig.from_folder(folder)
    size = KVCache.bytes_per_block(ShardSpec(0, 2).local_config(local), 16, local.dtype)
    monkeypatch.setattr("inference_pio.workers.loading.free_bytes", lambda _: 40 * size)
    loaded, executor = start_grid(config(folder, kv_cache_bytes=None), thread_ranks())
    assert loaded.num_blocks == 10  # each takes half of its half
    executor.close()


def test_no_rank_is_started_for_a_grid_that_cannot_be(folder: Path, thread_ranks: Launcher) -> None:
    for parallel, message in (
        ({"pipeline": 3}, "3 pipeline stages for 2 layers"),
        ({"tensor": 3}, "4 query heads and 2 key/value heads cannot be split over 3"),
    ):
        launcher = thread_ranks()
        with pytest.raises(CheckpointError, match=message):
            start_grid(config(folder, parallel=parallel), launcher)
        assert not launcher.started


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "rank 1 has another dtype than rank 0"),
        ({"block_size": 32}, "rank 1 has another block size than rank 0"),
        ({"max_model_len": 99}, "rank 1 has another longest sequence than rank 0"),
    ],
)
def test_ranks_that_disagree_are_refused(
    folder: Path, thread_ranks: Launcher, change: dict[str, Any], message: str
) -> None:
    launcher = thread_ranks(**change)
    with pytest.raises(CheckpointError, match=message):
        start_grid(config(folder), launcher)
    assert_ended(launcher)


def test_another_checkpoint_is_refused(
    folder: Path, make_text_checkpoint: MakeCheckpoint, thread_ranks: Launcher
) -> None:
    launcher = thread_ranks(model=str(make_text_checkpoint(rope_theta=2e6)))
    with pytest.raises(CheckpointError, match="rank 1 has another checkpoint than rank 0"):
        start_grid(config(folder), launcher)
    assert_ended(launcher)


def test_a_rank_that_cannot_load_says_why(
    folder: Path, tmp_path: Path, thread_ranks: Launcher
) -> None:
    launcher = thread_ranks(model=str(tmp_path))
    with pytest.raises(
        GroupLostError, match=r"rank 1 failed: ModelSourceError: .* holds no config\.json"
    ):
        start_grid(config(folder), launcher)
    assert_ended(launcher)


def test_what_rank_0_cannot_load_ends_the_others(folder: Path, thread_ranks: Launcher) -> None:
    launcher = thread_ranks()
    with pytest.raises(ValueError, match=r"max_model_len is 400, but the KV cache holds 320"):
        start_grid(config(folder, max_model_len=400), launcher)
    assert_ended(launcher)


def test_a_rank_that_never_comes_up_is_noticed(folder: Path) -> None:
    class Dead:
        def is_alive(self) -> bool:
            return False

        def kill(self) -> None:
            pass

    class NoRanks:
        host = "127.0.0.1"

        def start(self, specs: Sequence[RankSpec]) -> list[Dead]:
            return [Dead() for _ in specs]

    with pytest.raises(GroupLostError, match="rank 1 is gone: its process ended before it joined"):
        start_grid(config(folder), NoRanks())


def test_a_rank_that_cannot_be_killed_keeps_no_other_alive(folder: Path) -> None:
    killed = []

    class Stubborn:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def is_alive(self) -> bool:
            return False

        def kill(self) -> None:
            killed.append(self.rank)
            if self.rank == 1:
                raise OSError("its machine does not answer")

    class StubbornRanks:
        host = "127.0.0.1"

        def start(self, specs: Sequence[RankSpec]) -> list[Stubborn]:
            return [Stubborn(spec.shard.rank) for spec in specs]

    with pytest.raises(GroupLostError, match="its process ended before it joined"):
        start_grid(config(folder, parallel={"tensor": 2, "pipeline": 2}), StubbornRanks())
    assert set(killed) == {1, 2, 3}


def test_a_spec_survives_as_json(folder: Path) -> None:
    spec = RankSpec(config(folder), ShardSpec(1, 2, 1, 3), "127.0.0.1", 1, 2, bytes(range(16)))
    assert RankSpec.from_json(spec.to_json()) == spec
    assert "token=" not in repr(spec)
