"""What KV paging saves and costs: time to first token of prompts that are new, and that return.

An engine whose pool holds one prompt is asked, in each round, for a new prompt and then for one of
an earlier round, which others have driven out of the pool. Without tiers it is computed again; with
them it comes back. New prompts say what spilling costs: they hit nothing.
The disk's pages are likely to be in the system's page cache, so its figures are those of the way
through the file, not of the device.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ..workers.config import EngineConfig
from ..workers.engine import Engine
from ..workers.types import FinishReason, GenerateRequest, SamplingParams
from .report import Row, of_rounds
from .systems import random_prompt

BENCHMARK = "paging"
Tier = Literal["off", "host", "disk"]
TIERS: tuple[Tier, ...] = ("off", "host", "disk")
_LAG = {"off": 1, "host": 1, "disk": 3}
"""Rounds after which a prompt returns: host memory holds two."""


@dataclass(slots=True)
class Times:
    """Seconds to the first token, round by round."""

    new: list[float] = field(default_factory=list)
    returning: list[float] = field(default_factory=list)


Measured = dict[tuple[Tier, int], Times]
"""By tier and prompt length."""


def engine_config(
    base: dict[str, Any], tier: Tier, length: int, bytes_per_block: int
) -> EngineConfig:
    """An engine whose pool holds one prompt of ``length`` tokens, and whose tier holds several."""
    block = EngineConfig.model_validate(base).block_size
    prompt = -(-(length + 1) // block)
    paging = {}
    if tier != "off":
        paging["host_bytes"] = (2 * prompt + 2) * bytes_per_block
    if tier == "disk":
        paging["disk_bytes"] = 8 * prompt * bytes_per_block
    return EngineConfig.model_validate(
        base | {"kv_cache_bytes": (prompt + 1) * bytes_per_block, "kv_paging": paging}
    )


class PagingBench:
    """One engine, asked for new and for returning prompts of one length."""

    def __init__(self, engine: Engine, tier: Tier, length: int) -> None:
        self._engine = engine
        self._tier = tier
        self._length = length
        self._rng = random.Random(0)
        self._asked: list[tuple[int, ...]] = []
        self._sent = 0

    def round(self) -> tuple[float, float | None]:
        """Seconds for a new prompt, and for an earlier one, if there was one.

        Raises ``RuntimeError`` where that came from elsewhere than it should.
        """
        ids = random_prompt(self._length, self._engine.loaded.tokenizer.num_tokens, self._rng)
        self._asked.append(tuple(ids))
        new, _ = self._first_token(self._asked[-1])
        returning = None
        if len(self._asked) > _LAG[self._tier]:
            hits = self._hit_tokens()
            returning, cached = self._first_token(self._asked.pop(0))
            came = self._hit_tokens() - hits
            if self._tier != "off" and 2 * came < self._length:
                raise RuntimeError(f"{came} of {cached} cached tokens came from the {self._tier}")
        return new, returning

    def _hit_tokens(self) -> int:
        stats = self._engine.stats().kv_paging
        return 0 if stats is None else stats.hit_tokens.get(self._tier, 0)

    def _first_token(self, prompt: tuple[int, ...]) -> tuple[float, int]:
        self._settle()
        self._sent += 1
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        begin = time.perf_counter()
        self._engine.add(GenerateRequest(f"bench-{self._sent}", prompt, params))
        while not (chunks := self._engine.step().chunks):
            pass
        took = time.perf_counter() - begin
        if chunks[0].finish_reason is not FinishReason.LENGTH:
            raise RuntimeError(f"the engine ended the prompt: {chunks[0].error}")
        return took, chunks[0].usage.cached_tokens

    def _settle(self) -> None:
        """Let the disk finish what is queued, so that no prompt pays for the one before."""
        while (stats := self._engine.stats().kv_paging) is not None and stats.pages_writing:
            self._engine.step()
            time.sleep(0.001)


def measure(
    base: dict[str, Any],
    lengths: Sequence[int],
    rounds: int,
    bytes_per_block: int,
    progress: Callable[[str], None],
) -> Measured:
    """Every tier at every length, ``rounds`` times after a warm-up."""
    measured: Measured = {}
    for length in lengths:
        for tier in TIERS:
            times = measured[tier, length] = Times()
            engine = Engine(engine_config(base, tier, length, bytes_per_block))
            try:
                bench = PagingBench(engine, tier, length)
                while len(times.new) < rounds:
                    progress(f"{tier}, {length} tokens, {len(times.new)} of {rounds} rounds")
                    new, returning = bench.round()
                    if returning is not None:
                        times.new.append(new)
                        times.returning.append(returning)
            finally:
                engine.close()
    return measured


def rows(measured: Measured, precision: str, command: str) -> list[Row]:
    """Times, then what a returning prompt takes beside a new one of the same round."""
    row = partial(Row.of, benchmark=BENCHMARK, precision=precision, command=command)
    found = []
    for (tier, length), times in measured.items():
        for what, seconds in (("new", times.new), ("returning", times.returning)):
            case = f"first token, {length} tokens, {what}"
            figure = of_rounds([1e3 * value for value in seconds])
            found.append(row(figure, system=f"paging {tier}", case=case, unit="ms"))
    for (tier, length), times in measured.items():
        ratio = of_rounds([r / n for r, n in zip(times.returning, times.new, strict=True)])
        case = f"first token, {length} tokens, returning / new"
        found.append(row(ratio, system=f"paging {tier}", case=case, unit="ratio"))
    return found
