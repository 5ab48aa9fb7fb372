"""Which implementation computes the model: decided once, when it is loaded."""

from __future__ import annotations

import importlib.util
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

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_CAPABILITY = (8, 0)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger(__name__)


def select_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a device and dtype; on as many threads as torch has now.

    Native kernels in the best instruction set that works here, for float32 and bfloat16 on the
    CPU; Triton's on a CUDA device that they run on; else torch's. ``INFERENCE_PIO_KERNELS``
    overrides: ``native``, ``native:SET`` (``amx``, ``avx512_bf16``, ``avx512``, ``avx2``),
    ``triton``, ``torch`` or ``reference``. Raises ``ValueError`` for another value, and for one
    that is not possible here.
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
    if choice not in ("", "triton", "torch", "reference") or wanted:
        raise ValueError(
            f"{OVERRIDE} is {os.environ[OVERRIDE]!r}; it is 'native', 'native:SET', 'triton', "
            "'torch' or 'reference'"
        )
    if choice == "triton" or (not choice and device.type == "cuda"):
        obstacle = _triton_obstacle(device, dtype)
        if obstacle is None:
            from .triton_kernels import TritonKernels

            return TritonKernels()
        if choice:
            raise ValueError(f"{OVERRIDE} is 'triton', but {obstacle}")
        logger.warning("Triton kernels are left out: %s", obstacle)
    if choice == "reference":
        return ReferenceKernels()
    if not choice and possible and (library := _best_library()) is not None:
        return _native(library)
    return _torch(device, dtype)


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels cannot compute here; ``None`` where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        # Triton's interpreter keeps bfloat16 as integers and multiplies those.
        return "its interpreter has no bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return (
            f"its kernels run on CUDA devices, not on {device.type}; with TRITON_INTERPRET=1 they "
            "are interpreted on the CPU"
        )
    if dtype not in _TRITON_DTYPES:
        return f"its kernels do not compute in {str(dtype).removeprefix('torch.')}"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < _TRITON_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


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
