"""Quantized weights through the whole engine: kernels change nothing about the text."""

from __future__ import annotations

import pytest

from inference_pio import LLM, SamplingParams
from inference_pio.kernels.native.library import cpu_flags, usable

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, loop_guard=False)
PROMPTS = ["What is 417 + 58 - 903?", "Tell me about the sea.", "A " * 60, "1 2 3 4 5 6 7 8 9"]


def greedy_texts(kernels: str, quantization: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", kernels)
    options = {"dtype": "float32", "block_size": 16, "kv_cache_bytes": 16 << 20}
    with LLM("embedded", quantization=quantization, **options) as llm:
        return [result.choices[0].text for result in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.skipif(not usable(cpu_flags()), reason="no native kernels for this CPU")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_native_kernels_write_what_the_dequantized_model_writes(
    quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = greedy_texts("native", quantization, monkeypatch)
    assert texts == greedy_texts("reference", quantization, monkeypatch)
