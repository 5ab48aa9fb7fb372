"""Attention of one layer: decode and prefill, in every KV format and with every pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from ..kernels.context import ALL_PROMPT, ContextItem, build_context
from ..kernels.kv_layer import CodedKV, KVLayer, write_tokens
from ..kernels.pattern import FULL, AttentionPattern, bound_pages
from ..workers.config import AttentionConfig, EngineConfig, KVCacheDType
from ..workers.loading import attention_pattern
from ..workers.model.cache import KVCache
from .floor import Work
from .kernels import Candidate, Case, Setup, num_calls

OPERATIONS = ("decode", "prefill")
BLOCK_SIZE = EngineConfig().block_size
KV_FORMATS: tuple[KVCacheDType, ...] = get_args(KVCacheDType)
LABELS = ("sliding_window:1024", "sink_window:1024+4", "top_pages:16")
RANDOM_BLOCKS = 256
"""Of different keys and values; the others repeat them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of ``context`` tokens, the last of which is new, or all of them in a prefill."""

    operation: str
    sequences: int
    context: int
    patterns: bool = False
    """Whether patterns are compared with the exact cache too: it is long enough for them."""

    @property
    def name(self) -> str:
        if self.operation == "prefill":
            return f"prefill attention, {self.context}"
        return f"decode attention b{self.sequences}, {self.context}"


BATCHES = (
    *(Batch("decode", sequences, context) for sequences in (1, 8, 32) for context in (64, 512)),
    *(Batch("decode", 1, context, patterns=True) for context in (4096, 16384)),
    *(Batch("prefill", 1, context) for context in (512, 2048)),
    Batch("prefill", 1, 8192, patterns=True),
)


def attention_cases(
    setup: Setup, operations: Sequence[str], *, batches: Sequence[Batch] = BATCHES
) -> Iterator[Case]:
    """A case for each batch that the model's positions allow."""
    for batch in batches:
        fits = batch.context <= setup.shapes.max_position_embeddings
        if batch.operation in operations and fits:
            yield Case(batch.name, [*_exact(setup, batch), *_patterns(setup, batch)])


def kv_name(setup: Setup, kv_format: KVCacheDType) -> str:
    """What the cache holds."""
    return setup.precision if kv_format == "auto" else kv_format


def filled_cache(
    setup: Setup, num_blocks: int, kv_format: KVCacheDType, pattern: AttentionPattern = FULL
) -> KVCache:
    """A cache of one layer with random keys and values, and their bounds where they are needed."""
    shapes = replace(setup.shapes, num_layers=1)
    cache = KVCache(shapes, num_blocks, BLOCK_SIZE, setup.dtype, setup.device, kv_format, pattern)
    first = min(num_blocks, RANDOM_BLOCKS)
    slots_T = torch.arange(first * BLOCK_SIZE, device=setup.device)
    shape = len(slots_T), 2, shapes.num_kv_heads, shapes.head_dim
    write_tokens(cache.layers[0], slots_T, torch.randn(shape, device=setup.device))
    blocks_N = cache.blocks_LN2KSD[0]
    for start in range(first, num_blocks, first):
        part = blocks_N[start : start + first]
        part.copy_(blocks_N[: len(part)])
    for bounds_N2KD in cache.bounds:
        for start in range(0, num_blocks, RANDOM_BLOCKS):
            some = range(start, min(start + RANDOM_BLOCKS, num_blocks))
            bound_pages(cache.layers[0], bounds_N2KD, some)
    return cache


def keys_seen(pattern: AttentionPattern, position: int, *, selects: bool) -> int:
    """Keys that the token at a position attends to."""
    keys = position + 1
    if pattern.window is not None:
        near = min(keys, pattern.window)
        return near + min(pattern.sinks, keys - near)
    if pattern.num_pages is not None and selects:
        return min(keys, pattern.num_pages * BLOCK_SIZE)
    return keys


def _exact(setup: Setup, batch: Batch) -> Iterator[Candidate]:
    for kv_format in KV_FORMATS:
        yield _candidate(setup, batch, kv_format, FULL, kv_name(setup, kv_format))


def _patterns(setup: Setup, batch: Batch) -> Iterator[Candidate]:
    for label in LABELS if batch.patterns else ():
        pattern = attention_pattern(AttentionConfig.model_validate(label))
        yield _candidate(setup, batch, "auto", pattern, label)


def _candidate(
    setup: Setup, batch: Batch, kv_format: KVCacheDType, pattern: AttentionPattern, name: str
) -> Candidate:
    """Calls over layers that lie in one pool, so far apart that no two read the same blocks:

    pool    |----------------------------------------|
    layer 0 |hidden.......|seen|
    layer 1      |hidden.......|seen|
    layer 2           |hidden.......|seen|
    """
    decodes, shapes = batch.operation == "decode", setup.shapes
    per_sequence = -(-batch.context // BLOCK_SIZE)
    num_blocks = batch.sequences * per_sequence
    items = [
        ContextItem(
            range(number * per_sequence, (number + 1) * per_sequence),
            batch.context - 1 if decodes else 0,
            1 if decodes else batch.context,
            batch.context - 1 if decodes else ALL_PROMPT,
        )
        for number in range(batch.sequences)
    ]
    context = build_context(items, BLOCK_SIZE, setup.device, pattern)
    step = num_blocks
    if decodes:
        last = batch.context - 1
        blocks = pattern.num_pages or len(pattern.block_numbers(last, last, BLOCK_SIZE))
        step = batch.sequences * min(per_sequence, blocks)
    block_bytes = KVCache.bytes_per_block(
        replace(shapes, num_layers=1), BLOCK_SIZE, setup.dtype, kv_format
    )
    count = num_calls(step * block_bytes)
    cache = filled_cache(setup, num_blocks + (count - 1) * step, kv_format, pattern)
    attention = setup.kernels.plan_attention(context)
    tokens = context.query_starts[-1]
    q_THD = torch.randn(
        tokens, shapes.num_heads, shapes.head_dim, dtype=setup.dtype, device=setup.device
    )
    q_THD *= shapes.head_dim**-0.5
    calls: list[Callable[[], Tensor]] = []
    for number in range(count):
        part = slice(number * step, number * step + num_blocks)
        bounds = cache.bounds[0][part].clone() if cache.bounds else None
        calls.append(partial(attention, q_THD, _blocks(cache.layers[0], part), bounds))
    positions = [batch.context - 1] if decodes else range(batch.context)
    pairs = batch.sequences * sum(keys_seen(pattern, p, selects=decodes) for p in positions)
    keys = pairs if decodes else batch.context
    selected = pattern.pages is not None and decodes
    bounds_bytes = 2 * shapes.num_kv_heads * shapes.head_dim * setup.dtype.itemsize * num_blocks
    work = Work(
        read_bytes=keys * block_bytes / BLOCK_SIZE + (bounds_bytes if selected else 0),
        multiply_adds=2 * shapes.num_heads * shapes.head_dim * pairs,
    )
    return Candidate(name, kv_name(setup, kv_format), work, calls)


def _blocks(kv: KVLayer, part: slice) -> KVLayer:
    if isinstance(kv, CodedKV):
        return replace(kv, data_N2KB=kv.data_N2KB[part])
    return kv[part]
