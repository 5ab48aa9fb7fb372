"""Packed linears of a native library, for torch tensors.

A result does not depend on the other rows of a call, their number or the number of threads.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import byref, c_char_p, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from .library import Library, check

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}
"""Numbers of ``DType`` in types.h."""


class Matrix(ctypes.Structure):
    """``Matrix`` of linear_api.cpp: rows of contiguous elements, ``stride`` elements apart."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("stride", c_int64),
    )


class Packed:
    """A packed weight and the functions that read it; freed with the object."""

    handle: int
    """Address of the ``PackedLinear``, valid as long as this object lives."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    def __init__(
        self, library: Library, team: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        _declare(library)
        if dtype not in DTYPES:
            raise ValueError(f"native linears compute in float32 or bfloat16, not {dtype}")
        self._cdll = library.cdll
        self._team = team
        self._dtype = DTYPES[dtype]
        self.dtype = dtype
        self.out_features, self.in_features = shape

    def _keep(self, handle: c_void_p) -> None:
        assert handle.value is not None
        self.handle = handle.value
        weakref.finalize(self, self._cdll.pio_linear_free, self._dtype, self.handle)

    @property
    def num_bytes(self) -> int:
        """Of the packed weight."""
        size = c_int64()
        check(self._cdll.pio_linear_num_bytes(self._dtype, self.handle, byref(size)))
        return size.value

    def panels(self) -> Tensor:
        """See ``Placeable.panels``."""
        address, size = c_void_p(), self.num_bytes
        check(self._cdll.pio_linear_panels(self._dtype, self.handle, byref(address)))
        assert address.value is not None
        return torch.frombuffer(
            (ctypes.c_byte * size).from_address(address.value), dtype=torch.uint8
        )

    def place(self, memory: Tensor) -> None:
        """See ``Placeable.place``."""
        size = self.num_bytes
        if memory.dtype != torch.uint8 or memory.shape != (size,) or memory.stride() != (1,):
            raise ValueError(
                f"memory is {memory.dtype} {list(memory.shape)}, the weight uint8 [{size}]"
            )
        check(self._cdll.pio_linear_place(self._dtype, self.handle, memory.data_ptr()))
        self._memory = memory  # lives as long as it may be read

    def _input(self, x_TC: Tensor) -> Tensor:
        if x_TC.dtype != self.dtype:
            raise ValueError(f"x is {x_TC.dtype}, the weight {self.dtype}")
        return _rows(x_TC)

    def _empty(self, x_TC: Tensor, dtype: torch.dtype) -> Tensor:
        return x_TC.new_empty((x_TC.shape[0], self.out_features), dtype=dtype)


class AnyLinear(Packed):
    """``PackedLinear`` of kernels/api.py, whatever its weight is kept as."""

    _float32_TC: Tensor | None = None

    def _float32_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        if bias.shape != (self.out_features,):
            raise ValueError(
                f"a bias of shape {tuple(bias.shape)} does not fit {self.out_features} outputs"
            )
        return bias.float().contiguous()

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``, plus ``residual``; summed in float32 and rounded once."""
        x_TC = self._input(x_TC)
        out_TC = self._empty(x_TC, self.dtype)
        call = self._team, self._dtype, self.handle, matrix(x_TC)
        if residual_TC is None:
            check(self._cdll.pio_linear_store(*call, matrix(out_TC)))
            return out_TC
        if residual_TC.dtype != self.dtype:
            raise ValueError(f"the residual is {residual_TC.dtype}, not x's dtype {self.dtype}")
        residual_TC = _rows(residual_TC)
        check(self._cdll.pio_linear_add(*call, matrix(residual_TC), matrix(out_TC)))
        return out_TC

    def in_float32(self, x_TC: Tensor) -> Tensor:
        """``x @ weight.T + bias``, not rounded to the dtype of ``x``; see ``PackedLinear``."""
        x_TC = self._input(x_TC)
        out_TC = self._kept_float32(len(x_TC))
        call = self._team, self._dtype, self.handle, matrix(x_TC)
        check(self._cdll.pio_linear_store_float(*call, matrix(out_TC)))
        return out_TC

    def _kept_float32(self, rows: int) -> Tensor:
        """Memory that stays with the weight: a step must not wait for new pages of logits."""
        kept_TC = self._float32_TC
        if kept_TC is None or len(kept_TC) < rows:
            kept_TC = torch.empty((rows, self.out_features), dtype=torch.float32)
            self._float32_TC = kept_TC
        return kept_TC[:rows]

    def add_to_stream(self, x_TC: Tensor, stream_TC: Tensor) -> None:
        """``stream += x @ weight.T + bias``, in place; ``stream`` is float32."""
        if stream_TC.dtype != torch.float32 or stream_TC.stride(-1) != 1:
            raise ValueError("the stream is float32 with contiguous rows")
        x_TC = self._input(x_TC)
        call = self._team, self._dtype, self.handle, matrix(x_TC)
        check(self._cdll.pio_linear_add_to_stream(*call, matrix(stream_TC)))


class AnySwiGLU(Packed):
    """``PackedSwiGLU`` of kernels/api.py, whatever its weights are kept as."""

    def __call__(self, x_TC: Tensor) -> Tensor:
        """``silu(x @ gate.T) * (x @ up.T)``, in float32 and rounded once."""
        x_TC = self._input(x_TC)
        out_TC = self._empty(x_TC, self.dtype)
        call = self._team, self._dtype, self.handle, matrix(x_TC)
        check(self._cdll.pio_linear_swiglu(*call, matrix(out_TC)))
        return out_TC


class NativeLinear(AnyLinear):
    """A weight in the activations' dtype."""

    def __init__(
        self, library: Library, team: int, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        super().__init__(library, team, _shape(weight), weight.dtype)
        bias = self._float32_bias(bias)
        weight, handle = _rows(weight), c_void_p()
        address = None if bias is None else bias.data_ptr()
        check(self._cdll.pio_linear_pack(team, self._dtype, matrix(weight), address, byref(handle)))
        self._keep(handle)


class NativeSwiGLU(AnySwiGLU):
    """Gate and up in the activations' dtype."""

    def __init__(self, library: Library, team: int, gate: Tensor, up: Tensor) -> None:
        super().__init__(library, team, _shape(gate), gate.dtype)
        if gate.shape != up.shape or gate.dtype != up.dtype:
            raise ValueError(
                f"gate is {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}; "
                "they have one shape and dtype"
            )
        gate, up, handle = _rows(gate), _rows(up), c_void_p()
        check(
            self._cdll.pio_linear_pack_swiglu(
                team, self._dtype, matrix(gate), matrix(up), byref(handle)
            )
        )
        self._keep(handle)


def matrix(x_TC: Tensor) -> Matrix:
    """The address and shape of a tensor with contiguous rows; the tensor must outlive it."""
    rows, cols = x_TC.shape
    return Matrix(x_TC.data_ptr(), rows, cols, x_TC.stride(0))


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _rows(x_TC: Tensor) -> Tensor:
    return x_TC if x_TC.stride(-1) == 1 else x_TC.contiguous()


def _declare(library: Library) -> None:
    """The functions' signatures; doing it again changes nothing."""
    cdll = library.cdll
    view, packed = ctypes.POINTER(Matrix), (c_int32, c_void_p)
    cdll.pio_linear_pack.argtypes = [c_void_p, c_int32, view, c_void_p, c_void_p]
    cdll.pio_linear_pack_swiglu.argtypes = [c_void_p, c_int32, view, view, c_void_p]
    cdll.pio_linear_pack_quantized.argtypes = [c_void_p, c_int32, *(c_void_p,) * 3]
    cdll.pio_linear_pack_quantized_swiglu.argtypes = [c_void_p, c_int32, *(c_void_p,) * 3]
    cdll.pio_linear_free.argtypes = [*packed]
    cdll.pio_linear_num_bytes.argtypes = [*packed, c_void_p]
    cdll.pio_linear_panels.argtypes = [*packed, c_void_p]
    cdll.pio_linear_place.argtypes = [*packed, c_void_p]
    cdll.pio_linear_add.argtypes = [c_void_p, *packed, view, view, view]
    for name in ("store", "store_float", "add_to_stream", "swiglu"):
        getattr(cdll, f"pio_linear_{name}").argtypes = [c_void_p, *packed, view, view]
    quantized = ("pack_quantized", "pack_quantized_swiglu")
    memory = ("free", "num_bytes", "panels", "place")
    for name in (
        "pack",
        "pack_swiglu",
        *quantized,
        *memory,
        "add",
        "store",
        "store_float",
        "add_to_stream",
        "swiglu",
    ):
        getattr(cdll, f"pio_linear_{name}").restype = c_char_p
