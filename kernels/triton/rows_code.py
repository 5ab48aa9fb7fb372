"""Device code of the operations on each token alone: norms, rotation, cache writes, activation.

One program a token, or a token and a part of its row. Everything is computed in float32 and rounded
on the way out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Normalises row ``program_id(0)`` of x, or of x + delta, which then replaces x."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(delta_ptr + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * x_stride + columns, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    # Rounded before the product with the weight as well: transformers' definition.
    normed = (x * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, normed.to(weight.dtype), mask=inside)


@triton.jit
def qk_norm_rope_write_kernel(
    qkv_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    slots_ptr,
    qkv_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
):
    """Some heads of one token; queries stay where they are, keys and values go to the cache.

    A slot below zero belongs to a row that only fills a batch up: nothing is written for it.
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)
    channels = tl.arange(0, HALF_TILE)
    inside = (heads < HEADS + 2 * KV_HEADS)[:, None] & (channels < HALF)[None, :]
    places = heads[:, None] * (2 * HALF) + channels[None, :]
    row_ptr = qkv_ptr + token * qkv_stride
    plain_first = tl.load(row_ptr + places, mask=inside, other=0.0).to(tl.float32)
    plain_second = tl.load(row_ptr + places + HALF, mask=inside, other=0.0).to(tl.float32)

    turns = heads < HEADS + KV_HEADS
    squares = tl.sum(plain_first * plain_first + plain_second * plain_second, axis=1)
    scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    weighed = inside & turns[:, None]
    first = plain_first * scale * tl.load(weight_ptr + places, mask=weighed, other=0.0)
    second = plain_second * scale * tl.load(weight_ptr + places + HALF, mask=weighed, other=0.0)
    angles = token * HALF + channels
    cos = tl.load(cos_ptr + angles, mask=channels < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angles, mask=channels < HALF, other=0.0)[None, :]
    out_first = tl.where(turns[:, None], first * cos - second * sin, plain_first)
    out_second = tl.where(turns[:, None], second * cos + first * sin, plain_second)

    dtype = qkv_ptr.dtype.element_ty
    is_query = inside & (heads < HEADS)[:, None]
    tl.store(row_ptr + places, out_first.to(dtype), mask=is_query)
    tl.store(row_ptr + places + HALF, out_second.to(dtype), mask=is_query)
    # One slot, as wide as the heads: Triton 3.9's interpreter joins no mask with a single value.
    slot = tl.load(slots_ptr + token) + tl.zeros_like(heads)
    # Keys of a block, then its values: head h of either is plane h of the block.
    plane = (slot // BLOCK_SIZE) * (2 * KV_HEADS) + (heads - HEADS)
    entry = (plane * BLOCK_SIZE + slot % BLOCK_SIZE)[:, None] * (2 * HALF) + channels[None, :]
    is_cached = inside & ((heads >= HEADS) & (slot >= 0))[:, None]
    tl.store(cache_ptr + entry, out_first.to(dtype), mask=is_cached)
    tl.store(cache_ptr + entry + HALF, out_second.to(dtype), mask=is_cached)


@triton.jit
def silu_mul_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``silu(x[:, :WIDTH]) * x[:, WIDTH:]``, a part of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(x_ptr + row * (2 * WIDTH) + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * WIDTH) + WIDTH + columns, mask=inside, other=0.0)
    product = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, product.to(out_ptr.dtype.element_ty), mask=inside)
