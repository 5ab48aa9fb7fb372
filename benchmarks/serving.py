"""Speed through HTTP: latencies and throughput of a running server, and the engine's own beside it.

Offline and served rounds take turns on the same machine with the same requests, so that their
ratio says what HTTP, Ray Serve and the text side cost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..embedded.tasks import generate
from ..workers.engine import Engine
from ..workers.text.messages import normalise_messages
from ..workers.types import GenerateRequest, SamplingParams
from .http_stream import Answer, post, read_answer
from .load import closed_loop, open_loop, poisson_arrivals
from .report import Figure, Row, of_requests, of_rounds

BENCHMARK = "serve"


@dataclass(frozen=True, slots=True)
class Question:
    """One request, for HTTP and for the engine alike."""

    messages: tuple[dict[str, Any], ...]
    max_tokens: int
    seed: int

    def body(self, model: str) -> dict[str, Any]:
        """The chat completion request."""
        return {
            "model": model,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True, slots=True)
class Wave:
    """One round: its answers and how long it took."""

    answers: tuple[Answer, ...]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the time from the first request to the last token."""
        begin = min(answer.sent for answer in self.answers)
        end = max(answer.last_token for answer in self.answers)
        return sum(answer.completion_tokens for answer in self.answers) / (end - begin)


def questions(count: int, max_tokens: int, seed: int) -> list[Question]:
    """Sums in words, all different, so that no prefix cache answers for the model.

    Every answer runs to ``max_tokens``: a round's length must not depend on what the model says.
    """
    problems = generate("arithmetic", "test", seed, count)
    return [
        Question(tuple(dict(turn) for turn in problem.messages), max_tokens, seed + number)
        for number, problem in enumerate(problems)
    ]


def serve_streams(url: str, model: str, asked: Sequence[Question], streams: int) -> Wave:
    """One round with ``streams`` requests under way at any time. Raises ``StreamError``."""

    async def run() -> list[Answer]:
        send = _sender(url, model)
        return [read_answer(r) for r in await closed_loop(asked, streams, send)]

    return Wave(tuple(asyncio.run(run())))


def serve_arrivals(url: str, model: str, asked: Sequence[Question], rate: float, seed: int) -> Wave:
    """One round with requests that arrive at random, ``rate`` a second. Raises ``StreamError``."""

    async def run() -> list[Answer]:
        arrivals = poisson_arrivals(rate, len(asked), seed)
        return [read_answer(r) for r in await open_loop(asked, arrivals, _sender(url, model))]

    return Wave(tuple(asyncio.run(run())))


def offline_tokens_per_s(engine: Engine, asked: Sequence[Question], streams: int) -> float:
    """The same requests on the engine alone, ``streams`` of them under way at any time."""
    requests = iter([_engine_request(engine, number, q) for number, q in enumerate(asked)])
    tokens = 0
    begin = time.perf_counter()
    for _ in range(streams):
        _add_next(engine, requests)
    while engine.has_work:
        for chunk in engine.step().chunks:
            tokens += len(chunk.token_ids)
            if chunk.finish_reason is not None:
                _add_next(engine, requests)
    return tokens / (time.perf_counter() - begin)


def latency_rows(waves: Sequence[Wave], precision: str, case: str, command: str) -> list[Row]:
    """Throughput over rounds, and latencies over all requests of all rounds."""
    answers = [answer for wave in waves for answer in wave.answers]
    answered = [a for a in answers if a.first_answer_token is not None]
    figures: list[tuple[str, str, Figure]] = [
        ("throughput", "tok/s", of_rounds([wave.tokens_per_s for wave in waves])),
        ("time to first token", "ms", _ms(a.first_token - a.sent for a in answers)),
        ("inter-token latency", "ms", _ms(gap for a in answers for gap in a.gaps)),
    ]
    if answered:
        times = _ms((a.first_answer_token or 0.0) - a.sent for a in answered)
        figures.append(("time to first answer token", "ms", times))
    return [
        Row.of(
            figure,
            benchmark=BENCHMARK,
            system="inference-pio server",
            precision=precision,
            case=f"{case}, {name}",
            unit=unit,
            command=command,
        )
        for name, unit, figure in figures
    ]


def offline_rows(
    offline: Sequence[float], waves: Sequence[Wave], precision: str, case: str, command: str
) -> list[Row]:
    """The engine's own throughput, and the share of it that the server keeps, round by round."""
    shares = [wave.tokens_per_s / own for wave, own in zip(waves, offline, strict=True)]
    row = partial(
        Row.of,
        benchmark=BENCHMARK,
        precision=precision,
        case=f"{case}, throughput",
        command=command,
    )
    return [
        row(of_rounds(offline), system="inference-pio engine", unit="tok/s"),
        row(of_rounds(shares), system="server / engine", unit="ratio"),
    ]


def _sender(url: str, model: str) -> Any:
    return lambda question: post(f"{url}/v1/chat/completions", question.body(model))


def _engine_request(engine: Engine, number: int, question: Question) -> GenerateRequest:
    ids = engine.loaded.text.template.render(
        normalise_messages(question.messages), (), enable_thinking=None
    )
    params = SamplingParams(max_tokens=question.max_tokens, ignore_eos=True, seed=question.seed)
    return GenerateRequest(f"offline-{number}", tuple(ids), params)


def _add_next(engine: Engine, requests: Iterable[GenerateRequest]) -> None:
    request = next(iter(requests), None)
    if request is not None:
        engine.add(request)


def _ms(seconds: Iterable[float]) -> Figure:
    return of_requests([1000 * value for value in seconds])
