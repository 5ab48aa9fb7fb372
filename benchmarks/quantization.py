"""Size against accuracy against speed: every weight format of one model, in one run.

1. Each format has an engine in a fresh process (``engine_process``), all at once; the memory of
   each is measured while it is loaded and filled.
2. The plain model writes its next-token distributions; the others are compared with them.
3. Speed is measured in turns, round by round, beside the machine's floor.
4. Answers are asked for format by format (by the caller) and compared item by item.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..workers.config import EngineConfig
from ..workers.model.config import DTYPES, ModelConfig
from ..workers.model_source import resolve_model
from . import memory
from .accuracy import wilson
from .divergence import Divergence
from .engine_process import EngineProcess
from .floor import FloorProbe
from .memory import figures
from .report import Figure, Row, of_rounds
from .speed import DECODE, PREFILL, Case, Rounds, shapes_of
from .speed import measure as measure_speed
from .speed import rows as speed_rows

BENCHMARK = "quantization"
PLAIN = "none"

Answers = Mapping[tuple[str, ...], bool]
"""Whether an answer was right, by what identifies its question."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of every format, by its name; without the answers."""

    memory: Mapping[str, memory.Figures]
    divergence: Mapping[str, Divergence]
    systems: Sequence[EngineProcess]
    speed: Rounds


def measure(
    configs: Mapping[str, EngineConfig],
    rounds: int,
    progress: Callable[[str], None],
    cases: Sequence[Case] = (*DECODE, *PREFILL),
) -> Measured:
    """Memory, divergence and speed of every configuration. The first is the plain model's.

    Raises ``ValueError`` for a configuration that cannot be loaded.
    """
    found_memory, divergence = {}, {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        systems = []
        for name, config in configs.items():
            progress(f"{name}: loading and filling")
            system = stack.enter_context(EngineProcess(name, config))
            found_memory[name] = figures(system.stages, system.fill(), config)
            systems.append(system)
        for system in systems:
            progress(f"{system.name}: next-token distributions")
            if system is systems[0]:
                system.write_reference(folder / "reference")
            else:
                divergence[system.name] = system.compare_with(folder / "reference")
        model = resolve_model(next(iter(configs.values())).model)
        limit = ModelConfig.from_folder(model).max_position_embeddings
        shapes = {s.name: shapes_of(model, s.dtype if s.name == PLAIN else s.name) for s in systems}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        speed = measure_speed(
            systems,
            shapes,
            FloorProbe(device, DTYPES[systems[0].dtype]),
            [case for case in cases if case.size < limit],
            rounds,
            progress,
        )
    return Measured(found_memory, divergence, systems, speed)


def rows(measured: Measured, answers: Mapping[str, Answers], command: str) -> list[Row]:
    """All figures of a format, then the next format's; the system is the format.

    The spread of a share is its 95 % Wilson interval, that of a mean the normal one.
    """
    row = partial(Row.of, benchmark=BENCHMARK, command=command)
    by_format: dict[str, list[Row]] = {name: [] for name in measured.memory}
    for name, found in by_format.items():
        make = partial(row, system=name, precision=name)
        found += [
            make(of_rounds([value]), case=case, unit=unit)
            for (case, unit), value in measured.memory[name].items()
        ]
        if name in answers:
            share = share_with_interval(list(answers[name].values()))
            found.append(make(share, case="accuracy", unit="right"))
            if name != PLAIN and PLAIN in answers:
                points = points_lost(answers[PLAIN], answers[name])
                found.append(make(points, case="accuracy lost", unit="points"))
        if name in measured.divergence:
            error = measured.divergence[name]
            changed = share_with_interval(error.changed)
            found.append(make(mean_with_error(error.kl), case="next token, mean KL", unit="nats"))
            found.append(make(changed, case="next token, top-1 changed", unit="share"))
    speeds = speed_rows(measured.speed, measured.systems, command, benchmark=BENCHMARK)
    for speed in speeds:
        if speed.unit != "ratio":
            by_format[speed.system].append(speed)
    return [one for found in by_format.values() for one in found]


def points_lost(plain: Answers, other: Answers) -> Figure:
    """Hundredths of the share that were lost on the same questions; below zero: gained."""
    both = [100.0 * (plain[key] - right) for key, right in other.items() if key in plain]
    return mean_with_error(both)


def share_with_interval(judged: Sequence[bool]) -> Figure:
    """The share and its 95 % Wilson interval."""
    return Figure(sum(judged) / len(judged), *wilson(sum(judged), len(judged)))


def mean_with_error(values: Sequence[float]) -> Figure:
    """The mean and its 95 % interval by the normal distribution."""
    mean = statistics.fmean(values)
    error = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Figure(mean, mean - error, mean + error)
