"""Shards: every part of a model is held, by the ranks that need it, and only they read it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_pio.workers.model.config import CheckpointError, ModelConfig
from inference_pio.workers.model.loader import Checkpoint
from inference_pio.workers.model.names import EMBEDDING, expected_shapes
from inference_pio.workers.model.qwen3 import Qwen3Model
from inference_pio.workers.model.shard import WHOLE, ShardSpec, check_grid, even_span

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture
def config(make_checkpoint: MakeCheckpoint) -> ModelConfig:
    return ModelConfig.from_folder(make_checkpoint())


def ranks(tp_size: int, pp_size: int) -> list[ShardSpec]:
    found = [
        ShardSpec.of_rank(r, tp_size=tp_size, pp_size=pp_size) for r in range(tp_size * pp_size)
    ]
    assert [shard.rank for shard in found] == list(range(tp_size * pp_size))
    return found


@pytest.mark.parametrize("total", [1, 2, 7, 36, 509])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_even_spans_tile_the_whole(total: int, parts: int) -> None:
    spans = [even_span(total, parts, index) for index in range(parts)]
    assert list(chain.from_iterable(spans)) == list(range(total))
    sizes = [len(span) for span in spans]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"),
    [(16, 8, 1), (16, 8, 2), (16, 8, 8), (16, 8, 16), (4, 2, 4), (32, 8, 32), (6, 1, 3), (5, 1, 5)],
)
def test_query_heads_are_where_their_kv_head_is(
    config: ModelConfig, heads: int, kv_heads: int, tp_size: int
) -> None:
    config = replace(config, num_heads=heads, num_kv_heads=kv_heads)
    check_grid(config, tp_size=tp_size, pp_size=1)
    shards = ranks(tp_size, 1)
    assert list(chain.from_iterable(s.query_heads(config) for s in shards)) == list(range(heads))
    for shard in shards:
        needed = {head // (heads // kv_heads) for head in shard.query_heads(config)}
        assert needed == set(shard.kv_heads(config))
        # Kernels divide a rank's query heads evenly among its KV heads, in order.
        local = shard.local_config(config)
        group = local.num_heads // local.num_kv_heads
        first = shard.kv_heads(config).start
        assert [first + i // group for i in range(local.num_heads)] == [
            head // (heads // kv_heads) for head in shard.query_heads(config)
        ]


def test_stages_split_the_layers_and_the_first_take_the_rest(config: ModelConfig) -> None:
    config = replace(config, num_layers=36)
    layers = [shard.layers(config) for shard in ranks(1, 5)]
    assert [len(span) for span in layers] == [8, 7, 7, 7, 7]
    assert all(one.stop == other.start for one, other in pairwise(layers))
    first, *_, last = ranks(2, 3)
    assert (first.is_first_stage, first.is_last_stage) == (True, False)
    assert (last.is_first_stage, last.is_last_stage) == (False, True)
    assert WHOLE.is_first_stage
    assert WHOLE.is_last_stage


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({"num_layers": 3}, {"pp_size": 4}, "4 pipeline stages for 3 layers"),
        (
            {"num_heads": 16, "num_kv_heads": 8},
            {"tp_size": 3},
            "16 query heads and 8 key/value heads cannot be split over 3 tensor ranks; "
            "1, 2, 4, 8, 16 are possible",
        ),
        ({"num_heads": 12, "num_kv_heads": 4}, {"tp_size": 6}, "over 6 tensor ranks; 1, 2, 4, 12"),
        (
            {"num_heads": 8, "num_kv_heads": 8, "intermediate_size": 7},
            {"tp_size": 8},
            "intermediate_size is 7; it cannot be split over 8 ranks",
        ),
        (
            {"num_heads": 8, "num_kv_heads": 8, "vocab_size": 5},
            {"tp_size": 8},
            "vocab_size is 5; it cannot be split over 8 ranks",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_with_its_numbers(
    config: ModelConfig, changes: dict[str, int], grid: dict[str, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_grid(replace(config, **changes), **({"tp_size": 1, "pp_size": 1} | grid))


@pytest.mark.parametrize("place", [(2, 2, 0, 1), (0, 1, 1, 1), (-1, 2, 0, 1)])
def test_a_place_lies_in_its_grid(place: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no place in a grid"):
        ShardSpec(*place)


# --- bytes ----------------------------------------------------------------------------------------

BIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1001,
    "tie_word_embeddings": False,
}


def load(folder: Path, shard: ShardSpec = WHOLE) -> Qwen3Model:
    return Qwen3Model.load(folder, dtype=None, device=CPU, shard=shard)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 3), (2, 2)])
def test_the_ranks_read_the_checkpoint_once(
    make_checkpoint: MakeCheckpoint, tp_size: int, pp_size: int
) -> None:
    folder = make_checkpoint(**BIG)
    checkpoint = Checkpoint(folder)
    whole = load(folder).num_bytes_read
    config = ModelConfig.from_folder(folder)
    read = [load(folder, shard).num_bytes_read for shard in ranks(tp_size, pp_size)]
    norms = config.num_layers * (2 * config.hidden_size + 2 * config.head_dim) * 4
    norms += config.hidden_size * 4
    stored = expected_shapes(config)
    assert whole == sum(checkpoint.num_tensor_bytes(name) for name in stored if name != EMBEDDING)
    assert sum(read) == whole + (tp_size - 1) * norms  # only the norms are on every tensor rank
    assert max(read) < 1.5 * whole / len(read)


def test_shared_kv_heads_are_all_that_is_read_twice(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(**BIG)
    config = ModelConfig.from_folder(folder)
    read = sum(load(folder, shard).num_bytes_read for shard in ranks(4, 1))
    norms = config.num_layers * (2 * config.hidden_size + 2 * config.head_dim) * 4
    norms += config.hidden_size * 4
    keys_and_values = config.num_layers * 2 * 2 * config.head_dim * config.hidden_size * 4
    assert read == load(folder).num_bytes_read + 3 * norms + keys_and_values


def test_pages_of_other_ranks_are_not_touched(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says is mapped in, with nothing given back."""
    folder = make_checkpoint(**(BIG | {"num_hidden_layers": 8}))
    monkeypatch.setattr(Checkpoint, "release", lambda self, name: None)
    size = (folder / "model.safetensors").stat().st_size
    resident = []
    for shard in (WHOLE, ShardSpec(0, 1, 1, 4), ShardSpec(1, 4, 0, 1)):
        opened: list[Checkpoint] = []
        create = Checkpoint.__init__

        def keep(self: Checkpoint, path: Path, opened: Any = opened, create: Any = create) -> None:
            create(self, path)
            opened.append(self)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "__init__", keep)
            load(folder, shard)
        resident.append(_resident(folder / "model.safetensors"))
        opened.clear()
    assert resident[0] > 0.9 * size
    assert resident[1] < 0.5 * size  # a quarter of the layers, and pages mapped around them
    # A quarter of the rows; the columns of a third of the weights share their pages with others.
    assert resident[2] < 0.85 * size


def _resident(path: Path) -> int:
    """Bytes of a file that this process has mapped in."""
    maps = Path("/proc/self/smaps").read_text()
    blocks = re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss:\s+(\d+) kB", maps)
    assert blocks
    return sum(map(int, blocks)) * 1024
