"""Every kernel on the device against the reference, computed there in float32 from the same values.

An error is the largest difference of any element, over the largest element of the reference: a
share that does not depend on sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.api import DecoderLayer, Kernels
from ..kernels.context import ContextItem, ForwardContext, build_context
from ..kernels.quantized import QuantizedWeight
from ..kernels.reference import ReferenceKernels
from ..kernels.rope import inverse_frequencies, rope_cos_sin
from ..kernels.sampling.api import Draw
from ..workers.model.config import ModelConfig
from ..workers.model.quantization.quantize import MADE_FORMATS, quantize
from .report import Figure, Row

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""What rounding gives at most, by dtype."""
W8A8_TOLERANCE = 3e-2
"""Where activations are rounded to int8 as well."""
EXACT = 1e-12
"""Of what is the same bit for bit: less than one token id beside another."""
EPS = 1e-6
REFERENCE = ReferenceKernels()
DRAWS = [
    Draw(),
    Draw.of(0.6, 20, 0.95, 0.0, 0.7),
    Draw.of(1.0, 0, 1.0, 0.0, 0.5),
    Draw.of(1.0, 0, 0.95, 0.0, 0.9),
    Draw.of(2.0, 0, 1.0, 0.05, 0.3),
    Draw.of(1.0, 5000, 0.9, 0.001, 0.99),
]
"""One of every way to a token."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the operations to check."""

    hidden: int
    inner: int
    num_heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 64
    lengths: tuple[tuple[int, int], ...] = ((700, 1), (3, 1), (64, 1), (0, 200), (500, 70))
    """Cached and new tokens of each sequence."""
    rows: tuple[int, ...] = (1, 8, 300)
    """Of products."""
    vocabulary: int = 151_936
    """Of logits that are sampled."""

    @classmethod
    def of(cls, config: ModelConfig) -> Sizes:
        """A model's own."""
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True, slots=True)
class Checked:
    """One operation's error and what it may be."""

    operation: str
    error: float
    tolerance: float


def check_all(
    kernels: Kernels, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> list[Checked]:
    """Every operation once; nothing is raised for an error that is too large."""
    tensors = _Random(dtype, device)
    with torch.inference_mode():
        found = [
            Checked(name, _error(got, expected), tolerance or TOLERANCE[dtype])
            for part in (_rows, _attention, _linears, _quantized, _stack, _sampling)
            for name, got, expected, tolerance in part(kernels, sizes, tensors)
        ]
    worst: dict[str, Checked] = {}
    for one in found:
        if one.operation not in worst or not one.error <= worst[one.operation].error:
            worst[one.operation] = one
    return list(worst.values())


def parity_rows(checked: list[Checked], precision: str, kernels: str, command: str) -> list[Row]:
    """A row for each operation."""
    return [
        Row.of(
            Figure(one.error, one.error, one.error),
            benchmark="gpu",
            system=f"{kernels} / reference",
            precision=precision,
            case=one.operation,
            unit="largest error",
            command=command,
        )
        for one in checked
    ]


def require_parity(checked: list[Checked]) -> None:
    """Raise ``ValueError`` that names each operation whose error is too large."""
    wrong = [one for one in checked if not one.error <= one.tolerance]
    if wrong:
        raise ValueError(
            "kernels differ from the reference on this device: "
            + "; ".join(f"{w.operation} by {w.error:.2g}, at most {w.tolerance:g}" for w in wrong)
        )


Outcome = tuple[str, Tensor, Tensor, float | None]
"""Operation, what came out, what had to, and a tolerance of its own."""


class _Random:
    """Reproducible values, made on the CPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=self._generator) * scale
        return made.to(dtype or self.dtype).to(self.device)


def _rows(kernels: Kernels, sizes: Sizes, tensors: _Random) -> Iterator[Outcome]:
    x = tensors.normal(7, sizes.hidden, scale=3.0)
    weight = 1 + tensors.normal(sizes.hidden, scale=0.2)
    expected = REFERENCE.rms_norm(x.float(), weight.float(), EPS)
    yield "RMSNorm", kernels.rms_norm(x, weight, EPS), expected, None
    context = _context(sizes, sizes.lengths, tensors.device)
    cos, sin = _angles(context, sizes)
    qkv = tensors.normal(context.query_starts[-1], _qkv_width(sizes))
    norms = 1 + tensors.normal(
        sizes.num_heads + sizes.kv_heads, sizes.head_dim, scale=0.2, dtype=torch.float32
    )
    caches = [_cache(sizes, tensors, dtype) for dtype in (tensors.dtype, torch.float32)]
    for cache in caches:
        cache.zero_()
    slots = context.slots_T
    expected = REFERENCE.qk_norm_rope_write(qkv.float(), norms, cos, sin, caches[1], slots, EPS)
    got = kernels.qk_norm_rope_write(qkv, norms, cos, sin, caches[0], slots, EPS)
    yield "QK-norm, RoPE", got, expected, None
    yield "KV write", caches[0], caches[1], None


def _attention(kernels: Kernels, sizes: Sizes, tensors: _Random) -> Iterator[Outcome]:
    decode = tuple(pair for pair in sizes.lengths if pair[1] == 1)
    prefill = tuple(pair for pair in sizes.lengths if pair[1] > 1)
    batches = {"decode": decode, "prefill": prefill, "mixed": sizes.lengths}
    for name, lengths in batches.items():
        context = _context(sizes, lengths, tensors.device)
        cache = _cache(sizes, tensors, tensors.dtype)
        shape = context.query_starts[-1], sizes.num_heads, sizes.head_dim
        q = tensors.normal(*shape, scale=sizes.head_dim**-0.5)
        expected = REFERENCE.plan_attention(context)(q.float(), cache.float())
        got = kernels.plan_attention(context)(q, cache)
        yield f"attention, {name}", got, expected, None


def _linears(kernels: Kernels, sizes: Sizes, tensors: _Random) -> Iterator[Outcome]:
    scale = sizes.hidden**-0.5
    gate, up = (tensors.normal(sizes.inner, sizes.hidden, scale=scale) for _ in range(2))
    linear, swiglu = kernels.pack_linear(gate), kernels.pack_swiglu(gate, up)
    for count in sizes.rows:
        x = tensors.normal(count, sizes.hidden)
        residual = tensors.normal(count, sizes.inner)
        product = x.float() @ gate.float().T
        yield "linear", linear(x), product, None
        yield "linear", linear(x, residual), product + residual.float(), None
        yield "linear, float32 out", linear.in_float32(x), product, None
        expected = torch.nn.functional.silu(product) * (x.float() @ up.float().T)
        yield "SwiGLU", swiglu(x), expected, None


def _quantized(kernels: Kernels, sizes: Sizes, tensors: _Random) -> Iterator[Outcome]:
    scale = sizes.hidden**-0.5
    plain = tensors.normal(sizes.inner, sizes.hidden, scale=scale, dtype=torch.float32)
    weights = {format: quantize(plain, format) for format in MADE_FORMATS}
    groups = -(-sizes.hidden // 128)
    blocks = QuantizedWeight(
        format="fp8",
        shape=(sizes.inner, sizes.hidden),
        codes=(plain * 64).to(torch.float8_e4m3fn),
        scales_OG=torch.full((sizes.inner, groups), 1 / 64, device=tensors.device),
        group_size=128,
    )
    for name, weight in (*weights.items(), ("fp8", blocks)):
        linear = kernels.pack_quantized(weight, None, tensors.dtype)
        if linear is None:
            continue  # it is dequantized: "linear" covers it
        dense = weight.dequantize()
        for count in sizes.rows:
            x = tensors.normal(count, sizes.hidden)
            tolerance = W8A8_TOLERANCE if weight.int8_activations else None
            yield f"{name} linear", linear(x), x.float() @ dense.T, tolerance


def _stack(kernels: Kernels, sizes: Sizes, tensors: _Random) -> Iterator[Outcome]:
    """A layer as the model runs it, decode twice: once to capture a graph, once to replay it."""
    queries = sizes.num_heads * sizes.head_dim
    weights = {
        "qkv": tensors.normal(_qkv_width(sizes), sizes.hidden, scale=sizes.hidden**-0.5),
        "attention_out": tensors.normal(sizes.hidden, queries, scale=queries**-0.5),
        "gate": tensors.normal(sizes.inner, sizes.hidden, scale=sizes.hidden**-0.5),
        "up": tensors.normal(sizes.inner, sizes.hidden, scale=sizes.hidden**-0.5),
        "down": tensors.normal(sizes.hidden, sizes.inner, scale=sizes.inner**-0.5),
    }
    heads = sizes.num_heads + sizes.kv_heads
    norms = 1 + tensors.normal(heads, sizes.head_dim, scale=0.2, dtype=torch.float32)
    norms[: sizes.num_heads] *= sizes.head_dim**-0.5
    ones = torch.ones(sizes.hidden, device=tensors.device)

    def layer(packing: Kernels, change: Callable[[Tensor], Tensor]) -> DecoderLayer:
        w = {name: change(weight) for name, weight in weights.items()}
        norm = ones.to(w["qkv"].dtype)
        return DecoderLayer(
            input_norm=norm,
            qkv=packing.pack_linear(w["qkv"]),
            qk_norm_AD=norms,
            attention_out=packing.pack_linear(w["attention_out"]),
            mlp_norm=norm,
            gate_up=packing.pack_swiglu(w["gate"], w["up"]),
            down=packing.pack_linear(w["down"]),
        )

    stack = kernels.stack([layer(kernels, lambda weight: weight)], EPS)
    if stack is None:
        return
    plain = layer(REFERENCE, lambda weight: weight.float())
    cache = _cache(sizes, tensors, tensors.dtype)
    layers = (cache.clone(),)
    decode = tuple(pair for pair in sizes.lengths if pair[1] == 1)
    for name, lengths in (("decode", decode), ("decode", decode), ("mixed", sizes.lengths)):
        context = _context(sizes, lengths, tensors.device)
        cos, sin = _angles(context, sizes)
        hidden = tensors.normal(context.query_starts[-1], sizes.hidden)
        layers[0].copy_(cache)
        got = stack(hidden, context, cos, sin, layers)
        yield f"layer, {name}", got, _one_layer(plain, hidden, context, cos, sin, cache), None


def _sampling(kernels: Kernels, sizes: Sizes, tensors: _Random) -> Iterator[Outcome]:
    """Tokens and log-probabilities; logits rounded to sixteenths have many equals."""
    logits = tensors.normal(len(DRAWS), sizes.vocabulary, scale=3.0, dtype=torch.float32)
    logits[1::2] = (logits[1::2] * 16).round() / 16
    mine, reference, size = kernels.sampling, REFERENCE.sampling, sizes.vocabulary
    for draws in (DRAWS, *([draw] for draw in DRAWS)):
        some = logits[: len(draws)]
        expected = reference.sample(some.cpu().clone(), size, draws, [])
        yield "sampling", mine.sample(some.clone(), size, draws, []).cpu(), expected, EXACT
    sums = reference.log_sums(logits.cpu(), size)
    yield "log-probabilities", mine.log_sums(logits, size).cpu(), sums, EXACT
    best = mine.top_tokens(logits, size, 20)[1].cpu()
    yield "log-probabilities", best, reference.top_tokens(logits.cpu(), size, 20)[1], EXACT


def _one_layer(
    layer: DecoderLayer,
    hidden_TC: Tensor,
    context: ForwardContext,
    cos_TE: Tensor,
    sin_TE: Tensor,
    cache: Tensor,
) -> Tensor:
    kv, hidden_TC = cache.float(), hidden_TC.float()
    qkv = layer.qkv(REFERENCE.rms_norm(hidden_TC, layer.input_norm, EPS))
    q = REFERENCE.qk_norm_rope_write(
        qkv, layer.qk_norm_AD, cos_TE, sin_TE, kv, context.slots_T, EPS
    )
    hidden_TC = layer.attention_out(REFERENCE.plan_attention(context)(q, kv), hidden_TC)
    inner = layer.gate_up(REFERENCE.rms_norm(hidden_TC, layer.mlp_norm, EPS))
    return layer.down(inner, hidden_TC)


def _context(
    sizes: Sizes, lengths: tuple[tuple[int, int], ...], device: torch.device
) -> ForwardContext:
    blocks = iter(range(_num_blocks(sizes)))
    items = [
        ContextItem(
            [next(blocks) for _ in range(-(-(computed + new) // sizes.block_size))], computed, new
        )
        for computed, new in lengths
    ]
    return build_context(items, sizes.block_size, device)


def _num_blocks(sizes: Sizes) -> int:
    return sum(-(-(computed + new) // sizes.block_size) for computed, new in sizes.lengths)


def _cache(sizes: Sizes, tensors: _Random, dtype: torch.dtype) -> Tensor:
    shape = _num_blocks(sizes), 2, sizes.kv_heads, sizes.block_size, sizes.head_dim
    return tensors.normal(*shape, dtype=dtype)


def _angles(context: ForwardContext, sizes: Sizes) -> tuple[Tensor, Tensor]:
    frequencies = inverse_frequencies(1e6, sizes.head_dim, context.positions_T.device)
    return rope_cos_sin(context.positions_T, frequencies)


def _qkv_width(sizes: Sizes) -> int:
    return (sizes.num_heads + 2 * sizes.kv_heads) * sizes.head_dim


def _error(got: Tensor, expected: Tensor) -> float:
    difference = (got.double() - expected.view(got.shape).double()).abs().max()
    return float(difference / expected.abs().max())
