"""A group of ranks that loses one, behind Serve: it is gone within its bound, and comes again."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from conftest import PoolsService

Settle = Callable[..., None]
REPLICA = "ray::ServeReplica:pools:"
RANK = "ray::RankActor"
BOUND_S = 5.0
"""From a rank's loss until no process of its group is left: the silence that counts is 3 s."""
STREAMS = 3
TOKENS = 400


def prompt(number: int) -> list[int]:
    return [20 + (number * 29 + i * 7 + i // 11 * number) % 300 for i in range(40)]


def stream(
    service: PoolsService, model: str, number: int, begun: threading.Event
) -> tuple[str, str]:
    """A long greedy stream: its text, and the code of the error that ended it, if one did."""
    body = {"model": model, "prompt": prompt(number), "temperature": 0, "ignore_eos": True}
    text, error = "", ""
    with service.client.stream(
        "POST", "/v1/completions", json={**body, "max_tokens": TOKENS, "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            assert not error, "something came behind the error"
            error = event.get("error", {}).get("code", "")
            if not error:
                text += event["choices"][0]["text"]
                begun.set()
    return text, error


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def expect_gone(group: list[psutil.Process], since: float) -> None:
    """Wait until all of them are gone, which they are within the bound."""
    while alive := [process.pid for process in group if not is_gone(process)]:
        assert time.monotonic() - since < BOUND_S, f"of {group}, {alive} still live"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_lost_rank_ends_its_group_which_is_rebuilt(
    pools_service: PoolsService, settle: Settle, fault: signal.Signals
) -> None:
    nobody = threading.Event()
    expected = [stream(pools_service, "unified", n, nobody) for n in range(STREAMS)]
    assert all(text and not error for text, error in expected)
    (rank,) = pools_service.processes(RANK)
    (replica,) = pools_service.processes(REPLICA + "ranks")
    group = [rank, replica, *rank.children(recursive=True), *replica.children(recursive=True)]
    begun = [threading.Event() for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as threads:
        streams = [
            threads.submit(stream, pools_service, "ranks", number, event)
            for number, event in enumerate(begun)
        ]
        assert all(event.wait(60) for event in begun)
        assert not any(answer.done() for answer in streams), "they ended before the fault"
        since = time.monotonic()
        rank.send_signal(fault)
        if fault is signal.SIGSTOP:
            settle(lambda: is_gone(rank) or rank.status() == psutil.STATUS_STOPPED, "not stopped")
        expect_gone(group, since)
        for answer, (whole, _) in zip(streams, expected, strict=True):
            text, error = answer.result()
            if error:
                assert error in ("stream_lost", "engine_dead")
                assert whole.startswith(text)
            else:
                assert text == whole
    settle(lambda: bool(pools_service.processes(RANK)), "no new rank came up")
    settle(
        lambda: pools_service.client.get("/health").status_code == 200, "it does not serve again"
    )
    again = pools_service.text("ranks", prompt(STREAMS), TOKENS)
    assert again == pools_service.text("unified", prompt(STREAMS), TOKENS)
    (new_rank,) = pools_service.processes(RANK)
    assert new_rank.pid != rank.pid
    pools_service.expect_quiet()
