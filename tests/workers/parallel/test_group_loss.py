"""A rank that is dead, stopped or broken: the group ends, with a typed error.

Ranks are subprocesses here wherever one is hit; each fault is proved before its effect counts. Only
what is proved to be stopped is judged by its silence: on a busy machine the living are silent too.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch

from inference_pio.workers.async_engine import AsyncEngine, EngineDeadError, build_engine
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.executor import GroupLostError
from inference_pio.workers.parallel.stage import Stage
from inference_pio.workers.types import GenerateRequest, SamplingParams, StepOutput, TokenChunk

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

WAIT_S = 60.0
RANK_TIMEOUT_S = 10 * WAIT_S
"""So long that silence ends nothing here until ``SILENCE_S`` takes its place."""
SILENCE_S = 0.5
"""What is enough once a process is known to be stopped."""
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "loop_guard": False}
CONFIG = EngineConfig(
    dtype="float32",
    block_size=16,
    kv_cache_bytes=32 << 20,
    parallel={"tensor": 2, "rank_timeout_s": RANK_TIMEOUT_S},  # type: ignore[arg-type]
)


class Running:
    """An engine of two processes with requests that go on for long."""

    def __init__(self) -> None:
        self.chunks: queue.Queue[TokenChunk] = queue.Queue()
        self.engine = AsyncEngine(build_engine(CONFIG), self._deliver)
        self.executor: Any = self.engine.engine.executor
        self.rank = psutil.Process(self.executor.ranks[0].pid)
        self.engine.start()
        for i in range(3):
            params = SamplingParams(max_tokens=4000, **GREEDY)
            self.engine.submit(GenerateRequest(f"r{i}", (5, 6, 7), params))

    def _deliver(self, output: StepOutput) -> None:
        for chunk in output.chunks:
            self.chunks.put(chunk)

    def ends(self) -> dict[str, str]:
        """The error code that each request ended with."""
        found: dict[str, str] = {}
        while len(found) < 3:
            chunk = self.chunks.get(timeout=WAIT_S)
            if chunk.finish_reason is not None:
                assert chunk.error is not None
                assert chunk.request_id not in found
                found[chunk.request_id] = str(chunk.error.code)
        return found


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.engine.stop()
    assert not running.rank.is_running()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def until(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_end_with_a_typed_error_when_a_rank_is_hit(
    running: Running, fault: signal.Signals
) -> None:
    assert running.chunks.get(timeout=WAIT_S).finish_reason is None
    running.rank.send_signal(fault)
    if fault is signal.SIGSTOP:
        until(lambda: running.rank.status() == psutil.STATUS_STOPPED)
        running.executor._members.hub._timeout_s = SILENCE_S
        why = "rank 1 gave no sign of life for"
    else:
        until(lambda: gone(running.rank))
        why = "rank 1 is gone: its connection closed"
    assert running.ends() == dict.fromkeys(("r0", "r1", "r2"), "engine_dead")
    until(lambda: gone(running.rank))
    with pytest.raises(EngineDeadError, match=f"GroupLostError: {why}"):
        asyncio.run(running.engine.health(WAIT_S))
    with pytest.raises(GroupLostError, match=why):
        running.executor.check()
    with pytest.raises(GroupLostError, match=why):
        running.executor.read_blocks([0], torch.empty(running.engine.engine.kv_layout.shape(1)))


RANK = f"""
import gc, signal, sys, threading
from inference_pio.workers.parallel.launcher import RankSpec
from inference_pio.workers.parallel.rank import run_rank
from inference_pio.workers.parallel.signs_of_life import LifeLink

def judge_silence():
    signal.sigwait({{signal.SIGUSR1}})
    (link,) = (found for found in gc.get_objects() if isinstance(found, LifeLink))
    link._timeout_s = {SILENCE_S}

signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1}})
threading.Thread(target=judge_silence, daemon=True).start()
run_rank(RankSpec.from_json(sys.stdin.read()))
"""
"""A rank that takes its rank 0 for dead after ``SILENCE_S`` once it is sent SIGUSR1."""

RANK_0 = f"""
import subprocess, sys
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine
from inference_pio.workers.parallel import local_ranks
from inference_pio.workers.types import GenerateRequest, SamplingParams

class Subprocess:
    PIPE = subprocess.PIPE
    @staticmethod
    def Popen(command, **options):
        return subprocess.Popen([sys.executable, "-c", {RANK!r}], **options)

local_ranks.subprocess = Subprocess
engine = Engine(EngineConfig.model_validate_json({CONFIG.model_dump_json()!r}))
params = SamplingParams(max_tokens=4000, ignore_eos=True)
print(*(rank.pid for rank in engine.executor.ranks), flush=True)
while True:
    if not engine.has_work:
        engine.add(GenerateRequest("r", (5, 6, 7), params))
    engine.step()
"""


@pytest.mark.parametrize(
    "fault", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_ranks_end_without_rank_0(fault: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RANK_0], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            rank_0 = psutil.Process(process.pid)
            rank = psutil.Process(int(process.stdout.readline()))
            os.kill(process.pid, fault)
            if fault is signal.SIGSTOP:
                until(lambda: rank_0.status() == psutil.STATUS_STOPPED)
                assert not gone(rank)
                rank.send_signal(signal.SIGUSR1)
            else:
                until(lambda: gone(rank_0))
            until(lambda: gone(rank))
        finally:
            process.kill()


# --- ranks as threads: what breaks inside ---------------------------------------------------------


def break_rank(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """From now on ``action`` comes before every step of a rank."""
    plain = Stage.forward

    def forward(self: Stage, step: Any) -> None:
        if self.shard.rank == number:
            action()
        plain(self, step)

    monkeypatch.setattr(Stage, "forward", forward)


def fail() -> None:
    raise MemoryError("no room for 7 bytes")


def test_a_rank_that_fails_in_a_step_says_why(
    loss_grid: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = loss_grid(parallel={"tensor": 2})
    break_rank(monkeypatch, 1, fail)
    driver.add("r", [1, 2, 3], max_tokens=3, **GREEDY)
    with pytest.raises(GroupLostError, match="rank 1 failed: MemoryError: no room for 7 bytes"):
        driver.run()


def test_a_failure_on_rank_0_ends_the_others(
    loss_grid: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = loss_grid(parallel={"tensor": 2, "pipeline": 2})
    break_rank(monkeypatch, 0, fail)
    driver.add("r", [1, 2, 3], max_tokens=3, **GREEDY)
    with pytest.raises(GroupLostError, match="rank 0 failed: MemoryError: no room for 7 bytes"):
        driver.run()
    until(lambda: not any(rank.is_alive() for rank in driver.engine.executor.ranks))


def test_nobody_waits_for_a_rank_that_can_not_be_killed(
    loss_grid: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets stay open, so that only looking up ends the wait in a collective."""
    driver = loss_grid(parallel={"tensor": 2})
    hanging, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        assert go_on.wait(WAIT_S)

    break_rank(monkeypatch, 1, hang)
    hub = driver.engine.executor._members.hub
    driver.add("r", [1, 2, 3], max_tokens=3, **GREEDY)
    judge = threading.Thread(target=lambda: (hanging.wait(WAIT_S), hub.lose("rank 1 hangs")))
    judge.start()
    with pytest.raises(GroupLostError, match="rank 1 hangs"):
        driver.run()
    judge.join()
    go_on.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_idle_engine_is_not_healthy_without_its_ranks(loss_grid: MakeDriver) -> None:
    driver = loss_grid(parallel={"tensor": 2})
    engine = AsyncEngine(driver.engine, lambda output: None)
    engine.start()
    asyncio.run(engine.health(WAIT_S))
    driver.engine.executor._members.hub.lose("rank 1 is gone")
    with pytest.raises(EngineDeadError, match="GroupLostError: rank 1 is gone"):
        asyncio.run(engine.health(WAIT_S))
    engine.stop()


PENDING = """
import threading
import torch
from inference_pio.workers.executor import GroupLostError
from inference_pio.workers.parallel.collectives import Group
from inference_pio.workers.parallel.store import connect_store, open_store

class Watch:
    lost = None
    def wait_lost(self):
        return self.lost

store, watch, groups = open_store("127.0.0.1"), Watch(), {}

def join(rank):
    own = connect_store("127.0.0.1", store.port) if rank else store
    groups[rank] = Group(own, "pair", rank, 2, torch.device("cpu"), "127.0.0.1", watch)

joining = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
for thread in joining:
    thread.start()
for thread in joining:
    thread.join()
threading.Timer(0.5, setattr, (watch, "lost", "rank 0 hangs")).start()
try:
    groups[1].all_reduce(torch.ones(1))
except GroupLostError as error:
    print(error, flush=True)
for group in groups.values():
    group.close()
"""


def test_a_process_ends_though_an_operation_of_its_group_never_does() -> None:
    """The other rank lives on, so that no broken connection ends the operation."""
    command = [sys.executable, "-c", PENDING]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (ended.returncode, ended.stdout) == (0, "rank 0 hangs\n"), ended.stderr
