"""Processes of every kind are killed under load: no wrong answer, no hang, nothing left behind."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

if TYPE_CHECKING:
    from conftest import PoolsService, Split

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Settle = Callable[..., None]
REPLICA = "ray::ServeReplica:pools:"
VICTIMS = {
    "decode": REPLICA + "answer",
    "prefill": REPLICA + "prefill",
    **({"direct": REPLICA + "direct"} if find_spec("nixl") else {}),
    "unified": REPLICA + "one",
    "rank": "ray::RankActor",
    "rank 0": REPLICA + "ranks",
}
MODELS = ("unified", "split", "ranks", *(["direct"] if find_spec("nixl") else []))
TOKENS = 200


def prompt(number: int) -> list[int]:
    return [20 + (number * 37 + i * 11 + i // 7 * number) % 300 for i in range(900)]


def kill(service: PoolsService, title: str) -> int:
    """End one process of that kind at once; it is proved to be gone."""
    victim = service.processes(title)[0]
    victim.kill()
    _, alive = psutil.wait_procs([victim], 30)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
    return victim.pid


def is_whole(service: PoolsService) -> bool:
    """Every kind of process is there, the decode side knows its peer, and all pools answer."""
    try:
        return (
            all(service.processes(title) for title in VICTIMS.values())
            and service.client.get("/health").status_code == 200
            and all(service.number("prefill_peers", pool) == 1 for pool in service.decode_pools)
        )
    except httpx.TransportError:
        return False


def test_a_killed_decode_replica_costs_nobody_a_token(
    pools_service: PoolsService, split: Split, settle: Settle
) -> None:
    expected = [pools_service.text("unified", prompt(n), TOKENS) for n in range(6)]
    with ThreadPoolExecutor(6) as threads:
        answers = [
            threads.submit(pools_service.text, split.model, prompt(n), TOKENS) for n in range(6)
        ]
        settle(lambda: pools_service.number("requests_running", split.pool) > 0, "nothing ran")
        kill(pools_service, REPLICA + split.pool)
        assert [answer.result() for answer in answers] == expected
    assert pools_service.numbers("migrations_total", split.pool, by="outcome")["moved"] > 0
    settle(lambda: is_whole(pools_service), "the decode replica did not come back")
    pools_service.expect_quiet()


def test_a_killed_ingress_cuts_its_clients_and_frees_what_they_held(
    pools_service: PoolsService, split: Split, settle: Settle
) -> None:
    with ThreadPoolExecutor(4) as threads:
        answers = [
            threads.submit(pools_service.text, split.model, prompt(n), 3000) for n in range(20, 24)
        ]
        settle(lambda: pools_service.number("requests_running", split.pool) > 0, "nothing ran")
        kill(pools_service, REPLICA + "ingress")
        for answer in answers:
            assert isinstance(answer.exception(), httpx.TransportError | AssertionError)
    settle(lambda: is_whole(pools_service), "the ingress did not come back")
    pools_service.expect_quiet()
    assert pools_service.text(split.model, prompt(25)) == pools_service.text("unified", prompt(25))


@pytest.mark.parametrize("seed", range(2))
def test_a_storm_of_kills_makes_no_answer_wrong(
    pools_service: PoolsService, settle: Settle, seed: int
) -> None:
    rng = random.Random(seed)
    numbers = list(range(100 * (seed + 1), 100 * (seed + 1) + 24))
    expected = {n: pools_service.text("unified", prompt(n), TOKENS) for n in numbers}
    processes = len(psutil.Process(pools_service.process.pid).children(recursive=True))
    outcomes: Counter[str] = Counter()

    def ask(number: int) -> None:
        body = {
            "model": MODELS[number % len(MODELS)],
            "prompt": prompt(number),
            "max_tokens": TOKENS,
        }
        answer = pools_service.client.post(
            "/v1/completions", json={**body, "temperature": 0, "ignore_eos": True}
        )
        if answer.status_code == 200:
            assert answer.json()["choices"][0]["text"] == expected[number], number
            outcomes["right"] += 1
        else:
            code = answer.json()["error"]["code"]
            assert code in ("engine_unavailable", "stream_lost", "engine_dead"), answer.text
            outcomes[code] += 1

    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(ask, number) for number in numbers]
        for kind in rng.sample(sorted(VICTIMS), len(VICTIMS)):
            settle(lambda title=VICTIMS[kind]: pools_service.processes(title), f"no {kind}")
            kill(pools_service, VICTIMS[kind])
        for answer in asked:
            answer.result(timeout=240)
    assert outcomes.total() == len(numbers)
    assert outcomes["right"] > len(numbers) // 2, outcomes
    settle(lambda: is_whole(pools_service), "the service did not recover")
    pools_service.expect_quiet()
    settle(
        lambda: (
            len(psutil.Process(pools_service.process.pid).children(recursive=True))
            <= processes + 4  # Ray keeps a few idle workers for its own use
        ),
        "processes are left behind",
    )
