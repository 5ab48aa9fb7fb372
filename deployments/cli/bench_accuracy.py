"""``inference-pio bench accuracy``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...benchmarks.evaluation.evaluate import TASKS, Wishes, evaluate
from ...benchmarks.evaluation.item import MODES, Mode
from ...benchmarks.evaluation.rows import notes, rows
from ...workers.config import EngineConfig
from .bench_runs import check_picture, publish, running_server, typed_command
from .console import CommandError, progress

SERVED = "as served"
"""The precision of a server that was started elsewhere: it does not say."""


def run_embedded_accuracy(
    count: int,
    temperature: float | None,
    seed: int,
    engine: Mapping[str, Any],
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Ask the embedded model; see ``benchmarks.accuracy``."""
    from ...benchmarks import accuracy
    from ...workers.llm import LLM
    from ...workers.types import SamplingParams

    check_picture(picture)
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=512)
    with progress() as say:
        say("loading the embedded model")
        with LLM("embedded", **engine) as llm:
            dtype = str(llm.engine.loaded.model.dtype).removeprefix("torch.")
            precision = precision_of(llm.engine.config, dtype)
            scores = accuracy.score_all(llm, count, seed, params, say)
    publish(accuracy.rows(scores, precision, typed_command()), json_file, picture)


def task_set_wishes(
    tasks: Sequence[str],
    modes: Sequence[str],
    limit: int | None,
    seed: int,
    temperature: float | None,
    max_tokens: int | None,
    streams: int,
    timeout_s: float,
    results: Path | None,
) -> Wishes:
    """The options, checked; no modes: all that the model has. Raises ``CommandError``."""
    for option, wanted, known in (("--task", tasks, TASKS), ("--mode", modes, MODES)):
        for name in wanted:
            if name not in known:
                raise CommandError(f"{option} {name!r} is not known: it is {' or '.join(known)}")
    wanted_modes: tuple[Mode, ...] = tuple(mode for mode in MODES if mode in modes)
    return Wishes(
        tuple(tasks) or TASKS,
        wanted_modes,
        limit,
        seed,
        temperature,
        max_tokens,
        streams,
        timeout_s,
        results,
    )


def run_task_sets(
    model: str,
    url: str | None,
    engine: Mapping[str, Any],
    wishes: Wishes,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Ask a server the task sets; see ``benchmarks.evaluation``."""
    from ...benchmarks.evaluation.evaluate import chosen_items

    check_picture(picture)
    chosen_items(
        wishes.tasks, wishes.limit, wishes.seed
    )  # absent data shows before a server starts
    if not wishes.modes:
        wishes = replace(wishes, modes=MODES if url is not None else modes_of(model))
    if url is not None:
        with progress() as say:
            found = asyncio.run(evaluate(url, wishes, say))
        precision = SERVED
    else:
        with running_server(None, model, None, engine) as (address, _, config):
            with progress() as say:
                found = asyncio.run(evaluate(address, wishes, say))
            precision = precision_of(config, config.dtype)
    publish(rows(found, precision, typed_command()), json_file, picture, notes=notes(found))


def precision_of(config: EngineConfig, dtype: str) -> str:
    """What a report calls the precision of an engine whose plain weights would be of ``dtype``."""
    parts = [dtype if config.quantization == "none" else config.quantization]
    if config.kv_cache_dtype != "auto":
        parts.append(f"{config.kv_cache_dtype} KV")
    if not config.attention.is_exact:
        parts.append(config.attention.label)
    return ", ".join(parts)


def modes_of(model: str) -> tuple[Mode, ...]:
    """The modes that a model's chat template knows. Raises ``ValueError`` for a bad checkpoint."""
    from ...workers.loading import load_text
    from ...workers.model_source import resolve_model

    thinks = load_text(resolve_model(model)).template.supports_thinking
    return MODES if thinks else ("non-thinking",)
