"""The team of threads: a C++ program checks it, here under its own name and under sanitizers."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from inference_pio.kernels.native.library import KernelError, cpu_flags, load, usable

CHECKS = (
    "every_worker_runs_once",
    "writes_are_seen_behind_a_barrier",
    "numbers_are_taken_once",
    "callers_take_turns",
    "the_first_caller_may_end",
    "a_region_within_a_region_is_refused",
    "a_forked_child_has_a_team",
    "threads_are_named_and_deaf_to_signals",
    "a_team_with_a_thread_for_every_cpu_is_pinned",
)
Compile = Callable[..., Path]


def run(program: Path, check: str) -> None:
    done = subprocess.run([program, check], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def program(compile_program: Compile) -> Path:
    return compile_program("team_check.cpp", "team.cpp")


def test_every_check_is_named_here(program: Path) -> None:
    listed = subprocess.run([program, "list"], capture_output=True, text=True, check=True)
    assert sorted(listed.stdout.split()) == sorted(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_check(program: Path, check: str) -> None:
    run(program, check)


@pytest.mark.slow
def test_the_thread_sanitizer_sees_no_race(compile_program: Compile) -> None:
    program = compile_program(
        "team_check.cpp", "team.cpp", flags=("-g", "-fsanitize=thread", "-Wno-tsan")
    )
    for check in CHECKS:
        if "fork" not in check:  # a forked child's threads are beyond the sanitizer
            run(program, check)


@pytest.fixture(params=usable(cpu_flags()))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_a_process_has_one_team_of_a_size(name: str) -> None:
    library = load(name)
    assert library.team(2) == library.team(2) != library.team(3)
    with pytest.raises(KernelError, match="at least one thread, not 0"):
        library.team(0)


def test_each_thread_keeps_its_own_error(name: str) -> None:
    library = load(name)
    said: dict[int, str] = {}

    def provoke(size: int) -> None:
        for _ in range(50):
            with pytest.raises(KernelError) as caught:
                library.team(size)
            said[size] = str(caught.value)

    threads = [threading.Thread(target=provoke, args=(-size,)) for size in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {-n: f"a team has at least one thread, not -{n}" for n in (1, 2)}


EXIT = """
import threading
from inference_pio.kernels.native.library import load
def use():
    load({name!r}).team(2)
threading.Thread(target=use, daemon=True).start()
use()
"""


def test_the_interpreter_ends_quietly(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", EXIT.format(name=name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
