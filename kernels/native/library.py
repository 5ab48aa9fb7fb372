"""The native kernels' shared libraries, one for each instruction set, loaded by ctypes.

ctypes gives the GIL back while a function runs. Each wrapper declares the signatures of the
functions that it calls.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from .instruction_sets import INSTRUCTION_SETS
from .sources import sources_digest

ABI = 1
"""The version of the C interface that this package speaks: ``pio_abi``."""

FOLDER = Path(__file__).parent


class LibraryError(RuntimeError):
    """A library that is missing, damaged or of other sources, or that this process may not use."""


class KernelError(RuntimeError):
    """What a function of a library refused."""


class Library:
    """One loaded library."""

    def __init__(self, name: str, cdll: ctypes.CDLL) -> None:
        self.name = name
        """Of its instruction set."""
        self.cdll = cdll

    def team(self, num_threads: int) -> int:
        """The address of the process's team of so many threads: the calling thread and others.

        Teams live as long as the process. Raises ``KernelError`` for fewer than one thread.
        """
        address = ctypes.c_void_p()
        check(self.cdll.pio_team(num_threads, ctypes.byref(address)))
        assert address.value is not None
        return address.value


def check(error: bytes | None) -> None:
    """Raise ``KernelError`` with the text that a function returned, if any."""
    if error is not None:
        raise KernelError(error.decode())


def usable(cpu_flags: frozenset[str]) -> tuple[str, ...]:
    """The instruction sets that a CPU with these features has, best first."""
    return tuple(known.name for known in INSTRUCTION_SETS if known.cpu_flags <= cpu_flags)


@cache
def cpu_flags() -> frozenset[str]:
    """The features of this CPU that Linux lists; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((flags for key, _, flags in lines if key.strip() == "flags"), "").split())


@cache
def load(name: str) -> Library:
    """The library of one instruction set, ready for use.

    Raises ``LibraryError`` for an unknown name, where the library was not built or does not load,
    was built from other sources, or where this CPU or its kernel lack the instructions.
    """
    _check_cpu(name)
    path = library_path(name)
    if not path.exists():
        raise LibraryError(f"{path.name} is missing: it is built when the package is installed")
    try:
        cdll = ctypes.CDLL(str(path))
        _declare(cdll)
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path.name} does not load: {error}") from error
    _check_version(path, cdll)
    if (refusal := cdll.pio_prepare()) is not None:
        raise LibraryError(f"{path.name} is of no use here: {refusal.decode()}")
    return Library(name, cdll)


def library_path(name: str) -> Path:
    """Where the build puts the library of one instruction set."""
    return FOLDER / f"libpio_{name}.so"


def _check_cpu(name: str) -> None:
    wanted = next((known for known in INSTRUCTION_SETS if known.name == name), None)
    if wanted is None:
        known = ", ".join(known.name for known in INSTRUCTION_SETS)
        raise LibraryError(f"there are no kernels for {name!r}, only for {known}")
    if missing := wanted.cpu_flags - cpu_flags():
        raise LibraryError(f"this CPU lacks {' '.join(sorted(missing))}")


def _declare(cdll: ctypes.CDLL) -> None:
    cdll.pio_abi.restype = ctypes.c_int
    cdll.pio_sources.restype = ctypes.c_char_p
    cdll.pio_prepare.restype = ctypes.c_char_p
    cdll.pio_team.argtypes = [ctypes.c_int, ctypes.c_void_p]
    cdll.pio_team.restype = ctypes.c_char_p


def _check_version(path: Path, cdll: ctypes.CDLL) -> None:
    again = "build it anew: python setup.py build_ext --inplace, or install the package again"
    if (abi := cdll.pio_abi()) != ABI:
        raise LibraryError(f"{path.name} has interface {abi}, the package {ABI}; {again}")
    digest = sources_digest(FOLDER)
    if digest is not None and cdll.pio_sources().decode() != digest:
        raise LibraryError(
            f"{path.name} was built from other sources than those beside it; {again}"
        )
