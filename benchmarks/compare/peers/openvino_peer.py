"""OpenVINO GenAI: the continuous-batching pipeline, without prefix cache."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

WEIGHTS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "bfloat16": None,
    "int8": {"bits": 8, "sym": True},
    "int4": {"bits": 4, "sym": True, "group_size": 32, "ratio": 1.0},
}
HINTS = {"float32": "f32"}
"""The precision of activations; bf16 for every other."""


def prepare(checkpoint: str, precision: str, folder: str) -> None:
    """Exports the checkpoint, with its weights compressed where that is asked for."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    wanted = WEIGHTS[precision]
    options: dict[str, Any] = (
        {"load_in_8bit": False}
        if wanted is None
        else {"quantization_config": OVWeightQuantizationConfig(**wanted)}
    )
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, **options)
    model.save_pretrained(Path(folder) / precision)


class Peer:
    """A pipeline that takes ids."""

    def __init__(self, checkpoint: str, precision: str, folder: str, threads: int) -> None:
        import openvino_genai

        self.version = str(openvino_genai.__version__)
        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_batched_tokens = 4096
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.LLMPipeline(
            str(Path(folder) / precision),
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=threads,
            INFERENCE_PRECISION_HINT=HINTS.get(precision, "bf16"),
        )
        self._random = random.Random(0)

    def decode_seconds(self, batch: int, prompt: int, steps: int) -> float:
        """Of ``steps`` tokens for each of ``batch`` sequences, behind the first."""
        return self._generate(batch, prompt, steps + 1) - self._generate(batch, prompt, 1)

    def first_token_seconds(self, length: int) -> float:
        """From a prompt of ``length`` tokens to its first token."""
        return self._generate(1, length, 1)

    def _generate(self, batch: int, prompt: int, new_tokens: int) -> float:
        import numpy as np
        import openvino

        ids = np.array(
            [[self._random.randrange(300, 1000) for _ in range(prompt)] for _ in range(batch)],
            dtype=np.int64,
        )
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.do_sample = False
        config.ignore_eos = True
        config.apply_chat_template = False
        inputs = self._genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        begin = time.perf_counter()
        result = self._pipeline.generate(inputs, config)
        took = time.perf_counter() - begin
        if [len(tokens) for tokens in result.tokens] != [new_tokens] * batch:
            raise RuntimeError("OpenVINO GenAI gave another number of tokens")
        return took
