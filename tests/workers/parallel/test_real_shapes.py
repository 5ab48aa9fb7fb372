"""The real 0.6B shapes on two ranks, against one process: ``pytest -m slow``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference_pio import LLM, RequestOutput, SamplingParams
from inference_pio.workers.model.random_checkpoint import make_random_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TEXT = "The capital of France is Paris, and that of Italy is Rome. " * 12
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5, prompt_logprobs=0)


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    make_random_checkpoint("qwen3-0.6b", folder, data_dir / "hf-qwen3-0.6b", 0)
    return folder


def generate(folder: Path, **options: Any) -> RequestOutput:
    with LLM(str(folder), dtype="float32", kv_cache_bytes=1 << 30, **options) as llm:
        return llm.generate(TEXT, PARAMS)[0]


@pytest.fixture(scope="module")
def expected(folder: Path) -> RequestOutput:
    return generate(folder)


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "sequence_from": 64}],
    ids=["TP2", "PP2", "SP2"],
)
def test_two_ranks_equal_one_process(
    folder: Path, expected: RequestOutput, parallel: dict[str, int]
) -> None:
    found = generate(folder, parallel=parallel)
    ours, theirs = found.choices[0], expected.choices[0]
    assert ours.token_ids == theirs.token_ids
    pairs = list(zip(ours.logprobs or (), theirs.logprobs or (), strict=True))
    prompts = zip(found.prompt_logprobs or (), expected.prompt_logprobs or (), strict=True)
    pairs += [(a, b) for a, b in prompts if a is not None and b is not None]
    assert len(pairs) > 100
    assert max(abs(a.logprob - b.logprob) for a, b in pairs) <= 1e-3
