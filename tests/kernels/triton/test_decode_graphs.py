"""Decode from static buffers: the same as one operation after the other, and what makes a graph."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference_pio.kernels.api import DecoderLayer, Kernels
from inference_pio.kernels.context import ContextItem, ForwardContext, build_context
from inference_pio.kernels.reference import ReferenceKernels
from inference_pio.kernels.rope import inverse_frequencies, rope_cos_sin
from inference_pio.kernels.triton import decode_graphs
from inference_pio.kernels.triton.decode_graphs import (
    BATCH_BUCKETS,
    CudaGraphRunner,
    DirectRunner,
    GraphRunner,
    batch_bucket,
)
from inference_pio.kernels.triton.stack import TritonStack
from inference_pio.kernels.triton_kernels import TritonKernels

HEADS, KV_HEADS, DIM, HIDDEN, INNER, LAYERS = 2, 1, 16, 24, 20, 2
EPS = 1e-6
BLOCK_SIZE = 16


class CountingRunner:
    """A runner that says which steps it was given and how often each ran."""

    def __init__(self, inner: GraphRunner) -> None:
        self.inner = inner
        self.runs: list[int] = []

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        number, replay = len(self.runs), self.inner.capture(step)
        self.runs.append(0)

        def counted() -> Tensor:
            self.runs[number] += 1
            return replay()

        return counted


class Decoder:
    """Random layers behind a stack and behind the reference, each with a cache of its own."""

    def __init__(self, device: torch.device, num_blocks: int = 40) -> None:
        self.device = device
        inner = CudaGraphRunner() if device.type == "cuda" else DirectRunner()
        self.runner = CountingRunner(inner)
        kernels = TritonKernels()
        self.stack = TritonStack(kernels, layers_of(kernels, device), EPS, self.runner)
        self.reference = layers_of(ReferenceKernels(), device)
        shape = (num_blocks, 2, KV_HEADS, BLOCK_SIZE, DIM)
        generator = torch.Generator().manual_seed(3)
        caches = [torch.randn(shape, generator=generator) for _ in range(LAYERS)]
        self.caches = tuple(cache.to(device) for cache in caches)
        self.reference_caches = [cache.clone() for cache in self.caches]
        self.frequencies = inverse_frequencies(1e6, DIM, device)

    def check(self, lengths: list[int], new: int = 1, seed: int = 0) -> None:
        """A step over sequences of so many cached tokens equals the reference."""
        context = self.context(lengths, new, seed)
        cos, sin = rope_cos_sin(context.positions_T, self.frequencies)
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(len(lengths) * new, HIDDEN, generator=generator).to(self.device)
        got = self.stack(hidden, context, cos, sin, self.caches)
        expected = self.one_by_one(hidden, context, cos, sin)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        for cache, wanted in zip(self.caches, self.reference_caches, strict=True):
            torch.testing.assert_close(cache, wanted, atol=2e-5, rtol=2e-5)

    def context(self, lengths: list[int], new: int, seed: int) -> ForwardContext:
        blocks = list(range(self.caches[0].shape[0]))
        random.Random(seed).shuffle(blocks)
        items = []
        for length in lengths:
            count = -(-(length + new) // BLOCK_SIZE)
            items.append(ContextItem([blocks.pop() for _ in range(count)], length, new))
        return build_context(items, BLOCK_SIZE, self.device)

    def one_by_one(
        self, hidden_TC: Tensor, context: ForwardContext, cos_TE: Tensor, sin_TE: Tensor
    ) -> Tensor:
        kernels = ReferenceKernels()
        attention = kernels.plan_attention(context)
        for layer, kv in zip(self.reference, self.reference_caches, strict=True):
            qkv = layer.qkv(kernels.rms_norm(hidden_TC, layer.input_norm, EPS))
            q = kernels.qk_norm_rope_write(
                qkv, layer.qk_norm_AD, cos_TE, sin_TE, kv, context.slots_T, EPS
            )
            hidden_TC = layer.attention_out(attention(q, kv), hidden_TC)
            inner = layer.gate_up(kernels.rms_norm(hidden_TC, layer.mlp_norm, EPS))
            hidden_TC = layer.down(inner, hidden_TC)
        return hidden_TC


def layers_of(kernels: Kernels, device: torch.device) -> list[DecoderLayer]:
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(device)

    return [
        DecoderLayer(
            input_norm=1 + normal(HIDDEN),
            qkv=kernels.pack_linear(normal((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)),
            qk_norm_AD=1 + normal(HEADS + KV_HEADS, DIM),
            attention_out=kernels.pack_linear(normal(HIDDEN, HEADS * DIM)),
            mlp_norm=1 + normal(HIDDEN),
            gate_up=kernels.pack_swiglu(normal(INNER, HIDDEN), normal(INNER, HIDDEN)),
            down=kernels.pack_linear(normal(HIDDEN, INNER)),
        )
        for _ in range(LAYERS)
    ]


def test_buckets() -> None:
    assert batch_bucket(1) == 1
    assert [batch_bucket(size) for size in (3, 5, 8, 9, 255)] == [4, 8, 8, 16, 256]
    assert batch_bucket(257) is None
    assert list(BATCH_BUCKETS) == sorted(set(BATCH_BUCKETS))


def test_steps_of_one_bucket_share_a_graph(device: torch.device) -> None:
    decoder = Decoder(device)
    for seed, lengths in enumerate(([5, 17, 40], [0, 18, 41, 3])):
        decoder.check(lengths, seed=seed)
    assert decoder.stack._graphs.captured == {(4, 1)}
    assert decoder.runner.runs == [2]
    decoder.check([7], seed=9)
    decoder.check([150, 3], seed=10)
    assert decoder.stack._graphs.captured == {(4, 1), (1, 1), (2, 4)}
    assert decoder.runner.runs == [2, 1, 1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_that_fill_up_hold_what_earlier_steps_left(device: torch.device) -> None:
    """A full bucket, even with NaN in it, leaves nothing to the smaller batch after it."""
    decoder = Decoder(device)
    decoder.check([5, 17, 40, 9])
    context = decoder.context([5, 17, 40, 9], 1, 0)
    cos, sin = rope_cos_sin(context.positions_T, decoder.frequencies)
    hidden = torch.full((4, HIDDEN), float("nan"), device=device)
    kept = [cache.clone() for cache in decoder.caches]
    decoder.stack(hidden, context, cos, sin, decoder.caches)
    for cache, before in zip(decoder.caches, kept, strict=True):
        cache.copy_(before)
    decoder.check([6, 18, 41], seed=1)


def test_results_outlive_the_next_step(device: torch.device) -> None:
    decoder = Decoder(device)
    context = decoder.context([5, 6], 1, 0)
    cos, sin = rope_cos_sin(context.positions_T, decoder.frequencies)
    hidden = torch.ones(2, HIDDEN, device=device)
    first = decoder.stack(hidden, context, cos, sin, decoder.caches)
    kept = first.clone()
    decoder.stack(hidden * 2, context, cos, sin, decoder.caches)
    assert torch.equal(first, kept)


def test_other_steps_run_without_a_graph(device: torch.device) -> None:
    decoder = Decoder(device)
    decoder.check([0, 7], new=3)
    assert decoder.runner.runs == []


def test_too_many_rows_run_without_a_graph(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "BATCH_BUCKETS", (1, 2))
    decoder = Decoder(device)
    decoder.check([4, 7, 9])
    assert decoder.runner.runs == []


def test_tables_that_do_not_fit_make_room(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "TABLE_ENTRIES", 4)
    decoder = Decoder(device)
    decoder.check([5, 17])
    decoder.check([20, 18], seed=1)
    assert decoder.runner.runs == [2]
    decoder.check([70, 18], seed=2)
    assert decoder.runner.runs == [2, 1]
    assert decoder.stack._graphs.captured == {(2, 1)}
    decoder.check([5, 17], seed=3)
    assert decoder.runner.runs == [2, 2]


def test_another_cache_drops_the_graphs(device: torch.device) -> None:
    decoder = Decoder(device)
    decoder.check([5])
    decoder.caches = tuple(cache.clone() for cache in decoder.caches)
    decoder.check([6], seed=1)
    assert decoder.runner.runs == [1, 1]
    assert decoder.stack._graphs.captured == {(1, 1)}


def test_a_cache_for_each_layer(device: torch.device) -> None:
    decoder = Decoder(device)
    decoder.caches = decoder.caches * 2
    with pytest.raises(ValueError, match="4 layers of KV came for 2 layers"):
        decoder.check([5])
