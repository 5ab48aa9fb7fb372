"""This project's engine, stepped directly; in the environment where it is installed.

llama.cpp and OpenVINO round activations to 8 bits where weights have 8 or 4, so int8 is ``w8a8``
and int4 is ``w4a8`` here. With AMX int4 stays ``int4``: ``w4a8`` does not use its tiles.
"""

from __future__ import annotations

import importlib.metadata

import torch

from inference_pio.benchmarks.systems import KV_BYTES, OwnEngine
from inference_pio.kernels.dispatch import select_kernels
from inference_pio.workers.config import EngineConfig, QuantizationName


def quantization_of(precision: str, kernels: str) -> QuantizationName:
    """What stands for a precision where the kernels of this name compute."""
    if precision == "int8":
        return "w8a8"
    if precision == "int4":
        return "int4" if kernels == "native:amx" else "w4a8"
    return "none"


def prepare(checkpoint: str, precision: str, folder: str) -> None:
    """The checkpoint is read as it is."""


class Peer:
    """A loaded engine."""

    def __init__(self, checkpoint: str, precision: str, folder: str, threads: int) -> None:
        kernels = select_kernels(torch.device("cpu"), torch.bfloat16)
        quantization = quantization_of(precision, kernels.name)
        is_quantized = quantization != "none"
        config = EngineConfig.model_validate(
            {
                "model": checkpoint,
                "dtype": "bfloat16" if is_quantized else precision,
                "quantization": quantization,
                "num_threads": threads,
                "kv_cache_bytes": KV_BYTES,
                "max_num_seqs": 32,
                "prefix_caching": False,
            }
        )
        self.version = importlib.metadata.version("inference-pio")
        if is_quantized:
            self.version += f" in {quantization}"
        self._engine = OwnEngine(config)

    def decode_seconds(self, batch: int, prompt: int, steps: int) -> float:
        """Of ``steps`` tokens for each of ``batch`` sequences, behind the first."""
        return batch * steps / self._engine.decode_rate(batch, prompt, steps)

    def first_token_seconds(self, length: int) -> float:
        """From a prompt of ``length`` tokens to its first token."""
        return length / self._engine.prefill_rate(length)
