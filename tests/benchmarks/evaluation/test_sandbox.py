"""Code that does harm: none of it passes, and none of it does anything."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from inference_pio.benchmarks.evaluation.sandbox import run_code

SECONDS = 5.0


def reason(*parts: str) -> str:
    run = run_code(parts, seconds=SECONDS)
    assert not run.passed
    return run.reason


def test_parts_share_a_namespace() -> None:
    assert run_code(("import math\nx = math.pi", "assert 3 < x < 4")).passed
    assert run_code(
        ("from __future__ import annotations", "from __future__ import annotations")
    ).passed


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("assert False", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = 'a' * (1 << 31)", "MemoryError"),
        ("import numpy", "ModuleNotFoundError"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "E"),
    ],
)
def test_an_error_is_named(code: str, error: str) -> None:
    assert reason(code) == error


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.fork()",
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true') == 0 or os.execv('/bin/true', ['true'])",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import os\nos.kill(os.getppid(), 9)",
        "open('here', 'w')",
        "import os\nos.mkdir('here')",
        "import os\nos.remove(__import__('sys').executable)",
        "import os\nos.chmod('/', 0o777)",
        "import os\nos.memfd_create('x')",
    ],
)
def test_what_reaches_outside_is_refused(code: str) -> None:
    assert reason(code) == "PermissionError"


def test_no_thread_starts() -> None:
    assert reason("import threading\nthreading.Thread(target=print).start()") == "RuntimeError"


def test_files_outside_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("mine")
    for action in ("open(p, 'w')", "open(p, 'a')", "os.remove(p)", "os.rename(p, p + '2')"):
        assert reason(f"import os\np = {str(file)!r}\n{action}") == "PermissionError"
    assert reason(f"import os\nos.truncate({str(file)!r}, 0)") == "PermissionError"
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "code",
    ["while True: pass", "import time\ntime.sleep(60)", "while True: print('x' * 100_000)"],
)
def test_what_does_not_end_is_ended(code: str) -> None:
    begin = time.monotonic()
    run = run_code((code,), seconds=0.5)
    assert (run.passed, run.reason) == (False, "it ran longer than 0.5 s")
    assert time.monotonic() - begin < 5


def test_ending_early_does_not_pass() -> None:
    assert reason("import os\nos._exit(0)") == "its process ended"
    assert reason("import ctypes\nctypes.string_at(0)") == "its process ended"


def test_a_filled_pipe_does_not_pass_and_holds_nobody() -> None:
    code = "import os, sys\nos.write(int(sys.argv[1]), b'x' * 65536)"
    run = run_code((code,), seconds=0.5)
    assert (run.passed, run.reason) == (False, "it ran longer than 0.5 s")


def test_the_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_PIO_API_KEY", "secret")
    assert run_code(("import os\nassert 'INFERENCE_PIO_API_KEY' not in os.environ",)).passed


def test_no_descriptor_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    run_code(("x = 1",))
    run_code(("while True: pass",), seconds=0.2)
    assert len(os.listdir("/proc/self/fd")) == before
