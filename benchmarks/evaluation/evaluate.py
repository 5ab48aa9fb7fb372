"""Asks the items of task sets, several at a time, and judges the answers as they come."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..load import closed_loop
from . import bfcl, gsm8k, humaneval, ifeval
from .client import ApiClient
from .item import Item, Mode, Reply, Verdict
from .results import Result, Results
from .sampling import sampling_for

LOADERS: dict[str, Callable[[], list[Item]]] = {
    gsm8k.TASK: gsm8k.load,
    ifeval.TASK: ifeval.load,
    humaneval.TASK: humaneval.load,
    bfcl.TASK: bfcl.load,
}
SCORERS: dict[str, Callable[[Item, Reply], Verdict]] = {
    gsm8k.TASK: gsm8k.score,
    ifeval.TASK: ifeval.score,
    humaneval.TASK: humaneval.score,
    bfcl.TASK: bfcl.score,
}
TASKS = tuple(LOADERS)

_TELLINGS = 50
"""Times that a run says how far it is: logs keep every one."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is to be asked and how."""

    tasks: Sequence[str]
    modes: Sequence[Mode]
    limit: int | None
    """Items of each task, and of each category of one that has them; ``None``: all."""
    seed: int
    """Of the choice of items and of sampling."""
    temperature: float | None
    """``None``: as the model's card asks."""
    max_tokens: int | None
    """Of an answer with its thought; ``None``: as many as the server lets it have."""
    streams: int
    """Requests under way at any time."""
    timeout_s: float
    """For one answer."""
    results: Path | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The judged answers of a run, and the model's name at the server."""

    model: str
    results: tuple[Result, ...]


def chosen_items(tasks: Sequence[str], limit: int | None, seed: int) -> list[Item]:
    """A random choice of each part, the same for every run of that seed.

    A greater limit adds to the choice of a smaller one. Raises ``DataError``, ``ValueError``.
    """
    chosen = []
    for task in tasks:
        if task not in LOADERS:
            raise ValueError(f"task {task!r} is not known; it is one of {', '.join(TASKS)}")
        parts: defaultdict[str, list[Item]] = defaultdict(list)
        for item in LOADERS[task]():
            parts[item.category].append(item)
        for category, items in parts.items():
            random.Random(f"{seed} {task} {category}").shuffle(items)
            chosen += items[:limit]
    return chosen


async def evaluate(url: str, wishes: Wishes, progress: Callable[[str], None]) -> Evaluation:
    """Ask what the results file does not have yet.

    Raises ``StreamError`` where the server fails; what was answered is in the file.
    """
    items = chosen_items(wishes.tasks, wishes.limit, wishes.seed)
    async with ApiClient(url, max_tokens=wishes.max_tokens, timeout_s=wishes.timeout_s) as client:
        with Results(wishes.results, _settings(client.model, wishes)) as results:
            asked = [(item, mode) for mode in wishes.modes for item in items]
            open_ = [(i, m) for i, m in asked if (i.task, i.id, m) not in results]
            done = len(asked) - len(open_)
            each = max(1, len(asked) // _TELLINGS)

            async def ask(question: tuple[Item, Mode]) -> None:
                nonlocal done
                item, mode = question
                sampling = sampling_for(mode, wishes.temperature)
                reply = await client.ask(item, mode, sampling, seed_of(item, wishes.seed))
                verdict = await asyncio.to_thread(SCORERS[item.task], item, reply)
                results.add(Result(item.task, item.id, item.category, mode, reply, verdict))
                done += 1
                if done % each == 0:
                    progress(f"{done} of {len(asked)} answered, {item.task} {mode}")

            progress(f"{done} of {len(asked)} answered")
            await closed_loop(open_, wishes.streams, ask)
            found = tuple(results[item.task, item.id, mode] for item, mode in asked)
    return Evaluation(client.model, found)


def seed_of(item: Item, seed: int) -> int:
    """Each item draws in its own way, the same in every run of that seed."""
    return zlib.crc32(f"{seed} {item.id}".encode()) >> 1


def _settings(model: str, wishes: Wishes) -> dict[str, Any]:
    """What decides an answer: results of other settings are another run's."""
    return {
        "model": model,
        "seed": wishes.seed,
        "temperature": wishes.temperature,
        "max_tokens": wishes.max_tokens,
    }
