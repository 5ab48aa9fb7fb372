"""What sampling costs a step: the engine's sampler over random logits, without a model.

A device's kernels and torch's take turns within each round, on the same rows with the same seeds,
and have to draw the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.dispatch import select_kernels
from ..kernels.sampling.torch_sampling import TorchSampling
from ..workers.sampling.resolve import EffectiveSampling
from ..workers.sampling.row import SampledToken, SamplingRow
from ..workers.sampling.sampler import Sampler
from .report import Row, of_rounds

BENCHMARK = "sampling"
CPU = torch.device("cpu")
VOCAB_ROWS, NUM_TOKENS = 151_936, 151_669
"""Qwen3's."""
SPREAD = 3.0
"""Standard deviation of the logits: at temperature 1 the nucleus of 0.95 has 13,000 tokens, which
is more than language models leave but on their least certain tokens."""
BATCHES = (1, 32)
PROFILES = {
    "greedy": EffectiveSampling(temperature=0.0),
    "top-k 20, top-p 0.95": EffectiveSampling(temperature=0.6, top_k=20, top_p=0.95),
    "top-p 0.95": EffectiveSampling(top_p=0.95),
    "min-p 0.05": EffectiveSampling(min_p=0.05),
    "temperature": EffectiveSampling(),
}


@dataclass(slots=True)
class SamplingCost:
    """Seconds of each round, by system and case."""

    rounds: dict[tuple[str, str], list[float]] = field(default_factory=dict)


def measure(
    rounds: int,
    progress: Callable[[str], None],
    *,
    batches: Sequence[int] = BATCHES,
    vocabulary: tuple[int, int] = (VOCAB_ROWS, NUM_TOKENS),
    device: torch.device = CPU,
) -> SamplingCost:
    """Sample every profile at each batch size, ``rounds`` times after a warm-up.

    ``vocabulary``: rows of the logits, and tokens that exist. Raises ``RuntimeError`` where two
    systems draw different tokens.
    """
    kernels = select_kernels(device, torch.bfloat16)
    systems = {
        kernels.name: Sampler(kernels.sampling, *vocabulary),
        "torch": Sampler(TorchSampling(), *vocabulary),
    }
    cost = SamplingCost()
    for batch in batches:
        logits_RV = torch.randn(batch, vocabulary[0], generator=torch.Generator().manual_seed(0))
        logits_RV = logits_RV.mul_(SPREAD).to(device)
        for name, sampling in PROFILES.items():
            case = f"{name} b{batch}"
            for number in range(rounds + 1):
                progress(f"{case}, round {number} of {rounds}")
                rows = [SamplingRow(sampling, seed, number) for seed in range(batch)]
                taken = {
                    system: _time(sampler, logits_RV, rows) for system, sampler in systems.items()
                }
                if len({tokens for _, tokens in taken.values()}) != 1:
                    raise RuntimeError(f"{' and '.join(taken)} draw different tokens for {case}")
                for system, (seconds, _) in taken.items():
                    if number:
                        cost.rounds.setdefault((system, case), []).append(seconds)
    return cost


def rows(cost: SamplingCost, command: str, *, benchmark: str = BENCHMARK) -> list[Row]:
    """A row for each system and case."""
    return [
        Row.of(
            of_rounds([1e3 * seconds for seconds in found]),
            benchmark=benchmark,
            system=system,
            precision="float32",
            case=case,
            unit="ms",
            command=command,
        )
        for (system, case), found in cost.rounds.items()
    ]


def _time(
    sampler: Sampler, logits_RV: Tensor, rows: Sequence[SamplingRow]
) -> tuple[float, tuple[int, ...]]:
    start = time.perf_counter()
    sampled = sampler.sample(logits_RV, rows)
    seconds = time.perf_counter() - start
    return seconds, tuple(one.token_id for one in sampled if isinstance(one, SampledToken))
