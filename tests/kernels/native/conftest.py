"""What the tests of the native kernels share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from inference_pio.kernels.native.library import Library

from .linear_samples import SETS, built

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "kernels" / "native"


@pytest.fixture(params=SETS)
def library(request: pytest.FixtureRequest) -> Library:
    """Of every instruction set that this CPU has."""
    return built(request.param)


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a C++ program of this folder with sources of the kernels; skips where it cannot."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")

    def compile_it(program: str, *sources: str, flags: tuple[str, ...] = ()) -> Path:
        out = tmp_path_factory.mktemp("program") / Path(program).stem
        files = [str(HERE / program), *(str(SOURCES / source) for source in sources)]
        command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
        done = subprocess.run(
            [*command, *flags, f"-I{SOURCES}", *files, "-o", str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return out

    return compile_it
