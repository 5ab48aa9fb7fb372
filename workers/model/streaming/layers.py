"""A model's layers, wherever their weights are.

The life of a streamed layer: packed as any other while loading, its packed bytes written to a
``WeightFile``, its own memory freed; then, in each step, the bytes are read into a slot, the layer
is computed from there, and the slot goes to the next one. What is computed is the same to the bit.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from ....kernels.api import DecoderLayer, Placeable
from .layer_stream import LayerStream, StreamStats
from .weight_file import BLOCK


class LayerStore(Protocol):
    """The layers of one model part, in their order."""

    @property
    def layers(self) -> Sequence[DecoderLayer]:
        """All of them; each may be computed only while its span is at hand."""
        ...

    def spans(self) -> Iterator[range]:
        """Runs of layers, in order, each at hand until the next one is asked for.

        Raises ``WeightReadError``.
        """
        ...

    def stats(self) -> StreamStats:
        """What streaming has cost so far."""
        ...

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where its books disagree."""
        ...

    def close(self) -> None:
        """End what it started; no span comes any more."""
        ...


class ResidentLayers:
    """All in memory."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers = tuple(layers)

    def spans(self) -> Iterator[range]:
        """See ``LayerStore.spans``."""
        yield range(len(self.layers))

    def stats(self) -> StreamStats:
        """See ``LayerStore.stats``."""
        return StreamStats()

    def check_integrity(self) -> None:
        """Nothing can disagree."""

    def close(self) -> None:
        """Nothing was started."""


class StreamedLayers:
    """Some in memory, the others in the file of ``stream``, which has started.

    ``resident`` says which; the stream's layers are the others, in order.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], resident: Sequence[bool], stream: LayerStream
    ) -> None:
        self.layers = tuple(layers)
        self._stream = stream
        self.num_streamed = stream.num_layers
        self.layer_bytes = stream.layer_bytes
        """Of a streamed layer, as it is read."""
        self._runs = tuple(_runs(resident))
        # A store that is dropped without being closed takes its thread along.
        self._end = weakref.finalize(self, stream.close)

    def spans(self) -> Iterator[range]:
        """See ``LayerStore.spans``."""
        streamed = itertools.count()
        for span, is_resident in self._runs:
            if is_resident:
                yield span
                continue
            for index in span:
                with self._stream.layer(next(streamed)) as memory:
                    place(self.layers[index], memory)
                    yield range(index, index + 1)

    def stats(self) -> StreamStats:
        """See ``LayerStore.stats``."""
        return self._stream.stats()

    def fileno(self) -> int:
        """The open file of streamed layers."""
        return self._stream.fileno()

    def check_integrity(self) -> None:
        """See ``LayerStore.check_integrity``."""
        self._stream.check_integrity()

    def close(self) -> None:
        """See ``LayerStore.close``."""
        self._end()


def _runs(resident: Sequence[bool]) -> Iterator[tuple[range, bool]]:
    """Layers that follow each other and are alike."""
    start = 0
    for is_resident, group in itertools.groupby(resident):
        stop = start + len(list(group))
        yield range(start, stop), is_resident
        start = stop


def packed_parts(layer: DecoderLayer) -> tuple[Placeable, ...]:
    """What a layer has to be streamed. Raises ``ValueError`` for weights that cannot be placed."""
    parts: list[Placeable] = []
    for part in (layer.qkv, layer.attention_out, layer.gate_up, layer.down):
        if not isinstance(part, Placeable):
            raise ValueError(
                f"weight_memory_bytes streams layers in the native kernels' layout, but a "
                f"{type(part).__name__} is kept as torch has it; without native kernels for this "
                "CPU, dtype and quantization every layer has to stay in memory"
            )
        parts.append(part)
    return tuple(parts)


def num_vector_bytes(layer: DecoderLayer) -> int:
    """Of what stays in memory in any case."""
    return layer.input_norm.nbytes + layer.qk_norm_AD.nbytes + layer.mlp_norm.nbytes


def num_layer_bytes(layer: DecoderLayer) -> int:
    """Of a layer in a slot: each part begins at a multiple of ``BLOCK``. Raises ``ValueError``."""
    return sum(map(_padded, packed_parts(layer)))


def copy_out(layer: DecoderLayer, memory: Tensor) -> None:
    """Copy a layer's packed weights to where ``place`` looks for them."""
    for part, own in _places(layer, memory):
        own.copy_(part.panels())


def place(layer: DecoderLayer, memory: Tensor) -> None:
    """Let a layer read its weights from memory of its size."""
    for part, own in _places(layer, memory):
        part.place(own)


def _places(layer: DecoderLayer, memory: Tensor) -> Iterator[tuple[Placeable, Tensor]]:
    start = 0
    for part in packed_parts(layer):
        yield part, memory[start : start + part.num_bytes]
        start += _padded(part)


def _padded(part: Placeable) -> int:
    return -(-part.num_bytes // BLOCK) * BLOCK
