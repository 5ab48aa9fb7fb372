"""Which implementation computes the model: decided once, when it is loaded."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from .api import Kernels
from .native.library import Library, LibraryError, cpu_flags, load, usable
from .native_kernels import NativeKernels
from .reference import ReferenceKernels
from .torch_ops import TorchKernels

OVERRIDE = "INFERENCE_PIO_KERNELS"

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger(__name__)


def select_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a device and dtype; on as many threads as torch has now.

    Native kernels in the best instruction set that works here, for float32 and bfloat16 on the
    CPU; else torch's. ``INFERENCE_PIO_KERNELS`` overrides: ``native``, ``native:SET`` (``amx``,
    ``avx512_bf16``, ``avx512``, ``avx2``), ``torch`` or ``reference``. Raises ``ValueError`` for
    another value, and for one that is not possible here.
    """
    choice, _, wanted = os.environ.get(OVERRIDE, "").partition(":")
    possible = device.type == "cpu" and dtype in _NATIVE_DTYPES
    if choice == "native":
        if not possible:
            raise ValueError(
                f"{OVERRIDE} asks for native kernels; they compute float32 and bfloat16 on the "
                f"CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
            )
        return _native(_wanted_library(wanted) if wanted else _best_library_or_raise())
    if choice not in ("", "torch", "reference") or wanted:
        raise ValueError(
            f"{OVERRIDE} is {os.environ[OVERRIDE]!r}; it is 'native', 'native:SET', 'torch' or "
            "'reference'"
        )
    if choice == "reference":
        return ReferenceKernels()
    if not choice and possible and (library := _best_library()) is not None:
        return _native(library)
    return _torch(device, dtype)


def _native(library: Library) -> Kernels:
    return NativeKernels(library, torch.get_num_threads())


def _torch(device: torch.device, dtype: torch.dtype) -> Kernels:
    if device.type == "cpu" and torch._C._has_mkldnn:
        from .torch_cpu import TorchCPUKernels

        return TorchCPUKernels(dtype)
    return TorchKernels()


@cache
def _best_library() -> Library | None:
    """The best that loads; says once why a better one does not."""
    for name in usable(cpu_flags()):
        try:
            return load(name)
        except LibraryError as error:
            logger.warning("native kernels for %s are left out: %s", name, error)
    return None


def _best_library_or_raise() -> Library:
    library = _best_library()
    if library is None:
        raise ValueError(f"{OVERRIDE} is 'native', but no library works here; {_what_there_is()}")
    return library


def _wanted_library(name: str) -> Library:
    try:
        return load(name)
    except LibraryError as error:
        raise ValueError(
            f"{OVERRIDE} is 'native:{name}', but {error}; {_what_there_is()}"
        ) from error


def _what_there_is() -> str:
    sets = usable(cpu_flags())
    return f"this CPU has {', '.join(sets)}" if sets else "this CPU has no set that they know"
