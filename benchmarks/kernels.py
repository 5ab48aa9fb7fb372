"""What each operation of a forward pass reaches of the machine's limits.

Operations run one by one through the kernels that an engine of the model selects, each call on
weights or cache blocks of its own, so that they come from memory as in a step of many layers. What
can be compared (formats of weights, of the KV cache, patterns of attention) takes turns within each
round, and the floor is sampled between turns.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..kernels.api import Kernels
from ..kernels.dispatch import select_kernels
from ..workers.model.config import ModelConfig
from .floor import READ_BYTES, Floor, FloorProbe, Work
from .report import Row, of_rounds

BENCHMARK = "kernels"
WORKING_SET = READ_BYTES["cpu"]
"""Bytes that the calls of a candidate go round in: what the floor reads, too."""
MOST_CALLS = 4096
"""Small shapes fill less than the working set: objects take time to make as well."""
SECONDS = 0.1
"""Of a turn, about."""

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Setup:
    """What computes, and the model that gives the shapes."""

    kernels: Kernels
    shapes: ModelConfig
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def here(cls, shapes: ModelConfig, dtype: torch.dtype) -> Setup:
        """On the device that an engine takes by itself; on as many threads as torch has now."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(select_kernels(device, dtype), shapes, dtype, device)

    @property
    def precision(self) -> str:
        """The name of the dtype."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a case."""

    name: str
    precision: str
    work: Work
    """Of one call. Bytes that are written count as read."""
    calls: Sequence[Call]
    """Each on memory of its own."""


@dataclass(frozen=True, slots=True)
class Case:
    """An operation at a size; all candidates are compared with the first."""

    name: str
    candidates: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one call, and what the machine allowed meanwhile."""

    seconds: float
    floor: Floor

    def share(self, work: Work) -> float:
        """Of the floor; 1 is the limit."""
        return self.floor.seconds(work) / self.seconds


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate's rounds."""

    case: str
    candidate: str
    precision: str
    work: Work
    rounds: tuple[Round, ...]


def num_calls(num_bytes: int) -> int:
    """How many calls go round in the working set or a little more, if each takes so much memory."""
    return min(MOST_CALLS, math.ceil(WORKING_SET / num_bytes))


def measure(
    cases: Iterable[Case],
    probe: FloorProbe,
    device: torch.device,
    rounds: int,
    progress: Callable[[str], None],
) -> list[Measured]:
    """Every case, ``rounds`` times after a warm-up; a case's memory is freed before the next."""
    found = []
    for case in cases:
        progress(case.name)
        found += _measure_case(case, probe, device, rounds)
        del case  # before the next one is made
    return found


def _measure_case(
    case: Case, probe: FloorProbe, device: torch.device, rounds: int
) -> list[Measured]:
    taken: list[list[Round]] = [[] for _ in case.candidates]
    with torch.inference_mode():
        turns = [_Turns(candidate.calls, device) for candidate in case.candidates]
        for _ in range(rounds):
            before = probe.sample()
            for turn, own in zip(turns, taken, strict=True):
                seconds = turn.seconds_of_a_call()
                after = probe.sample()
                own.append(Round(seconds, before.mean(after)))
                before = after
    return [
        Measured(case.name, candidate.name, candidate.precision, candidate.work, tuple(own))
        for candidate, own in zip(case.candidates, taken, strict=True)
    ]


def rows(measured: Sequence[Measured], kernels: str, command: str) -> list[Row]:
    """The rate of each candidate in the unit that limits it, then how many times as fast it is as
    the first of its case, round by round."""
    row = partial(Row.of, benchmark=BENCHMARK, command=command)
    found = []
    for one in measured:
        unit, done = _unit(one)
        found.append(
            row(
                of_rounds([done / r.seconds for r in one.rounds]),
                system=f"{kernels}, {one.candidate}",
                precision=one.precision,
                case=one.case,
                unit=unit,
                floor_share=of_rounds([r.share(one.work) for r in one.rounds]).median,
            )
        )
    for _, group in itertools.groupby(measured, key=lambda one: one.case):
        first, *others = group
        for other in others:
            pairs = zip(first.rounds, other.rounds, strict=True)
            found.append(
                row(
                    of_rounds([a.seconds / b.seconds for a, b in pairs]),
                    system=f"{other.candidate} / {first.candidate}",
                    precision=other.precision,
                    case=other.case,
                    unit="ratio",
                )
            )
    return found


class _Turns:
    """Calls one after another, round and round; the first ones are not timed."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._next = itertools.cycle(calls)
        self._device = device
        self._run(1)  # plans, compiles and allocates
        count = 1
        while (took := self._run(count)) < SECONDS / 4:
            count *= 2
        self._count = math.ceil(count * SECONDS / took)

    def seconds_of_a_call(self) -> float:
        """The mean of a turn."""
        return self._run(self._count) / self._count

    def _run(self, count: int) -> float:
        start = time.perf_counter()
        for call in itertools.islice(self._next, count):
            call()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


def _unit(one: Measured) -> tuple[str, float]:
    """The unit of what limits a candidate, and how much of it a call does."""
    read = sum(one.work.read_bytes / r.floor.bytes_per_s for r in one.rounds)
    multiply = sum(one.work.multiply_adds / r.floor.multiply_adds_per_s for r in one.rounds)
    if multiply > read:
        return "TFLOP/s", 2 * one.work.multiply_adds / 1e12
    return "GB/s", one.work.read_bytes / 1e9
