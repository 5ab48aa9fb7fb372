"""A whole stack of layers in one call, against the same layers one operation at a time."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.kernels.api import DecoderLayer, Kernels
from inference_pio.kernels.context import ContextItem, ForwardContext, build_context
from inference_pio.kernels.kv_layer import CodedKV, KVCodes, KVLayer
from inference_pio.kernels.native.forward import NativeStack
from inference_pio.kernels.native.library import KernelError, cpu_flags, load, usable
from inference_pio.kernels.native_kernels import NativeKernels
from inference_pio.kernels.reference import ReferenceKernels
from inference_pio.kernels.rope import inverse_frequencies, rope_cos_sin

from ..coded_samples import empty_layer, unused

CPU = torch.device("cpu")
EPS = 1e-6
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
SETS = usable(cpu_flags())
Steps = Sequence[Sequence[tuple[int, int]]]
"""For each step its (sequence, number of new tokens)."""

pytestmark = pytest.mark.skipif(not SETS, reason="no native kernels for this CPU")


@dataclass(frozen=True)
class Shape:
    num_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    biased: bool = False
    num_layers: int = 2


SHAPES = {
    "6/3 heads of 24": Shape(6, 3, 24, 100, 52),
    "5/1 heads of 32, biases": Shape(5, 1, 32, 33, 129, biased=True),
    "4/4 heads of 80": Shape(4, 4, 80, 130, 64),
    "16/8 heads of 128": Shape(16, 8, 128, 192, 320),
}


def layer_weights(shape: Shape, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=rng) * scale).to(dtype)

    queries = shape.num_heads * shape.head_dim
    rows = queries + 2 * shape.kv_heads * shape.head_dim
    return [
        {
            "input_norm": 1 + normal(shape.hidden, scale=0.2),
            "qkv": normal(rows, shape.hidden, scale=shape.hidden**-0.5),
            "qkv_bias": normal(rows, scale=0.3),
            "qk_norm": 1 + normal(shape.num_heads + shape.kv_heads, shape.head_dim).float() * 0.2,
            "attention_out": normal(shape.hidden, queries, scale=0.5 * queries**-0.5),
            "mlp_norm": 1 + normal(shape.hidden, scale=0.2),
            "gate": normal(shape.inner, shape.hidden, scale=shape.hidden**-0.5),
            "up": normal(shape.inner, shape.hidden, scale=shape.hidden**-0.5),
            "down": normal(shape.hidden, shape.inner, scale=shape.inner**-0.5),
        }
        for _ in range(shape.num_layers)
    ]


def pack_layers(kernels: Kernels, shape: Shape, dtype: torch.dtype) -> list[DecoderLayer]:
    softmax_scale = torch.ones(shape.num_heads + shape.kv_heads, 1)
    softmax_scale[: shape.num_heads] = shape.head_dim**-0.5
    return [
        DecoderLayer(
            input_norm=w["input_norm"],
            qkv=kernels.pack_linear(w["qkv"], w["qkv_bias"] if shape.biased else None),
            qk_norm_AD=w["qk_norm"] * softmax_scale,
            attention_out=kernels.pack_linear(w["attention_out"]),
            mlp_norm=w["mlp_norm"],
            gate_up=kernels.pack_swiglu(w["gate"], w["up"]),
            down=kernels.pack_linear(w["down"]),
        )
        for w in layer_weights(shape, dtype)
    ]


def one_by_one(
    kernels: Kernels,
    layers: Sequence[DecoderLayer],
    hidden_TC: Tensor,
    context: ForwardContext,
    cos_TE: Tensor,
    sin_TE: Tensor,
    kv_layers: Sequence[KVLayer],
) -> Tensor:
    """What a stack does, one operation after the other."""
    attention = kernels.plan_attention(context)
    for layer, kv in zip(layers, kv_layers, strict=True):
        qkv = layer.qkv(kernels.rms_norm(hidden_TC, layer.input_norm, EPS))
        q = kernels.qk_norm_rope_write(
            qkv, layer.qk_norm_AD, cos_TE, sin_TE, kv, context.slots_T, EPS
        )
        hidden_TC = layer.attention_out(attention(q, kv), hidden_TC)
        inner = layer.gate_up(kernels.rms_norm(hidden_TC, layer.mlp_norm, EPS))
        hidden_TC = layer.down(inner, hidden_TC)
    return hidden_TC.float()


class Engine:
    """Layers of one implementation over a cache whose unused parts hold NaN."""

    def __init__(
        self,
        kernels: Kernels,
        shape: Shape,
        dtype: torch.dtype,
        *,
        stacked: bool = True,
        codes: KVCodes | None = None,
    ) -> None:
        self.kernels, self.shape, self.dtype, self.codes = kernels, shape, dtype, codes
        self.layers = pack_layers(kernels, shape, dtype)
        self.stack = kernels.stack(self.layers, EPS) if stacked else None
        self.frequencies = inverse_frequencies(1e6, shape.head_dim, CPU)

    def run(self, steps: Steps, block_size: int = 16, first: int = 0) -> dict[int, Tensor]:
        """Hidden states of each sequence's tokens, positions counted from ``first``."""
        total: dict[int, int] = {}
        for sequence, count in (part for step in steps for part in step):
            total[sequence] = total.get(sequence, 0) + count
        blocks = list(range(sum(-(-n // block_size) for n in total.values()) + 2))
        size = (len(blocks), self.shape.kv_heads, block_size, self.shape.head_dim)
        every_row = torch.ones(len(blocks), block_size, dtype=torch.bool)
        random.Random(1).shuffle(blocks)
        caches = [empty_layer(size, self.codes, self.dtype) for _ in self.layers]
        for cache in caches:
            unused(cache, every_row)
        tables = {
            sequence: [blocks.pop() for _ in range(-(-count // block_size))]
            for sequence, count in total.items()
        }
        done = dict.fromkeys(total, 0)
        found: dict[int, list[Tensor]] = {sequence: [] for sequence in total}
        for step in steps:
            items = [ContextItem(tables[s], done[s], count) for s, count in step]
            context = build_context(items, block_size, CPU)
            for cache in caches:
                data = cache.data_N2KB if isinstance(cache, CodedKV) else cache
                data[list(context.new_partial_blocks)] = 0
            hidden = torch.cat([self.tokens(s)[done[s] : done[s] + count] for s, count in step])
            rows = self.step(hidden, context, caches, first).split([n for _, n in step])
            for (sequence, count), part in zip(step, rows, strict=True):
                found[sequence].append(part)
                done[sequence] += count
        return {sequence: torch.cat(parts) for sequence, parts in found.items()}

    def step(
        self, hidden: Tensor, context: ForwardContext, caches: Sequence[KVLayer], first: int = 0
    ) -> Tensor:
        cos, sin = rope_cos_sin(context.positions_T + first, self.frequencies)
        if self.stack is not None:
            return self.stack(hidden, context, cos, sin, caches)
        return one_by_one(self.kernels, self.layers, hidden, context, cos, sin, caches)

    def tokens(self, sequence: int) -> Tensor:
        rng = torch.Generator().manual_seed(sequence + 100)
        return torch.randn(700, self.shape.hidden, generator=rng).to(self.dtype)


def native(name: str, threads: int = 2) -> NativeKernels:
    return NativeKernels(load(name), threads)


def close(got: dict[int, Tensor], expected: dict[int, Tensor], dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    for sequence, rows in expected.items():
        assert got[sequence].dtype == torch.float32
        torch.testing.assert_close(got[sequence], rows, atol=tolerance, rtol=tolerance)


def same(got: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[sequence], rows) for sequence, rows in expected.items())


BATCHES: dict[str, Steps] = {
    "one token": [[(0, 1)]],
    "a prompt, then decode": [[(0, 37)], [(0, 1)], [(0, 1)]],
    "chunks and decode rows mixed": [
        [(0, 16), (1, 3)],
        [(1, 1), (0, 17), (2, 40)],
        [(0, 1), (2, 1), (1, 1), (3, 1)],
        [(3, 5), (2, 1)],
    ],
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("batch", list(BATCHES))
def test_a_stack_equals_the_reference(
    name: str, dtype: torch.dtype, shape: str, batch: str
) -> None:
    expected = Engine(ReferenceKernels(), SHAPES[shape], dtype).run(BATCHES[batch])
    got = Engine(native(name), SHAPES[shape], dtype).run(BATCHES[batch])
    close(got, expected, dtype)


MIXED = BATCHES["chunks and decode rows mixed"]


@functools.cache
def reference_of_mixed(codes: KVCodes | None) -> dict[int, Tensor]:
    shape = SHAPES["6/3 heads of 24"]
    return Engine(ReferenceKernels(), shape, torch.float32, codes=codes).run(MIXED)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_a_stack_over_codes_equals_the_reference(name: str, codes: KVCodes) -> None:
    """A key between two codes may take the other one, so not every element is near."""
    got = Engine(native(name), SHAPES["6/3 heads of 24"], torch.float32, codes=codes).run(MIXED)
    for sequence, rows in reference_of_mixed(codes).items():
        error = (got[sequence] - rows).norm() / rows.norm()
        rounding = (reference_of_mixed(None)[sequence] - rows).norm() / rows.norm()
        assert error < 2e-4
        assert 1e-3 < rounding < (1e-2 if codes == "int8" else 5e-2)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_one_by_one_gives_the_same_over_codes(name: str, codes: KVCodes) -> None:
    kernels, shape = native(name), SHAPES["4/4 heads of 80"]
    alone = Engine(kernels, shape, torch.float32, stacked=False, codes=codes).run(MIXED)
    same(Engine(kernels, shape, torch.float32, codes=codes).run(MIXED), alone)


@pytest.mark.parametrize("name", SETS)
def test_far_positions(name: str) -> None:
    shape = SHAPES["6/3 heads of 24"]
    steps = BATCHES["chunks and decode rows mixed"]
    expected = Engine(ReferenceKernels(), shape, torch.float32).run(steps, first=40_000)
    close(
        Engine(native(name), shape, torch.float32).run(steps, first=40_000), expected, torch.float32
    )


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block_size", [1, 8, 24, 64])
def test_any_block_size(name: str, block_size: int) -> None:
    shape, steps = SHAPES["5/1 heads of 32, biases"], BATCHES["chunks and decode rows mixed"]
    expected = Engine(ReferenceKernels(), shape, torch.float32).run(steps)
    engine = Engine(native(name), shape, torch.float32)
    close(engine.run(steps, block_size), expected, torch.float32)
    close(engine.run(steps, 16), expected, torch.float32)  # the same stack over another cache


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_number_of_threads_changes_nothing(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES["6/3 heads of 24"]
    steps = [[(0, 300), (1, 2)], *BATCHES["chunks and decode rows mixed"]]
    runs = [Engine(native(name, threads), shape, dtype).run(steps) for threads in (1, 2, 3)]
    same(runs[1], runs[0])
    same(runs[2], runs[0])


@pytest.mark.parametrize("name", SETS)
def test_one_by_one_gives_the_same_in_float32(name: str) -> None:
    steps = BATCHES["chunks and decode rows mixed"]
    for shape in SHAPES.values():
        kernels = native(name)
        alone = Engine(kernels, shape, torch.float32, stacked=False).run(steps)
        same(Engine(kernels, shape, torch.float32).run(steps), alone)


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    length=st.integers(2, 150),
    codes=st.sampled_from([None, "int8", "fp8"]),
)
def test_chunks_and_neighbours_change_nothing_in_float32(
    name: str, seed: int, length: int, codes: KVCodes | None
) -> None:
    rng = random.Random(seed)
    engine = Engine(native(name), SHAPES["6/3 heads of 24"], torch.float32, codes=codes)
    steps, done = [], 0
    while done < length:
        count = min(rng.choice([1, 2, 15, 16, 33, 64]), length - done)
        others = [(i, rng.choice([1, 1, 7, 30])) for i in range(1, rng.randrange(1, 4))]
        place = rng.randint(0, len(others))
        steps.append([*others[:place], (0, count), *others[place:]])
        done += count
    assert torch.equal(engine.run(steps)[0], engine.run([[(0, length)]])[0])


@pytest.mark.parametrize("name", SETS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), length=st.integers(2, 150))
def test_neighbours_change_nothing_in_bfloat16(name: str, seed: int, length: int) -> None:
    rng = random.Random(seed)
    engine = Engine(native(name), SHAPES["6/3 heads of 24"], torch.bfloat16)
    alone: Steps = []
    beside: Steps = []
    done = 0
    while done < length:
        count = min(rng.choice([1, 2, 15, 16, 33, 64]), length - done)
        others = [(i, rng.choice([1, 1, 7, 30])) for i in range(1, rng.randrange(1, 4))]
        place = rng.randint(0, len(others))
        alone.append([(0, count)])
        beside.append([*others[:place], (0, count), *others[place:]])
        done += count
    assert torch.equal(engine.run(beside)[0], engine.run(alone)[0])


@pytest.mark.parametrize("name", SETS)
def test_buffers_serve_small_steps_after_large_ones(name: str) -> None:
    engine = Engine(native(name), SHAPES["4/4 heads of 80"], torch.float32)
    small: Steps = [[(0, 3)]]
    before = engine.run(small)
    engine.run([[(0, 600)]])
    same(engine.run(small), before)


def test_what_the_weights_lie_in_is_kept() -> None:
    shape = SHAPES["6/3 heads of 24"]
    engine = Engine(native(SETS[0]), shape, torch.float32)
    before = engine.run([[(0, 20)]])
    engine.layers = []  # the stack holds them
    assert engine.stack is not None
    context = build_context([ContextItem([0, 1], 0, 20)], 16, CPU)
    caches = [torch.zeros(2, 2, 3, 16, 24) for _ in range(shape.num_layers)]
    same({0: engine.step(engine.tokens(0)[:20], context, caches)}, before)


class Step:
    """The operands of a small step, to be spoilt one by one."""

    def __init__(self) -> None:
        self.shape = SHAPES["6/3 heads of 24"]
        self.engine = Engine(native(SETS[0]), self.shape, torch.float32)
        self.context = build_context([ContextItem([2, 0], 10, 7)], 16, CPU)
        self.hidden = torch.zeros(7, self.shape.hidden)
        self.caches = [torch.zeros(3, 2, 3, 16, 24) for _ in range(self.shape.num_layers)]
        self.first_layer = 0

    def run(self) -> None:
        cos, sin = rope_cos_sin(self.context.positions_T, self.engine.frequencies)
        self.engine.stack(
            self.hidden, self.context, cos, sin, self.caches, first_layer=self.first_layer
        )


def test_blocks_and_slots_that_the_cache_has_not_are_refused() -> None:
    of_table, of_slot = "holds block {}; the cache has blocks 0 to 2", "no block {} in a cache of 3"
    for change, said in (
        ({"block_tables": ((3, 0),)}, of_table.format(3)),
        ({"block_tables": ((2, -1),)}, of_table.format(-1)),
        ({"slots_T": torch.full((7,), 48)}, of_slot.format(3)),
        ({"slots_T": torch.full((7,), -1)}, of_slot.format(-1)),
    ):
        step = Step()
        step.run()
        step.context = replace(step.context, **change)
        with pytest.raises(KernelError, match=said):
            step.run()


def test_operands_of_another_shape_are_refused() -> None:
    step = Step()
    for hidden in (torch.zeros(6, 100), torch.zeros(7, 99)):
        step.hidden = hidden
        with pytest.raises(ValueError, match="hidden_TC is"):
            step.run()
    step = Step()
    for caches in (
        [cache.to(torch.bfloat16) for cache in step.caches],
        [cache.transpose(2, 3) for cache in step.caches],
        [step.caches[0], step.caches[1][:2]],
        [torch.zeros(3, 2, 3, 8, 24)] * 2,
        [step.caches[0], empty_layer((3, 3, 16, 24), "int8", torch.float32)],
    ):
        step.caches = caches
        with pytest.raises(ValueError, match=r"kv_N2KSD is|the cache (is|has)"):
            step.run()
    caches = step.caches[:1]
    for wrong, first in ((caches * 3, 0), (caches * 2, 1), (caches, -1), (caches, 2), ([], 0)):
        step.caches, step.first_layer = wrong, first
        with pytest.raises(ValueError, match=f"{len(wrong)} layers of KV came for 2"):
            step.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_in_parts_gives_what_it_gives_whole(dtype: torch.dtype) -> None:
    kernels, shape = native(SETS[0]), SHAPES["6/3 heads of 24"]
    whole, parts = Engine(kernels, shape, dtype), Engine(kernels, shape, dtype)
    stack = parts.stack
    assert stack is not None

    def by_parts(
        hidden: Tensor, context: ForwardContext, cos: Tensor, sin: Tensor, caches: Sequence[Tensor]
    ) -> Tensor:
        for layer, cache in enumerate(caches):
            hidden = stack(hidden, context, cos, sin, [cache], first_layer=layer)
        return hidden

    parts.stack = by_parts
    steps = [[(0, 20), (1, 3)], [(0, 1), (1, 1)]]
    same(parts.run(steps), whole.run(steps))


def test_layers_that_do_not_fit_each_other_are_refused() -> None:
    kernels = native(SETS[0])
    [first, second] = pack_layers(kernels, SHAPES["6/3 heads of 24"], torch.float32)
    other = pack_layers(kernels, SHAPES["4/4 heads of 80"], torch.float32)[0]
    library, team = load(SETS[0]), load(SETS[0]).team(2)
    for part in ("qkv", "attention_out", "gate_up", "down"):
        wrong = replace(second, **{part: getattr(other, part)})
        with pytest.raises(KernelError, match=f"{part}'s (in|out)put is [0-9]+ wide"):
            NativeStack(library, team, [first, wrong], EPS)
    for part in ("input_norm", "mlp_norm", "qk_norm_AD"):
        wrong = replace(second, **{part: getattr(other, part)})
        with pytest.raises(ValueError, match=f"{part} is"):
            NativeStack(library, team, [first, wrong], EPS)
