"""The paged cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inference_pio.kernels.kv_layer import CodedKV, read_blocks, write_tokens
from inference_pio.workers.config import KVCacheDType
from inference_pio.workers.model.cache import KVCache
from inference_pio.workers.model.config import ModelConfig


@pytest.fixture(scope="module")
def config(make_checkpoint: Callable[..., Path]) -> ModelConfig:
    return ModelConfig.from_folder(make_checkpoint())


def make(config: ModelConfig, blocks: int = 6, kept_as: KVCacheDType = "auto") -> KVCache:
    return KVCache(config, blocks, 4, torch.float32, torch.device("cpu"), kept_as)


def test_its_size_is_what_bytes_per_block_says(config: ModelConfig) -> None:
    cache = make(config)
    assert cache.blocks_LN2KSD.nbytes == 6 * KVCache.bytes_per_block(config, 4, torch.float32)
    # 3 layers x key and value x 3 heads x 24 channels x 4 tokens x 2 bytes
    assert KVCache.bytes_per_block(config, 4, torch.bfloat16) == 3 * 2 * 3 * 24 * 4 * 2


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_codes_take_a_byte_and_a_scale_for_each_row(
    config: ModelConfig, codes: KVCacheDType
) -> None:
    cache = make(config, kept_as=codes)
    size = KVCache.bytes_per_block(config, 4, torch.bfloat16, codes)
    assert cache.blocks_LN2KSD.nbytes == 6 * size
    # 3 layers x key and value x 3 heads x 4 tokens x (24 channels + a scale)
    assert size == 3 * 2 * 3 * 4 * (24 + 4)


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_codes_and_scales_move_together(config: ModelConfig, codes: KVCacheDType) -> None:
    cache = make(config, kept_as=codes)
    layer = cache.layers[2]
    assert isinstance(layer, CodedKV)
    tokens = torch.randn(4, 2, 3, 24)
    write_tokens(layer, torch.arange(4, 8), tokens)  # block 1
    written = read_blocks(layer, [1])
    assert (written[0].permute(2, 0, 1, 3) - tokens).abs().max() < 0.2
    cache.copy_blocks([(1, 3)])
    out = torch.empty_like(cache.blocks_LN2KSD[:, :1])
    cache.read_blocks([1], out)
    cache.write_blocks([5], out)
    cache.clear_blocks([1])
    assert torch.equal(read_blocks(layer, [3, 5]), torch.cat((written, written)))
    assert not read_blocks(layer, [0, 1, 2, 4]).any()
    others = [read_blocks(other, range(6)) for other in cache.layers[:2]]
    assert not torch.cat(others).any()


def test_layers_are_views(config: ModelConfig) -> None:
    cache = make(config)
    cache.layers[1][2] = 5
    assert cache.blocks_LN2KSD[1, 2].eq(5).all()
    assert cache.blocks_LN2KSD.sum() == 5 * cache.layers[1][2].numel()


def test_copies_happen_at_once(config: ModelConfig) -> None:
    cache = make(config)
    cache.blocks_LN2KSD.copy_(torch.randn_like(cache.blocks_LN2KSD))
    before = cache.blocks_LN2KSD.clone()
    cache.copy_blocks([(0, 3), (3, 5)])  # 5 gets what 3 held before
    assert torch.equal(cache.blocks_LN2KSD[:, 3], before[:, 0])
    assert torch.equal(cache.blocks_LN2KSD[:, 5], before[:, 3])
    untouched = [0, 1, 2, 4]
    assert torch.equal(cache.blocks_LN2KSD[:, untouched], before[:, untouched])
    cache.copy_blocks([])
    assert torch.equal(cache.blocks_LN2KSD[:, 5], before[:, 3])


def test_blocks_are_read_in_the_order_that_is_asked_for(config: ModelConfig) -> None:
    cache = make(config)
    cache.blocks_LN2KSD.copy_(torch.randn_like(cache.blocks_LN2KSD))
    out = torch.full_like(cache.blocks_LN2KSD[:, :3], float("nan"))
    cache.read_blocks([4, 0, 4], out)
    assert torch.equal(out, cache.blocks_LN2KSD[:, [4, 0, 4]])


def test_reading_into_room_of_another_shape_is_refused(config: ModelConfig) -> None:
    cache = make(config)
    room = torch.zeros_like(cache.blocks_LN2KSD[:, :2])
    with pytest.raises(ValueError, match=r"\[3, 2, 2, 3, 4, 24\]; \[3, 1, 2, 3, 4, 24\] are read"):
        cache.read_blocks([1], room)


def test_clearing(config: ModelConfig) -> None:
    cache = make(config)
    cache.blocks_LN2KSD.fill_(float("nan"))
    cache.clear_blocks((1, 4))
    assert cache.blocks_LN2KSD[:, [1, 4]].eq(0).all()
    assert cache.blocks_LN2KSD[:, [0, 2, 3, 5]].isnan().all()


def test_an_empty_cache_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="got 0 of 4"):
        make(config, 0)
