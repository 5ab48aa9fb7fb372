"""Engines whose layers do not all fit into memory: the same tokens, and what streaming costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference_pio import LLM, SamplingParams
from inference_pio.kernels.native.library import cpu_flags, usable

pytestmark = pytest.mark.skipif(
    not usable(cpu_flags()), reason="no native kernels for this CPU, and nothing else is streamed"
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, loop_guard=False)
PROMPTS = ["What is 417 + 58 - 903?", "Tell me about the sea.", "A " * 60, "1 2 3 4 5 6 7 8 9"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def open_llm(**options: Any) -> LLM:
    return LLM("embedded", block_size=16, kv_cache_bytes=16 << 20, **options)


def least_bytes(**options: Any) -> int:
    """The smallest limit, as its refusal names it."""
    with pytest.raises(ValueError, match="at least") as refusal:
        open_llm(weight_memory_bytes=1, **options)
    return int(str(refusal.value).partition("at least ")[2].partition(" ")[0])


def logprobs_and_tokens(llm: LLM) -> list[tuple[Any, ...]]:
    params = SamplingParams(
        temperature=0.0, max_tokens=24, ignore_eos=True, loop_guard=False, logprobs=2
    )
    return [(r.choices[0].token_ids, r.choices[0].logprobs) for r in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_streamed_layers_compute_the_same_to_the_bit(dtype: str, quantization: str) -> None:
    options = {"dtype": dtype, "quantization": quantization}
    with open_llm(**options) as llm:
        resident = logprobs_and_tokens(llm)
    with open_llm(**options, weight_memory_bytes=least_bytes(**options)) as llm:
        assert logprobs_and_tokens(llm) == resident
        assert llm.engine.stats().weight_bytes_streamed > 0
        llm.engine.loaded.model.check_integrity()
