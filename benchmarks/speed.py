"""Offline speed: decode at several batch sizes and prefill at several lengths, beside a floor.

Systems take turns within each round and the floor is sampled in between, so that a change of the
machine's bandwidth meets all of them alike. Every round's share of its own floor is what counts;
tokens/s are illustrations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ..workers.model.config import ModelConfig
from .floor import Floor, FloorProbe, Shapes, Work
from .report import Row, of_rounds

BENCHMARK = "speed"
PROMPT_TOKENS = 32
"""Prompt of a decode case: short, so that the weights and not the cache are measured."""

DECODE_STEPS = 32


@dataclass(frozen=True, slots=True)
class Case:
    """``decode`` of a batch, or ``prefill`` of a length."""

    kind: str
    size: int

    @property
    def name(self) -> str:
        return f"decode b{self.size}" if self.kind == "decode" else f"prefill {self.size}"


DECODE = tuple(Case("decode", batch) for batch in (1, 8, 32))
PREFILL = tuple(Case("prefill", length) for length in (512, 2048))


class System(Protocol):
    """Something that can generate with the checkpoint under test."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str: ...

    def decode_rate(self, batch: int, prompt: int, steps: int) -> float:
        """Generated tokens/s after the prompts are done, greedy, ``steps`` a sequence."""

    def prefill_rate(self, length: int) -> float:
        """Prompt tokens/s until the first token is there."""


@dataclass(frozen=True, slots=True)
class Round:
    """One case on one system, once."""

    tokens_per_s: float
    floor_share: float


Rounds = dict[tuple[str, str], list[Round]]


def measure(
    systems: Sequence[System],
    shapes: Shapes | Mapping[str, Shapes],
    probe: FloorProbe,
    cases: Sequence[Case],
    rounds: int,
    progress: Callable[[str], None],
) -> Rounds:
    """Run every case on every system, ``rounds`` times after a warm-up, interleaved.

    ``shapes`` are those of all systems, or by their names. Returns the rounds by (case name,
    system name).
    """
    results: Rounds = {}
    for case in cases:
        for number in range(rounds + 1):
            progress(f"{case.name}, round {number} of {rounds}" if number else f"{case.name}")
            for system in systems:
                before = probe.sample()
                rate = _rate(system, case)
                floor = before.mean(probe.sample())
                if number:
                    own = shapes if isinstance(shapes, Shapes) else shapes[system.name]
                    share = rate / _floor_rate(case, own, floor)
                    results.setdefault((case.name, system.name), []).append(Round(rate, share))
    return results


def rows(
    results: Rounds, systems: Sequence[System], command: str, *, benchmark: str = BENCHMARK
) -> list[Row]:
    """A row for each case and system, then the ratio to each other system, round by round."""
    precision = {system.name: system.precision for system in systems}
    row = partial(Row.of, benchmark=benchmark, command=command)
    found = [
        row(
            of_rounds([r.tokens_per_s for r in got]),
            system=name,
            precision=precision[name],
            case=case,
            unit="tok/s",
            floor_share=of_rounds([r.floor_share for r in got]).median,
        )
        for (case, name), got in results.items()
    ]
    first = systems[0].name
    for (case, name), others in results.items():
        if name != first:
            own = results[case, first]
            ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(own, others, strict=True)]
            found.append(
                row(
                    of_rounds(ratios),
                    system=f"{first} / {name}",
                    precision=precision[first],
                    case=case,
                    unit="ratio",
                )
            )
    return found


BYTES_PER_WEIGHT = {
    "float32": (4.0, 4.0, 4.0),
    "bfloat16": (2.0, 2.0, 2.0),
    "float16": (2.0, 2.0, 2.0),
    "int8": (1 + 2 / 32, 1 + 2 / 32, 2.0),
    "w8a8": (1.0, 1.0, 2.0),
    "int4": (1 / 2 + 2 / 32, 1 + 2 / 32, 2.0),
    "w4a8": (1 / 2 + 2 / 32, 1.0, 2.0),
    "nf4": (1 / 2 + 2 / 64, 1.0, 2.0),
}
"""By precision: of a layer's weight, of the head's and of a cached value. Weights of int8 and
int4 count as groups of 32 with a 16-bit scale, the most that a system compared here has; nf4 has
groups of 64, w8a8 a scale a row, as the head of w4a8. The head stays at int8."""


def shapes_of(folder: Path, precision: str) -> Shapes:
    """The sizes that decide the work of a token. Raises ``CheckpointError``."""
    config = ModelConfig.from_folder(folder)
    weight, head, cache = BYTES_PER_WEIGHT[precision]
    return Shapes(
        layers=config.num_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_width=config.num_heads * config.head_dim,
        kv_width=config.num_kv_heads * config.head_dim,
        vocab_rows=config.vocab_size,
        bytes_per_weight=weight,
        bytes_per_head_weight=head,
        bytes_per_cache_value=cache,
    )


def _rate(system: System, case: Case) -> float:
    if case.kind == "decode":
        return system.decode_rate(case.size, PROMPT_TOKENS, DECODE_STEPS)
    return system.prefill_rate(case.size)


def _floor_rate(case: Case, shapes: Shapes, floor: Floor) -> float:
    """Tokens/s that the floor allows."""
    if case.kind == "decode":
        middle = PROMPT_TOKENS + DECODE_STEPS // 2
        step: Work = shapes.decode_step(case.size, middle)
        return case.size / floor.seconds(step)
    return case.size / floor.seconds(shapes.prefill(case.size))
