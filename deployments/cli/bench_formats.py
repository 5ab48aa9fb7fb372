"""``inference-pio bench memory`` and ``inference-pio bench quantization``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...benchmarks import accuracy, memory, quantization
from ...benchmarks.evaluation.evaluate import evaluate
from ...benchmarks.speed import DECODE
from ...benchmarks.tradeoff import draw_tradeoff
from ...workers.config import EngineConfig
from ...workers.llm import LLM
from ...workers.types import SamplingParams
from .bench_accuracy import modes_of, task_set_wishes
from .bench_runs import check_picture, publish, running_server, typed_command
from .console import CommandError, err, progress

EMBEDDED = "embedded"
KV_BYTES = {False: 640 * memory.MIB, True: 64 * memory.MIB}
"""Of each engine of ``bench quantization``, by whether it has the embedded model: 32 short
sequences or one of 2048 tokens, of a 4B model too; not more than is filled in a few steps."""
STREAMS = 16
TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class QuantizationWishes:
    """The options of ``bench quantization``."""

    model: str
    formats: Sequence[str]
    count: int
    tasks: Sequence[str]
    modes: Sequence[str]
    limit: int | None
    max_tokens: int | None
    results: Path | None
    seed: int
    dtype: str
    threads: int | None
    rounds: int


def run_memory(
    model: str,
    formats: Sequence[str],
    kv_mib: int,
    dtype: str,
    threads: int | None,
    rounds: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure what formats take; see ``benchmarks.memory``."""
    check_picture(picture)
    configs = {
        name: memory.configuration(model, dtype, name, threads, kv_bytes=kv_mib * memory.MIB)
        for name in _formats(model, formats)
    }
    with progress() as say:
        measured = memory.measure(configs, rounds, say)
    publish(memory.rows(measured, typed_command()), json_file, picture)


def run_quantization(
    wishes: QuantizationWishes, json_file: Path | None, picture: Path | None
) -> None:
    """Measure size, error, speed and accuracy of formats; see ``benchmarks.quantization``."""
    check_picture(picture)
    names = _formats(wishes.model, wishes.formats)
    if names[0] != quantization.PLAIN:
        names = [quantization.PLAIN, *names]
    configs = {
        name: memory.configuration(
            wishes.model,
            wishes.dtype,
            name,
            wishes.threads,
            kv_bytes=KV_BYTES[wishes.model == EMBEDDED],
            sequences=DECODE[-1].size,
        )
        for name in names
    }
    answers: dict[str, quantization.Answers] = {}
    if wishes.tasks:
        for name in names:
            answers[name] = _served_answers(wishes, name)
    with progress() as say:
        if wishes.model == EMBEDDED and not wishes.tasks:
            for name, config in configs.items():
                answers[name] = _embedded_answers(wishes, config, _prefixed(say, name))
        measured = quantization.measure(configs, wishes.rounds, say)
    found = quantization.rows(measured, answers, typed_command())
    publish(found, json_file, None)
    if picture is not None:
        draw_tradeoff(found, picture)
        err.print(f"picture: {picture}", markup=False)


def _formats(model: str, wanted: Sequence[str]) -> list[str]:
    """The formats in their usual order. Raises ``CommandError`` for one that cannot be."""
    known = memory.formats_of(model)
    for name in wanted:
        if name not in known:
            raise CommandError(f"--format {name!r} is not possible: it is {' or '.join(known)}")
    return [name for name in known if name in (wanted or known)]


def _embedded_answers(
    wishes: QuantizationWishes, config: EngineConfig, say: Callable[[str], None]
) -> quantization.Answers:
    params = SamplingParams(temperature=0.0, seed=wishes.seed, max_tokens=512)
    with LLM(config) as llm:
        scores = accuracy.score_all(llm, wishes.count, wishes.seed, params, say)
    return {
        (score.kind, str(score.thinking), str(number)): right
        for score in scores
        for number, right in enumerate(score.right)
    }


def _served_answers(wishes: QuantizationWishes, name: str) -> quantization.Answers:
    """Whether each item's first measure (all instructions strictly, all tests) was right."""
    results = None
    if wishes.results is not None:
        wishes.results.mkdir(parents=True, exist_ok=True)
        results = wishes.results / f"{name}.jsonl"
    asked = task_set_wishes(
        wishes.tasks,
        wishes.modes,
        wishes.limit,
        wishes.seed,
        None,
        wishes.max_tokens,
        STREAMS,
        TIMEOUT_S,
        results,
    )
    if not asked.modes:
        asked = replace(asked, modes=modes_of(wishes.model))
    server = running_server(None, wishes.model, None, {"dtype": wishes.dtype, "quantization": name})
    with server as (url, _, _config), progress() as say:
        found = asyncio.run(evaluate(url, asked, _prefixed(say, name)))
    return {one.key: _first_measure(one.verdict) for one in found.results}


def _first_measure(verdict: Mapping[str, Sequence[bool]]) -> bool:
    return all(next(iter(verdict.values())))


def _prefixed(say: Callable[[str], None], name: str) -> Callable[[str], None]:
    return lambda text: say(f"{name}: {text}")
