"""Loading a model's layers within a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ....kernels.api import DecoderLayer, PackedLinear, Placeable
from ...memory import give_back_freed
from ...user_cache import cache_folder
from .layer_stream import LayerStream
from .layers import (
    LayerStore,
    ResidentLayers,
    StreamedLayers,
    copy_out,
    num_layer_bytes,
    num_vector_bytes,
    place,
)
from .residency import plan_residency
from .weight_file import WeightFile


def load_layers(
    indices: Sequence[int],
    load: Callable[[int], DecoderLayer],
    *,
    limit: int | None,
    head: PackedLinear | None,
) -> LayerStore:
    """Load the layers ``indices`` so that they and the head take at most ``limit`` bytes.

    One layer more is in memory while it is packed. Raises ``ValueError`` where the limit is too
    low, the weights cannot be streamed, or the disk has no room, and what ``load`` raises.
    """

    def loaded(index: int) -> DecoderLayer:
        layer = load(index)
        give_back_freed()
        return layer

    if limit is None:
        return ResidentLayers([loaded(index) for index in indices])
    layers = [loaded(indices[0])]
    layer_bytes = num_layer_bytes(layers[0])
    resident = plan_residency(
        num_layers=len(indices),
        layer_bytes=layer_bytes,
        fixed_bytes=_num_bytes(head) + len(indices) * num_vector_bytes(layers[0]),
        limit=limit,
    )
    num_streamed = resident.count(False)
    if num_streamed == 0:
        return ResidentLayers(layers + [loaded(index) for index in indices[1:]])
    file = WeightFile(cache_folder() / "weights", num_layers=num_streamed, layer_bytes=layer_bytes)
    stream = LayerStream(file, num_streamed)
    try:
        written = 0
        for number, stays in enumerate(resident):
            layer = layers[0] if number == 0 else loaded(indices[number])
            if number:
                layers.append(layer)
            _check_size(layer, layer_bytes, indices[number])
            if not stays:
                memory = stream.slots[0]
                copy_out(layer, memory)
                place(layer, memory)
                file.write(written, memory.numpy().data)
                written += 1
    except BaseException:
        stream.close()
        raise
    stream.start()
    return StreamedLayers(layers, resident, stream)


def _num_bytes(head: PackedLinear | None) -> int:
    return head.num_bytes if isinstance(head, Placeable) else 0


def _check_size(layer: DecoderLayer, expected: int, index: int) -> None:
    if num_layer_bytes(layer) != expected:
        raise ValueError(
            f"layer {index} takes {num_layer_bytes(layer)} bytes, the first one {expected}; layers "
            "that are quantized in different ways cannot be streamed: leave weight_memory_bytes out"
        )
