"""Builds the native kernels: one shared library for each instruction set.

Everything else about the package stands in pyproject.toml. The libraries know neither Python nor
torch, so a C++20 compiler is all they need. Where there is none, or on another system than Linux
on x86-64, the package installs without them and computes with torch.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE = "inference_pio.kernels.native"
FOLDER = Path("kernels/native")

_source_files = runpy.run_path(str(FOLDER / "sources.py"))
SOURCES: list[Path] = _source_files["source_files"](FOLDER)
DIGEST: str = _source_files["sources_digest"](FOLDER)
INSTRUCTION_SETS: dict[str, Any] = {
    f"{PACKAGE}.libpio_{known.name}": known
    for known in runpy.run_path(str(FOLDER / "instruction_sets.py"))["INSTRUCTION_SETS"]
}

# Products and sums are contracted where the source says so and nowhere else: a result must not
# depend on which copy of a loop computed it.
FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-MMD", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # GCC 12 warns of its own intrinsics (its bug 105593); clang does not know the warning.
    *("-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
]
LINK_FLAGS = ["-shared", "-pthread", "-Wl,-z,defs", f"-Wl,--version-script={FOLDER}/exports.map"]


class BuildKernels(build_ext):
    """Compiles each source once per instruction set, and again when it or a header is newer.

    ``CXX`` and ``CXXFLAGS`` choose the compiler and add flags, at linking too.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """A plain library: no module of Python's, so no tag of its version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        """All libraries, as many compilers at once as there are CPUs."""
        compiler = _compiler()
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = {
                    extension.name: [
                        pool.submit(self._compile, compiler, extension.name, Path(source))
                        for source in extension.sources
                    ]
                    for extension in self.extensions
                }
            for name, job in jobs.items():
                library = Path(self.get_ext_fullpath(name))
                library.parent.mkdir(parents=True, exist_ok=True)
                objects = [str(compiled.result()) for compiled in job]
                _run([*compiler, *LINK_FLAGS, *_more_flags(), *objects, "-o", str(library)])
        except CompileError as error:
            if not all(extension.optional for extension in self.extensions):
                raise
            print(
                f"inference-pio: the native kernels were not built: {error}\n"
                "inference-pio: the package works without them, slower, with torch's own kernels",
                file=sys.stderr,
            )

    def _compile(self, compiler: list[str], extension: str, source: Path) -> Path:
        known = INSTRUCTION_SETS[extension]
        compiled = Path(self.build_temp) / known.name / f"{source.stem}.o"
        # The digest of all files is compiled into this one.
        has_digest = source.stem == "library_api"
        if not self.force and _is_newer(compiled, SOURCES if has_digest else []):
            return compiled
        compiled.parent.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, *known.compiler_flags, *_more_flags()]
        if has_digest:
            flags.append(f'-DPIO_SOURCES="{DIGEST}"')
        _run([*compiler, *flags, "-c", str(source), "-o", str(compiled)])
        return compiled


def _is_newer(compiled: Path, more: list[Path]) -> bool:
    """Whether an object is newer than what the compiler read for it, as its ``.d`` file tells."""
    try:
        _, _, read = compiled.with_suffix(".d").read_text().partition(":")
        inputs = [Path(name) for name in read.replace("\\\n", " ").split()]
        newest = max(path.stat().st_mtime for path in [*inputs, *more, Path(__file__)])
        return compiled.stat().st_mtime > newest
    except FileNotFoundError:
        return False


def _headers() -> list[Path]:
    return [path for path in SOURCES if path.suffix != ".cpp"]


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        return named.split()
    return [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]


def _more_flags() -> list[str]:
    return os.environ.get("CXXFLAGS", "").split()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"the C++ compiler {command[0]!r} does not run: {error}") from error
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)} ended with {done.returncode}")


def _extensions() -> list[Extension]:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return []
    return [
        Extension(
            name,
            sources=[str(path) for path in SOURCES if path.suffix == ".cpp"],
            depends=[str(path) for path in _headers()],
            # Whoever asks for the kernels by name wants the error.
            optional="build_ext" not in sys.argv,
        )
        for name in INSTRUCTION_SETS
    ]


setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildKernels})
