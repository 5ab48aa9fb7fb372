"""This project's engine, stepped directly; in the environment where it is installed."""

from __future__ import annotations

import importlib.metadata

from inference_pio.benchmarks.systems import KV_BYTES, OwnEngine
from inference_pio.workers.config import EngineConfig

QUANTIZATION = {"int8": "w8a8", "int4": "int4"}
"""The others round activations to 8 bits as well where weights have 8."""


def prepare(checkpoint: str, precision: str, folder: str) -> None:
    """The checkpoint is read as it is."""


class Peer:
    """A loaded engine."""

    def __init__(self, checkpoint: str, precision: str, folder: str, threads: int) -> None:
        quantization = QUANTIZATION.get(precision)
        config = EngineConfig.model_validate(
            {
                "model": checkpoint,
                "dtype": "bfloat16" if quantization else precision,
                "quantization": quantization or "none",
                "num_threads": threads,
                "kv_cache_bytes": KV_BYTES,
                "max_num_seqs": 32,
                "prefix_caching": False,
            }
        )
        self.version = importlib.metadata.version("inference-pio")
        self._engine = OwnEngine(config)

    def decode_seconds(self, batch: int, prompt: int, steps: int) -> float:
        """Of ``steps`` tokens for each of ``batch`` sequences, behind the first."""
        return batch * steps / self._engine.decode_rate(batch, prompt, steps)

    def first_token_seconds(self, length: int) -> float:
        """From a prompt of ``length`` tokens to its first token."""
        return length / self._engine.prefill_rate(length)
