"""The kernels' tests on libraries that watch every access and every undefined operation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "*.so", "__pycache__", "embedded", "docs", "*.egg*"
)
TESTS = [
    *(
        f"tests/kernels/native/test_{name}.py"
        for name in ("linear", "rows", "attention", "forward", "sampling")
    ),
    "tests/kernels/sampling/test_parity.py",
]
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_address_and_undefined_behaviour_sanitizers_see_nothing(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    tree = tmp_path / "path" / "inference_pio"
    shutil.copytree(REPOSITORY, tree, ignore=LEFT_OUT)
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, CXXFLAGS=SANITIZE)
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-s"),
            *TESTS,
        ],
        tree,
        PYTHONPATH=str(tree.parent),
        LD_PRELOAD=" ".join(runtimes),
        # Python keeps much to its end. A second signal stack makes Linux refuse AMX.
        ASAN_OPTIONS="detect_leaks=0:use_sigaltstack=0",
    )


def run(command: list[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
