"""What handing KV over costs, and from which prompt length on it pays.

1. Rates: the steps of a ticket's way (export, transfer, import) beside the memory copy floor.
2. Overlap: time to first token with tickets sent chunk by chunk, and all of them after the last.
3. Break-even: time to first token of a remote and of a local prefill by prompt length, with the
   decode engine idle and with it decoding for others, and what the others got meanwhile.
All variants take turns within a round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..workers.engine import Engine
from ..workers.kv.handoff import Accepted, KVExport, KVImport
from ..workers.kv.tensor_words import as_tensor, as_words
from ..workers.kv.ticket import encode_ticket
from ..workers.kv.token_chain import TokenChain
from ..workers.types import BlockId, FinishReason, GenerateRequest, SamplingParams, StepOutput
from .report import Row, of_rounds
from .systems import random_prompt

BENCHMARK = "handoff"
TICKETS = 8
"""Tickets in a row when the transfer is timed: their waits overlap as in a long prompt."""
LOADS = (0, 8)
"""Sequences that the decode engine decodes beside the prompt."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a prompt is prefilled."""

    name: str
    remote: bool
    hold: bool = False


LOCAL = Way("local", remote=False)
OVERLAPPED = Way("remote", remote=True)
HELD = Way("remote, sent at the end", remote=True, hold=True)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One prompt: seconds to its first token, and tokens/s of the others meanwhile."""

    seconds: float
    others_per_s: float


Measured = dict[tuple[str, int, int], list[FirstToken]]
"""By way, prompt length and load."""


class HandoffBench:
    """A decode engine here and a prefill engine behind ``peer`` (``handoff_peer``)."""

    def __init__(self, engine: Engine, peer: Any) -> None:
        self._engine = engine
        self._peer = peer
        self._rng = random.Random(0)
        self._sent = 0

    # --- rates ----------------------------------------------------------------------------------

    def rates(self, num_tokens: int) -> dict[str, float]:
        """Bytes/s of a copy in memory, and of each step of a ticket of ``num_tokens``."""
        layout, executor = self._engine.kv_layout, self._engine.executor
        ids = self._prompt(num_tokens)
        chain = TokenChain(ids, layout.block_size, layout.fingerprint, "")
        about: dict[str, Any] = {
            "request_id": "bench",
            "attempt": 1,
            "epoch": 1,
            "layout": layout,
            "chain": chain,
            "start": 0,
            "limit": num_tokens,
            "deadline": float("inf"),
        }
        blocks = [BlockId(number) for number in range(layout.num_blocks(0, num_tokens))]
        export, incoming = KVExport(**about), KVImport(**about)
        span = export.take(num_tokens)
        assert span is not None

        begin = time.perf_counter()
        buffer = encode_ticket(export.header(*span), as_words(executor.read_blocks(blocks)))
        exported = time.perf_counter() - begin

        begin = time.perf_counter()
        accepted = incoming.offer(buffer, 0.0)
        assert isinstance(accepted, Accepted)
        executor.write_blocks(blocks, as_tensor(accepted.blocks_Ln2KSD, layout.dtype))
        imported = time.perf_counter() - begin

        size = buffer.nbytes
        return {
            "memory copy": size / _copy_seconds(size),
            "export": size / exported,
            "transfer": TICKETS * size / self._transfer_seconds(size),
            "import": size / imported,
        }

    def _transfer_seconds(self, num_bytes: int) -> float:
        """From asking for the arrays until they can be read here."""
        import ray

        begin = time.perf_counter()
        for reference in self._peer.send.remote(TICKETS, num_bytes):
            ray.get(reference)
        return time.perf_counter() - begin

    # --- time to first token --------------------------------------------------------------------

    def first_token(self, way: Way, num_tokens: int, load: int) -> FirstToken:
        """Prefill one new prompt while ``load`` others decode. Raises ``RuntimeError`` where the
        prompt was not prefilled the way it was to be."""
        self._start_others(load)
        engine, name = self._engine, self._name()
        engine.remote_prefill = lambda query: way.remote and query.request_id == name
        before = engine.stats().kv_imported_tokens
        begin = time.perf_counter()
        engine.add(_request(name, self._prompt(num_tokens), max_tokens=1))
        tokens_of_others = self._until_first_token(name, way)
        seconds = time.perf_counter() - begin
        imported = engine.stats().kv_imported_tokens - before
        if imported != (num_tokens - 1 if way.remote else 0):
            raise RuntimeError(
                f"{way.name}: {imported} of {num_tokens} tokens were handed over; "
                f"imports ended {engine.stats().kv_import_ends}"
            )
        engine.remote_prefill = None
        engine.abort_all()
        while engine.has_work:
            engine.step()
        return FirstToken(seconds, tokens_of_others / seconds)

    def _until_first_token(self, name: str, way: Way) -> int:
        """Steps the engine and feeds it tickets; the tokens that others got until then."""
        tickets: Iterator[Any] | None = None
        others = 0
        while True:
            output = self._engine.step()
            for chunk in output.chunks:
                if chunk.error is not None or chunk.finish_reason is FinishReason.ABORT:
                    raise RuntimeError(f"the engine ended {chunk.request_id}: {chunk.error}")
                if chunk.request_id == name:
                    return others
                others += len(chunk.token_ids)
            for wanted in output.wanted:
                tickets = self._peer.prefill.remote(wanted, way.hold)
                asked = wanted
            if tickets is not None and self._feed(tickets, asked.request_id, asked.attempt):
                tickets = None

    def _feed(self, tickets: Any, request_id: str, attempt: int) -> bool:
        """Hand over what has come; waits where the engine has nothing else to do.

        Whether that was the last ticket.
        """
        import ray

        timeout = 0.0 if self._engine.has_work else None
        ready, _ = ray.wait([tickets], timeout=timeout)
        if not ready:
            return False
        try:
            buffer = ray.get(next(tickets))
        except StopIteration:
            self._engine.end_import(request_id, attempt, None)
            return True
        self._engine.import_ticket(request_id, attempt, buffer)
        return False

    def _start_others(self, count: int) -> None:
        names = [self._name() for _ in range(count)]
        for name in names:
            self._engine.add(_request(name, self._prompt(32), max_tokens=None))
        started: set[str] = set()
        while len(started) < count:
            started |= {chunk.request_id for chunk in self._checked(self._engine.step()).chunks}

    def _checked(self, output: StepOutput) -> StepOutput:
        for chunk in output.chunks:
            if chunk.error is not None:
                raise chunk.error
        return output

    def _prompt(self, length: int) -> list[int]:
        return random_prompt(length, self._engine.loaded.tokenizer.num_tokens, self._rng)

    def _name(self) -> str:
        self._sent += 1
        return f"bench-{self._sent}"


def measure(
    bench: HandoffBench,
    lengths: Sequence[int],
    ticket_tokens: int,
    rounds: int,
    progress: Callable[[str], None],
) -> tuple[list[dict[str, float]], Measured]:
    """Every figure ``rounds`` times after a warm-up, interleaved."""
    rates: list[dict[str, float]] = []
    times: Measured = {}
    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}" if number else "warming up")
        rate = bench.rates(ticket_tokens)
        if number:
            rates.append(rate)
        for length in lengths:
            for load in LOADS:
                for way in (LOCAL, OVERLAPPED, HELD):
                    if way is HELD and load:
                        continue
                    found = bench.first_token(way, length, load)
                    if number:
                        times.setdefault((way.name, length, load), []).append(found)
    return rates, times


def rows(
    rates: Sequence[dict[str, float]], times: Measured, precision: str, command: str
) -> list[Row]:
    """Rates, then times to first token, then ratios; a rate's floor is the memory copy."""
    row = partial(Row.of, benchmark=BENCHMARK, precision=precision, command=command)
    found = []
    for step in rates[0]:
        share = of_rounds([rate[step] / rate["memory copy"] for rate in rates]).median
        speed = of_rounds([rate[step] / 1e9 for rate in rates])
        floor = None if step == "memory copy" else share
        case = f"{step} of one ticket"
        found.append(row(speed, system=step, case=case, unit="GB/s", floor_share=floor))
    for (way, length, load), results in times.items():
        case = f"{length} tokens, {load} decoding"
        waited = of_rounds([1000 * result.seconds for result in results])
        found.append(row(waited, system=way, case=f"first token, {case}", unit="ms"))
        if load:
            others = of_rounds([result.others_per_s for result in results])
            found.append(row(others, system=way, case=f"others, {case}", unit="tok/s"))
    for (way, length, load), results in times.items():
        if way == LOCAL.name:
            continue
        pairs = zip(times[LOCAL.name, length, load], results, strict=True)
        ratio = of_rounds([remote.seconds / local.seconds for local, remote in pairs])
        case = f"first token, {length} tokens, {load} decoding"
        found.append(row(ratio, system=f"{way} / local", case=case, unit="ratio"))
    return found


def break_even(times: Measured, lengths: Sequence[int], load: int) -> int | None:
    """The shortest measured length from which on remote is faster; ``None`` if it never is."""
    shortest = None
    for length in sorted(lengths, reverse=True):
        local, remote = (
            of_rounds([result.seconds for result in times[way.name, length, load]]).median
            for way in (LOCAL, OVERLAPPED)
        )
        if remote >= local:
            break
        shortest = length
    return shortest


def _request(name: str, prompt: Sequence[int], *, max_tokens: int | None) -> GenerateRequest:
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, loop_guard=False
    )
    return GenerateRequest(name, tuple(prompt), params)


def _copy_seconds(num_bytes: int) -> float:
    """The best of a few copies between warm buffers."""
    source, target = np.ones(num_bytes, dtype=np.uint8), np.ones(num_bytes, dtype=np.uint8)
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        took.append(time.perf_counter() - begin)
    return min(took)
