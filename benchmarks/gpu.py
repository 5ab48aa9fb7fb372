"""What ``bench gpu`` measures on a CUDA device: parity first, then speed beside what it allows.

1. Every kernel's largest error against the reference on the device, at the model's own sizes.
2. Decode at batch 1 to 256 and prefill of 512 to 8192 tokens, this engine and transformers with a
   static cache and ``torch.compile`` in turns, beside the device's read and multiply rates.
3. A workload of 256 requests with random lengths, as nano-vllm's table has it: output tokens/s
   (https://github.com/GeeeekExplorer/nano-vllm).
4. What sampling costs a step, as ``bench sampling`` measures it on the CPU.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..workers.engine import Engine
from ..workers.types import FinishReason, GenerateRequest, SamplingParams
from .report import Row, of_rounds
from .speed import Case
from .systems import random_prompt

BENCHMARK = "gpu"
DECODE = tuple(Case("decode", batch) for batch in (1, 4, 8, 16, 32, 64, 128, 256))
PREFILL = tuple(Case("prefill", length) for length in (512, 2048, 8192))
REQUESTS = 256
LENGTHS = (100, 1024)
"""Tokens of a prompt and of an output, each drawn evenly."""
TEMPERATURE = 0.6


def require_cuda() -> torch.device:
    """The device to measure. Raises ``ValueError`` where there is none."""
    if not torch.cuda.is_available():
        build = "has no CUDA in it" if torch.version.cuda is None else "finds no device"
        raise ValueError(
            f"bench gpu needs a CUDA device, but torch {torch.__version__} {build}; "
            "bench speed measures the CPU"
        )
    return torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request of the workload."""

    prompt: tuple[int, ...]
    output_tokens: int


def workload(num_tokens: int, *, count: int = REQUESTS, seed: int = 0) -> list[Wanted]:
    """The requests for a vocabulary of ``num_tokens``; the same seed gives the same."""
    rng = random.Random(seed)
    return [
        Wanted(tuple(random_prompt(rng.randint(*LENGTHS), num_tokens, rng)), rng.randint(*LENGTHS))
        for _ in range(count)
    ]


def run_workload(engine: Engine, wanted: Sequence[Wanted], name: str) -> float:
    """Output tokens/s from the first request to the last token, all sent at once.

    Raises ``RuntimeError`` where a request ends early or with an error.
    """
    for number, one in enumerate(wanted):
        params = SamplingParams(
            temperature=TEMPERATURE,
            seed=number,
            max_tokens=one.output_tokens,
            ignore_eos=True,
            loop_guard=False,
        )
        request = GenerateRequest(f"{name}-{number}", one.prompt, params)
        engine.validate(request)
        engine.add(request)
    tokens, begin = 0, time.perf_counter()
    while engine.has_work:
        for chunk in engine.step().chunks:
            if chunk.finish_reason not in (None, FinishReason.LENGTH):
                raise RuntimeError(
                    f"{chunk.request_id} ended with {chunk.finish_reason}: {chunk.error}"
                )
            tokens += len(chunk.token_ids)
    took = time.perf_counter() - begin
    due = sum(one.output_tokens for one in wanted)
    if tokens != due:
        raise RuntimeError(f"{tokens} tokens came of {due}")
    return tokens / took


def workload_row(rates: Sequence[float], precision: str, requests: int, command: str) -> Row:
    """The row of some rounds of the workload."""
    low, high = LENGTHS
    return Row.of(
        of_rounds(rates),
        benchmark=BENCHMARK,
        system="inference-pio",
        precision=precision,
        case=f"{requests} requests, {low} to {high} in and out",
        unit="tok/s",
        command=command,
    )


class StaticTransformers:
    """transformers with a static cache, whose decode step ``generate`` compiles."""

    name = "transformers, static cache, compiled"

    def __init__(self, checkpoint: str, precision: str) -> None:
        from .compare.peers.transformers_peer import Peer

        class Static(Peer):
            generation_options = {"cache_implementation": "static"}  # noqa: RUF012

        self.precision = precision
        self._peer: Any = Static(checkpoint, precision, "", torch.get_num_threads())

    def decode_rate(self, batch: int, prompt: int, steps: int) -> float:
        """See ``speed.System``."""
        return batch * steps / float(self._peer.decode_seconds(batch, prompt, steps))

    def prefill_rate(self, length: int) -> float:
        """See ``speed.System``."""
        return length / float(self._peer.first_token_seconds(length))


def measure_workload(
    engine: Engine, rounds: int, progress: Callable[[str], None], *, count: int = REQUESTS
) -> list[float]:
    """Rates of ``rounds`` rounds after a warm-up, each with requests of its own."""
    rates = []
    for number in range(rounds + 1):
        progress(f"workload, round {number} of {rounds}" if number else "workload")
        wanted = workload(engine.loaded.tokenizer.num_tokens, count=count, seed=number)
        rate = run_workload(engine, wanted, f"round-{number}")
        if number:
            rates.append(rate)
    return rates
