"""Every topology gives what one engine gives: fp32 greedy text, log-probabilities within 1e-3.

Grids on their own are tested beside their code; here prefill and decode engines of different
degrees hand KV to each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inference_pio.embedded.problem import is_correct
from inference_pio.embedded.tasks import generate
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine
from inference_pio.workers.text.messages import normalise_messages
from inference_pio.workers.types import GenerateRequest, SamplingParams, TokenChunk

SHAPES: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "sp2": {"tensor": 2, "sequence_from": 24},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
}
PAIRS = [
    ("single", "single"),
    ("tp2", "single"),
    ("single", "tp2"),
    ("sp2", "pp2"),
    ("pp2", "tp2"),
]
"""Prefill side and decode side."""


def start(shape: str, **options: Any) -> Engine:
    return Engine(
        EngineConfig.model_validate(
            {
                "model": "embedded",
                "dtype": "float32",
                "block_size": 8,
                "max_batched_tokens": 32,
                "max_num_seqs": 16,
                "kv_cache_bytes": 64 * 2**20,
                "num_threads": 1,
                "parallel": SHAPES[shape],
                **options,
            }
        )
    )


def requests(engine: Engine, count: int, salt: str = "") -> list[GenerateRequest]:
    """Sums with a thought, some with a long conversation before them."""
    template = engine.loaded.text.template
    found = []
    for number, problem in enumerate(generate("arithmetic", "test", 3, count)):
        turns = [*problem.messages]
        if number % 2:
            talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
            turns = [*talk * 6, *turns]
        ids = template.render(normalise_messages(turns), (), enable_thinking=None)
        params = SamplingParams(temperature=0.0, max_tokens=48, logprobs=2, ignore_eos=True)
        found.append(GenerateRequest(f"r{number}", tuple(ids), params, cache_salt=salt))
    return found


def run(engine: Engine, asked: list[GenerateRequest], source: Engine | None = None) -> Outputs:
    """Drive one engine, or a decode engine and its prefill source, until all is answered."""
    engine.remote_prefill = None if source is None else lambda _query: True
    for request in asked:
        engine.validate(request)
        engine.add(request)
    chunks: list[TokenChunk] = []
    while len({c.request_id for c in chunks if c.finish_reason}) < len(asked):
        output = engine.step()
        chunks += output.chunks
        if source is not None:
            for wanted in output.wanted:
                source.add_prefill(wanted)
            sent = source.step()
            for ticket in sent.tickets:
                engine.import_ticket(ticket.request_id, ticket.attempt, ticket.buffer)
            for end in sent.prefill_ends:
                assert end.error is None
                engine.end_import(end.request_id, end.attempt, None)
            source.check_integrity()
        engine.check_integrity()
    outputs: Outputs = {}
    for chunk in chunks:
        assert chunk.error is None, chunk.error
        ids, logprobs = outputs.setdefault(chunk.request_id, ([], []))
        ids += chunk.token_ids
        logprobs += [item.logprob for item in chunk.logprobs or ()]
    return outputs


Outputs = dict[str, tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def expected() -> Iterator[Outputs]:
    engine = start("single")
    yield run(engine, requests(engine, 6))
    engine.close()


@pytest.fixture(scope="module")
def engine_of() -> Iterator[Callable[[str], Engine]]:
    """An engine of a shape. A grid's processes take seconds to start, so each is started once."""
    started: list[Engine] = []

    def get(shape: str) -> Engine:
        started.append(start(shape))
        return started[-1]

    grid = functools.cache(get)
    yield lambda shape: get(shape) if shape == "single" else grid(shape)
    for engine in started:
        engine.close()


@pytest.mark.parametrize(("prefill", "decode"), PAIRS, ids=lambda name: name)
def test_a_handoff_between_any_two_degrees_changes_nothing(
    prefill: str, decode: str, engine_of: Callable[[str], Engine], expected: Outputs
) -> None:
    source, engine = engine_of(prefill), engine_of(decode)
    imported = engine.stats().kv_imported_tokens
    # Salted, so that no cached prefix of another pair is there instead.
    found = run(engine, requests(engine, 6, salt=f"{prefill} {decode}"), source)
    assert engine.stats().kv_imported_tokens > imported
    assert set(engine.stats().kv_import_ends) == {"done"}
    assert found.keys() == expected.keys()
    for name, (ids, logprobs) in found.items():
        assert ids == expected[name][0], name
        assert logprobs == pytest.approx(expected[name][1], abs=1e-3), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "single"])
def test_the_embedded_model_is_as_accurate_on_any_grid(shape: str, tmp_path: Path) -> None:
    shares = {}
    problems = list(generate("arithmetic", "test", 9, 200))
    for name in ("single", shape):
        engine = start(name, dtype="auto", max_batched_tokens=256, max_num_seqs=64, block_size=16)
        template = engine.loaded.text.template
        params = SamplingParams(temperature=0.0, max_tokens=400)
        asked = [
            GenerateRequest(
                f"r{number}",
                tuple(template.render(normalise_messages(p.messages), (), enable_thinking=None)),
                params,
            )
            for number, p in enumerate(problems)
        ]
        outputs = run(engine, asked)
        close = engine.loaded.text.phase_tokens.think_close
        assert close is not None
        right = 0
        for number, problem in enumerate(problems):
            ids = outputs[f"r{number}"][0]
            answer = ids[ids.index(close) + 1 :] if close in ids else []
            right += is_correct(problem, engine.loaded.tokenizer.decode(answer))
        shares[name] = right / len(problems)
        engine.close()
    # bf16 rounds differently on a grid; a fault would cost far more than one problem in fifty.
    assert shares["single"] > 0.9
    assert shares[shape] == pytest.approx(shares["single"], abs=0.02)
