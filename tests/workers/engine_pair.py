"""Two engines in one process: one computes prompts, the other goes on with their KV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inference_pio.workers.types import PrefillRequest, RemoteQuery

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
# Without the penalty the random model repeats itself, whatever its KV.
GREEDY = PLAIN | {"temperature": 0.0, "repetition_penalty": 1.5}


class Pair:
    """A decode engine that wants every prompt computed by a prefill engine, and the way between."""

    def __init__(self, make_driver: MakeDriver, prefill: dict[str, Any], **decode: Any) -> None:
        self.decode = make_driver(**decode)
        self.prefill = make_driver(**(decode | prefill))
        self.queries: list[RemoteQuery] = []
        self.tickets: list[Any] = []
        self.unwanted: list[tuple[str, int]] = []
        self.decode.engine.remote_prefill = self._decide

    def _decide(self, query: RemoteQuery) -> bool:
        self.queries.append(query)
        return True

    def step(self) -> None:
        """A step of each engine; what came out of one goes into the other at once."""
        self.wanted()
        self.carry()

    def wanted(self) -> list[PrefillRequest]:
        """A step of the decode engine; what it wants goes to the other one."""
        self.decode.step()
        output = self.decode.output
        for request in output.wanted:
            self.prefill.engine.add_prefill(request)
        for name in output.unwanted:
            self.prefill.engine.abort_prefill(*name)
        self.unwanted += output.unwanted
        return list(output.wanted)

    def carry(self) -> None:
        """A step of the prefill engine; its tickets and ends go to the other one."""
        self.prefill.step()
        for ticket in self.prefill.output.tickets:
            self.tickets.append(ticket)
            self.decode.engine.import_ticket(ticket.request_id, ticket.attempt, ticket.buffer)
        for end in self.prefill.output.prefill_ends:
            reason = None if end.error is None else end.error.code
            self.decode.engine.end_import(end.request_id, end.attempt, reason)
        self.decode.engine.check_integrity()

    def run(self) -> None:
        while self.decode.engine.has_work or self.prefill.engine.has_work:
            self.step()
        for driver in (self.decode, self.prefill):
            driver.run()
            stats = driver.engine.stats()
            assert (stats.kv_imports_running, stats.kv_exports_running) == (0, 0)

    @property
    def ends(self) -> dict[str, int]:
        found: dict[str, int] = self.decode.engine.stats().kv_import_ends
        return found


MakePair = Callable[..., Pair]


def alone(make_driver: MakeDriver, prompt: list[int], **params: Any) -> list[int]:
    """What one engine without a past gives."""
    driver = make_driver(num_blocks=400)
    driver.add("r", prompt, **params)
    driver.run()
    tokens: list[int] = driver.tokens("r")
    return tokens


def count_tokens(monkeypatch: pytest.MonkeyPatch, driver: Any) -> list[int]:
    """The tokens of each forward pass from now on."""
    executor, counts = driver.engine.executor, []
    plain = executor.forward

    def forward(inputs: Any) -> Any:
        counts.append(len(inputs.token_ids))
        return plain(inputs)

    monkeypatch.setattr(executor, "forward", forward)
    return counts


def after_one_ticket(pair: Pair, prompt: list[int], **params: Any) -> PrefillRequest:
    """A request of which the first 48 of 99 tokens have come."""
    pair.decode.add("r", prompt, max_tokens=8, **GREEDY, **params)
    (request,) = pair.wanted()
    pair.carry()
    (sequence,) = pair.decode.engine._scheduler.running
    assert (sequence.num_computed_tokens, len(request.token_ids)) == (48, 99)
    return request
