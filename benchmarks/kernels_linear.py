"""The packed linears of a layer and the output layer, in every format that the kernels keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..kernels.quantized import QuantizedWeight
from ..workers.model.quantization.quantize import HEAD_FORMATS, MadeFormat, quantize
from .floor import Work
from .kernels import Call, Candidate, Case, Setup, num_calls

ROWS = (1, 8, 32, 128, 512)
LAYER = ("qkv", "out", "gate_up", "down")
OPERATIONS = ("layer", *LAYER, "output")
_HUGE_PAGE = 2 << 20
"""What the smallest weight takes where kernels put weights on huge pages."""

Format = Literal["none"] | MadeFormat
Weight = Tensor | QuantizedWeight
Packed = Callable[..., Tensor]
"""A packed linear, as a step calls it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One linear: its shape, and how a step calls it."""

    name: str
    outputs: int
    inputs: int
    use: Literal["store", "add", "swiglu", "float32"] = "store"

    @property
    def weights(self) -> int:
        """Matrices of that shape."""
        return 2 if self.use == "swiglu" else 1

    @property
    def parameters(self) -> int:
        return self.weights * self.outputs * self.inputs


def parts_of(setup: Setup, operation: str) -> list[Part]:
    """The linears of an operation: one, or all of a layer."""
    shapes = setup.shapes
    queries = shapes.num_heads * shapes.head_dim
    keys_and_values = 2 * shapes.num_kv_heads * shapes.head_dim
    hidden, inner = shapes.hidden_size, shapes.intermediate_size
    parts = {
        part.name: part
        for part in (
            Part("qkv", queries + keys_and_values, hidden),
            Part("out", hidden, queries, "add"),
            Part("gate_up", inner, hidden, "swiglu"),
            Part("down", hidden, inner, "add"),
            Part("output", shapes.vocab_size, hidden, "float32"),
        )
    }
    return [parts[name] for name in (LAYER if operation == "layer" else (operation,))]


def linear_cases(
    setup: Setup,
    operations: Sequence[str],
    formats: Sequence[Format],
    notes: list[str],
    *,
    rows: Sequence[int] = ROWS,
) -> Iterator[Case]:
    """A case for each operation and number of rows, with a candidate for each format.

    Formats that the kernels do not keep are left out, with a line in ``notes``.
    """
    for operation in operations:
        parts = parts_of(setup, operation)
        packed: dict[Format, _Sets] = {}
        for format in _formats(formats, operation):
            if (made := _pack_sets(setup, parts, format)) is not None:
                packed[format] = made
                del made
            else:
                note = f"{setup.kernels.name} kernels bring {format} to {setup.precision}"
                notes += [note] if note not in notes else []
        for count in rows:
            inputs = _inputs(setup, parts, count)
            if packed:
                yield Case(
                    f"{operation}, {count} rows",
                    [sets.candidate(name, setup, inputs) for name, sets in packed.items()],
                )


def _formats(formats: Sequence[Format], operation: str) -> Sequence[Format]:
    """Those of an operation: the output layer has formats of its own."""
    if operation != "output":
        return formats
    return tuple(dict.fromkeys("none" if f == "none" else HEAD_FORMATS[f] for f in formats))


Inputs = Mapping[int, Tensor]
"""By width."""


@dataclass(frozen=True, slots=True)
class _Sets:
    """Packed linears of as many layers as the working set holds."""

    parts: Sequence[Part]
    num_bytes: int
    """Of one layer's weights."""
    layers: Sequence[Sequence[Packed]]

    def candidate(self, format: Format, setup: Setup, inputs: Inputs) -> Candidate:
        name = setup.precision if format == "none" else format
        parameters = sum(part.parameters for part in self.parts)
        count = len(next(iter(inputs.values())))
        # Activations stay in the caches; logits do not.
        logits = sum(part.outputs for part in self.parts if part.use == "float32")
        return Candidate(
            name,
            name,
            Work(self.num_bytes + 4 * logits * count, parameters * count),
            [self._call(layer, inputs) for layer in self.layers],
        )

    def _call(self, layer: Sequence[Packed], inputs: Inputs) -> Call:
        pairs = zip(self.parts, layer, strict=True)
        calls = [partial(packed, *_operands(part, inputs)) for part, packed in pairs]
        return calls[0] if len(calls) == 1 else partial(_in_a_row, calls)


def _pack_sets(setup: Setup, parts: Sequence[Part], format: Format) -> _Sets | None:
    weights = [[_weight(setup, part, format) for _ in range(part.weights)] for part in parts]
    num_bytes = sum(_num_bytes(weight) for own in weights for weight in own)
    in_memory = sum(max(_HUGE_PAGE, sum(map(_num_bytes, own))) for own in weights)
    layers = []
    for _ in range(num_calls(in_memory)):
        packed = [_pack(setup, part, own) for part, own in zip(parts, weights, strict=True)]
        kept = [one for one in packed if one is not None]
        if len(kept) < len(parts):
            return None
        layers.append(kept)
    return _Sets(parts, num_bytes, layers)


def _weight(setup: Setup, part: Part, format: Format) -> Weight:
    # Speed does not depend on the values, as long as they are ordinary numbers.
    weight = torch.randn(part.outputs, part.inputs, dtype=setup.dtype, device=setup.device)
    weight *= part.inputs**-0.5
    return weight if format == "none" else quantize(weight, format)


def _num_bytes(weight: Weight) -> int:
    return weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes


def _pack(setup: Setup, part: Part, weights: Sequence[Weight]) -> Packed | None:
    """A copy of a weight in the kernels' layout; ``None`` where they do not keep its format."""
    kernels = setup.kernels
    plain = [weight.clone() for weight in weights if isinstance(weight, Tensor)]
    coded = [w.copied_to(setup.device) for w in weights if isinstance(w, QuantizedWeight)]
    if part.use == "swiglu":
        if plain:
            return kernels.pack_swiglu(plain[0], plain[1])
        return kernels.pack_quantized_swiglu(coded[0], coded[1], setup.dtype)
    if plain:
        linear = kernels.pack_linear(plain[0])
    elif (kept := kernels.pack_quantized(coded[0], None, setup.dtype)) is not None:
        linear = kept
    else:
        return None
    return linear.in_float32 if part.use == "float32" else linear


def _inputs(setup: Setup, parts: Sequence[Part], count: int) -> Inputs:
    """Activations and residuals of every width; a step has them in the caches too."""
    widths = {part.inputs for part in parts} | {p.outputs for p in parts if p.use == "add"}
    return {
        width: torch.randn(count, width, dtype=setup.dtype, device=setup.device)
        for width in sorted(widths)
    }


def _operands(part: Part, inputs: Inputs) -> Sequence[Tensor]:
    x_TC = inputs[part.inputs]
    return (x_TC, inputs[part.outputs]) if part.use == "add" else (x_TC,)


def _in_a_row(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
