"""Results as rows of a report: shares with their Wilson intervals, tokens, seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ..accuracy import BENCHMARK, wilson
from ..report import Figure, Row, of_requests
from .evaluate import Evaluation
from .item import Mode
from .results import Result

Part = tuple[str, str, Mode]


def rows(evaluation: Evaluation, precision: str, command: str) -> list[Row]:
    """For each task (or category) and mode: its measures, then tokens and seconds an answer.

    The spread of a share is its 95 % Wilson interval; of the others the 1st and 99th percentile.
    """
    row = partial(
        Row.of,
        benchmark=BENCHMARK,
        system=public_name(evaluation.model),
        precision=precision,
        command=command,
    )
    found = []
    for part, results in _parts(evaluation.results).items():
        for measure, judged in _measures(results).items():
            share = Figure(sum(judged) / len(judged), *wilson(sum(judged), len(judged)))
            found.append(row(share, case=_case(part), unit=measure))
        for unit, values in _costs(results):
            found.append(row(of_requests(values), case=_case(part), unit=unit))
    return found


def notes(evaluation: Evaluation) -> list[str]:
    """How many items each share is of, and what a reader must know of them."""
    return [_note(part, results) for part, results in _parts(evaluation.results).items()]


def public_name(model: str) -> str:
    """A model's name without the folders of a machine."""
    return Path(model).name if model.startswith(("/", "~", "./", "../")) else model


def _note(part: Part, results: Sequence[Result]) -> str:
    cut = sum(result.reply.finish_reason == "length" for result in results)
    refused = [result.reply.refusal for result in results if result.reply.refusal]
    told = f"{_case(part)}: {len(results)} item{'s' * (len(results) > 1)}"
    if cut:
        told += f", {cut} cut at the limit of tokens"
    if refused:
        told += f", {len(refused)} refused and counted as wrong ({refused[0]})"
    return told


def _parts(results: Sequence[Result]) -> dict[Part, list[Result]]:
    parts: defaultdict[Part, list[Result]] = defaultdict(list)
    for result in results:
        parts[result.task, result.category, result.mode].append(result)
    return parts


def _case(part: Part) -> str:
    task, category, mode = part
    return f"{task} {category}, {mode}" if category else f"{task}, {mode}"


def _measures(results: Sequence[Result]) -> dict[str, list[bool]]:
    measures: defaultdict[str, list[bool]] = defaultdict(list)
    for result in results:
        for measure, judged in result.verdict.items():
            measures[measure] += judged
    return measures


def _costs(results: Sequence[Result]) -> Iterator[tuple[str, list[float]]]:
    """Of answered items: tokens of the thought, where the server counts them, and of the rest."""
    replies = [result.reply for result in results if not result.reply.refusal]
    if not replies:
        return
    thoughts = [r.reasoning_tokens for r in replies if r.reasoning_tokens is not None]
    if len(thoughts) == len(replies):
        if any(thoughts):
            yield "thought tokens", [float(tokens) for tokens in thoughts]
        rest = [r.completion_tokens - t for r, t in zip(replies, thoughts, strict=True)]
        yield "answer tokens", [float(tokens) for tokens in rest]
    else:
        yield "tokens", [float(reply.completion_tokens) for reply in replies]
    yield "s", [reply.seconds for reply in replies]
