"""A stack of layers in one call: no dispatch between operations, the residual stream in float32."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..api import DecoderLayer
from ..context import ForwardContext
from ..kv_layer import KVLayer, layer_shape
from .batch import BatchStruct, NativeBatch
from .dtypes import native_dtype
from .kv_layers import native_kv_address, native_kv_format
from .library import Library, check
from .linear import AnyLinear, AnySwiGLU, Packed
from .pages import expect_bounds


class _Shape(ctypes.Structure):
    """``StackShape`` of ``forward.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("hidden_size", "intermediate_size")),
        *((name, ctypes.c_int32) for name in ("num_heads", "kv_heads", "head_dim")),
        ("eps", ctypes.c_float),
    )


_LAYER_PARTS = (
    *("input_norm", "qkv", "qk_norm_AD", "attention_out"),
    *("mlp_norm", "gate_up", "down"),
)


class _Layer(ctypes.Structure):
    """``LayerPointers`` of ``forward_api.cpp``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _LAYER_PARTS)


class _Step(ctypes.Structure):
    """``StepPointers`` of ``forward_api.cpp``."""

    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("batch", BatchStruct),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots")),
        *((name, ctypes.c_int64) for name in ("first_layer", "num_layers")),
        *((name, ctypes.c_void_p) for name in ("kv_layers", "bounds_layers", "filled")),
        ("num_filled", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("block_size", "kv_format")),
    )


class NativeStack:
    """Layers whose weights the native kernels packed; see ``LayerStack``."""

    def __init__(
        self, library: Library, team: int, layers: Sequence[DecoderLayer], eps: float
    ) -> None:
        self._layers = tuple(layers)  # the library keeps addresses of their weights
        self._run = library.cdll.pio_stack_run
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._run.restype = ctypes.c_char_p
        first = self._layers[0]
        self._dtype = first.input_norm.dtype
        self._shape = _shape(first, eps)
        self._stack = _new_stack(library, team, self._shape, self._layers)
        weakref.finalize(self, library.cdll.pio_stack_delete, self._stack)

    def __call__(
        self,
        hidden_TC: Tensor,
        context: ForwardContext,
        cos_TE: Tensor,
        sin_TE: Tensor,
        kv_layers: Sequence[KVLayer],
        bounds_layers: Sequence[Tensor] = (),
        first_layer: int = 0,
    ) -> Tensor:
        """See ``LayerStack``. Raises ``ValueError`` for tensors of another shape or layout."""
        stream_TC = hidden_TC.to(torch.float32, copy=True)
        self._check(context, stream_TC, cos_TE, sin_TE)
        kv_format = self._kv_format(context, kv_layers, first_layer)
        filled = array("i", self._due(context, kv_layers, bounds_layers))
        batch = NativeBatch(context)
        addresses = _array(list(map(native_kv_address, kv_layers)))
        bounds = _array([tensor.data_ptr() for tensor in bounds_layers])
        step = _Step(
            stream=stream_TC.data_ptr(),
            num_tokens=context.query_starts[-1],
            batch=batch.struct,
            cos=cos_TE.data_ptr(),
            sin=sin_TE.data_ptr(),
            slots=context.slots_T.data_ptr(),
            first_layer=first_layer,
            num_layers=len(kv_layers),
            kv_layers=ctypes.addressof(addresses),
            bounds_layers=ctypes.addressof(bounds) if bounds_layers else None,
            filled=filled.buffer_info()[0],
            num_filled=len(filled),
            num_blocks=layer_shape(kv_layers[0]).num_blocks,
            block_size=context.block_size,
            kv_format=kv_format,
        )
        check(self._run(self._stack, ctypes.byref(step)))
        return stream_TC

    def _due(
        self,
        context: ForwardContext,
        kv_layers: Sequence[KVLayer],
        bounds_layers: Sequence[Tensor],
    ) -> Sequence[int]:
        """Blocks whose bounds the step has to write; none where no pages are selected."""
        if context.pattern.pages is None:
            return ()
        if len(bounds_layers) != len(kv_layers):
            raise ValueError(
                f"{len(bounds_layers)} layers of bounds came for {len(kv_layers)} layers of KV"
            )
        for bounds_N2KD, kv_N2KSD in zip(bounds_layers, kv_layers, strict=True):
            expect_bounds(bounds_N2KD, kv_N2KSD, self._dtype)
        return context.filled_blocks

    def _check(
        self,
        context: ForwardContext,
        stream_TC: Tensor,
        cos_TE: Tensor,
        sin_TE: Tensor,
    ) -> None:
        """The library sees addresses only: what they stand for is made sure of here."""
        shape, tokens = self._shape, context.query_starts[-1]
        half = (tokens, shape.head_dim // 2)
        _expect("hidden_TC", stream_TC, torch.float32, (tokens, shape.hidden_size))
        _expect("cos_TE", cos_TE, torch.float32, half)
        _expect("sin_TE", sin_TE, torch.float32, half)
        _expect("slots_T", context.slots_T, torch.int64, (tokens,))

    def _kv_format(
        self, context: ForwardContext, kv_layers: Sequence[KVLayer], first_layer: int
    ) -> int:
        """Of all layers, which are of one shape."""
        count = len(self._layers)
        if not kv_layers or not 0 <= first_layer <= count - len(kv_layers):
            raise ValueError(
                f"{len(kv_layers)} layers of KV came for {count} layers from layer {first_layer}"
            )
        num_blocks = layer_shape(kv_layers[0]).num_blocks
        needed = (num_blocks, self._shape.kv_heads, context.block_size, self._shape.head_dim)
        formats = {native_kv_format(kv, self._dtype) for kv in kv_layers}
        for kv_N2KSD in kv_layers:
            if layer_shape(kv_N2KSD) != needed or len(formats) > 1:
                raise ValueError(
                    f"kv_N2KSD is of {layer_shape(kv_N2KSD)}, the layers in {len(formats)} "
                    f"formats; the stack takes one and blocks, KV heads, block size and head_dim "
                    f"of {needed}"
                )
        return formats.pop()


def _array(addresses: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _shape(layer: DecoderLayer, eps: float) -> _Shape:
    """What the weights of a layer say about the whole stack."""
    assert isinstance(layer.qkv, AnyLinear)
    assert isinstance(layer.gate_up, AnySwiGLU)
    qk_heads, head_dim = layer.qk_norm_AD.shape
    kv_heads = layer.qkv.out_features // head_dim - qk_heads
    return _Shape(
        hidden_size=layer.qkv.in_features,
        intermediate_size=layer.gate_up.out_features,
        num_heads=qk_heads - kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=eps,
    )


def _new_stack(library: Library, team: int, shape: _Shape, layers: Sequence[DecoderLayer]) -> int:
    make = library.cdll.pio_stack_new
    make.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p),
        *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p),
    ]
    make.restype = ctypes.c_char_p
    library.cdll.pio_stack_delete.argtypes = [ctypes.c_void_p]
    library.cdll.pio_stack_delete.restype = None
    pointers = (_Layer * len(layers))(*(_Layer(*_addresses(layer, shape)) for layer in layers))
    stack = ctypes.c_void_p()
    check(
        make(
            team,
            native_dtype(layers[0].input_norm),
            ctypes.byref(shape),
            pointers,
            len(layers),
            ctypes.byref(stack),
        )
    )
    assert stack.value is not None
    return stack.value


def _addresses(layer: DecoderLayer, shape: _Shape) -> list[int]:
    qk_heads = shape.num_heads + shape.kv_heads
    dtype = layer.input_norm.dtype
    _expect("input_norm", layer.input_norm, dtype, (shape.hidden_size,))
    _expect("mlp_norm", layer.mlp_norm, dtype, (shape.hidden_size,))
    _expect("qk_norm_AD", layer.qk_norm_AD, torch.float32, (qk_heads, shape.head_dim))
    parts = [getattr(layer, name) for name in _LAYER_PARTS]
    return [part.data_ptr() if isinstance(part, Tensor) else _handle(part) for part in parts]


def _handle(packed: object) -> int:
    assert isinstance(packed, Packed), "packed by these kernels"
    return packed.handle


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; "
            f"the stack takes {dtype} {list(shape)}, contiguous"
        )
