"""What ``bench speed`` measures: this project's engine, stepped directly."""

from __future__ import annotations

import random
import time
from typing import Any

from ..workers.config import EngineConfig
from ..workers.engine import Engine
from ..workers.types import FinishReason, GenerateRequest, SamplingParams

KV_BYTES = 2**30
"""Holds 32 short sequences or one of 2048 tokens of a 4B model several times over."""


def random_prompt(length: int, num_tokens: int, rng: random.Random) -> list[int]:
    """Ids of ordinary tokens: those with a role stand at the end of a vocabulary."""
    return [rng.randrange(num_tokens // 2) for _ in range(length)]


class OwnEngine:
    """This project's engine, stepped directly: one that is there, or a new one."""

    name = "inference-pio"

    def __init__(self, engine: Engine | EngineConfig) -> None:
        self.engine = engine if isinstance(engine, Engine) else Engine(engine)
        self.precision = str(self.engine.loaded.model.dtype).removeprefix("torch.")
        self._rng = random.Random(0)
        self._sent = 0

    def decode_rate(self, batch: int, prompt: int, steps: int) -> float:
        # One more than is timed: the first token of each comes with its prompt, and prompts may
        # finish in different steps.
        self._add(batch, prompt, max_tokens=steps + batch + 1)
        started: set[str] = set()
        while len(started) < batch:
            started |= {chunk.request_id for chunk in self._step()}
        begin = time.perf_counter()
        tokens = sum(len(chunk.token_ids) for _ in range(steps) for chunk in self._step())
        took = time.perf_counter() - begin
        self._abandon()
        return tokens / took

    def prefill_rate(self, length: int) -> float:
        self._add(1, length, max_tokens=1)
        begin = time.perf_counter()
        while not self._step():
            pass
        took = time.perf_counter() - begin
        self._abandon()
        return length / took

    def _add(self, count: int, prompt: int, max_tokens: int) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, loop_guard=False
        )
        for _ in range(count):
            ids = random_prompt(prompt, self.engine.loaded.tokenizer.num_tokens, self._rng)
            request = GenerateRequest(f"bench-{self._sent}", tuple(ids), params)
            self._sent += 1
            self.engine.validate(request)
            self.engine.add(request)

    def _step(self) -> list[Any]:
        chunks = self.engine.step().chunks
        for chunk in chunks:
            if chunk.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise RuntimeError(f"the engine ended {chunk.request_id}: {chunk.error}")
        return chunks

    def _abandon(self) -> None:
        self.engine.abort_all()
        while self.engine.has_work:
            self.engine.step()
