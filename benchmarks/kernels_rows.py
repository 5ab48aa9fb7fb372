"""What is computed for each token alone: norms, and the rotation with the write into the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from ..kernels.context import ContextItem, build_context
from ..kernels.rope import inverse_frequencies, rope_cos_sin
from ..workers.config import KVCacheDType
from ..workers.model.cache import KVCache
from .floor import Work
from .kernels import Candidate, Case, Setup, num_calls
from .kernels_attention import BLOCK_SIZE, KV_FORMATS, kv_name

ROWS = (8, 512)
OPERATIONS = ("norm", "rotation")


def row_cases(
    setup: Setup, operations: Sequence[str], *, rows: Sequence[int] = ROWS
) -> Iterator[Case]:
    """A case for each operation and number of rows."""
    for count in rows:
        if "norm" in operations:
            yield Case(f"norm, {count} rows", [_norm(setup, count)])
        if "rotation" in operations:
            candidates = [_rotation(setup, count, kv_format) for kv_format in KV_FORMATS]
            yield Case(f"rotation and KV write, {count} rows", candidates)


def _norm(setup: Setup, count: int) -> Candidate:
    kernels, width, eps = setup.kernels, setup.shapes.hidden_size, setup.shapes.rms_norm_eps
    num_bytes = count * width * setup.dtype.itemsize
    x_NTC = torch.randn(num_calls(num_bytes), count, width, dtype=setup.dtype, device=setup.device)
    weight_C = torch.ones(width, dtype=setup.dtype, device=setup.device)
    calls = [partial(kernels.rms_norm, x_TC, weight_C, eps) for x_TC in x_NTC]
    return Candidate(setup.precision, setup.precision, Work(2 * num_bytes, 0), calls)


def _rotation(setup: Setup, count: int, kv_format: KVCacheDType) -> Candidate:
    kernels, shapes = setup.kernels, setup.shapes
    num_blocks = -(-count // BLOCK_SIZE)
    heads = shapes.num_heads + shapes.num_kv_heads
    width = (heads + shapes.num_kv_heads) * shapes.head_dim
    item = ContextItem(range(num_blocks), 0, count)
    context = build_context([item], BLOCK_SIZE, setup.device)
    frequencies_E = inverse_frequencies(shapes.rope_theta, shapes.head_dim, setup.device)
    cos_TE, sin_TE = rope_cos_sin(context.positions_T, frequencies_E)
    weight_AD = torch.ones(heads, shapes.head_dim, device=setup.device)
    one_layer = replace(shapes, num_layers=1)
    block_bytes = KVCache.bytes_per_block(one_layer, BLOCK_SIZE, setup.dtype, kv_format)
    qkv_bytes = count * width * setup.dtype.itemsize
    number = num_calls(qkv_bytes + num_blocks * block_bytes)
    cache = KVCache(
        replace(shapes, num_layers=number),
        num_blocks,
        BLOCK_SIZE,
        setup.dtype,
        setup.device,
        kv_format,
    )
    # Rotated in place again and again: the norm before keeps the numbers ordinary.
    qkv_NTC = torch.randn(number, count, width, dtype=setup.dtype, device=setup.device)
    calls = [
        partial(
            kernels.qk_norm_rope_write,
            *(qkv_TC, weight_AD, cos_TE, sin_TE, layer, context.slots_T, shapes.rms_norm_eps),
        )
        for qkv_TC, layer in zip(qkv_NTC, cache.layers, strict=True)
    ]
    queries = count * shapes.num_heads * shapes.head_dim * setup.dtype.itemsize
    work = Work(qkv_bytes + queries + count * block_bytes / BLOCK_SIZE, 0)
    name = kv_name(setup, kv_format)
    return Candidate(name, name, work, calls)
