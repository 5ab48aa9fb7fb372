"""Checkpoints of random weights at real shapes: speed does not depend on the values."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .config import ModelConfig
from .loader import INDEX_FILE, SINGLE_FILE
from .names import expected_shapes

Shape = Literal["qwen3-0.6b", "qwen3-4b"]
MAX_SHARD_BYTES = 4 * 10**9
INITIALIZER_RANGE = 0.02
NORM_SPREAD = 0.1
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

# The published config.json of both models, without what only training reads.
_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": INITIALIZER_RANGE,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _COMMON
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "rope_theta": 1000000,
    },
    "qwen3-4b": _COMMON
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "rope_theta": 5000000,
    },
}
_GENERATION: dict[str, Any] = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "top_k": 20,
}
GENERATION_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _GENERATION | {"temperature": 0.6, "top_p": 0.95},
    "qwen3-4b": _GENERATION | {"temperature": 0.7, "top_p": 0.8},
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def make_random_checkpoint(shape: Shape, out: Path, tokenizer_dir: Path, seed: int = 0) -> None:
    """Writes a bf16 checkpoint of the named model's real shapes with random weights.

    The tokenizer's files are copied from ``tokenizer_dir``. The same seed gives the same bytes.
    Raises ``ValueError`` for an unknown shape or a folder without ``tokenizer.json``.
    """
    if shape not in CONFIGS:
        raise ValueError(f"shape is {shape!r}; it is one of {', '.join(CONFIGS)}")
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise ValueError(f"{tokenizer_dir} has no tokenizer.json")
    write_random_checkpoint(CONFIGS[shape], out, seed=seed)
    _write_json(out / "generation_config.json", GENERATION_CONFIGS[shape])
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, out / name)


def write_random_checkpoint(
    raw_config: Mapping[str, Any],
    out: Path,
    *,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes ``config.json`` and random weights for any Qwen3 configuration, tensor by tensor.

    Matrices are normal with the configuration's ``initializer_range``, norms spread around one.
    Files are written beside their place and renamed, so a checkpoint in use stays whole.
    """
    config = ModelConfig.from_dict(dict(raw_config), "config")
    deviation = float(raw_config.get("initializer_range", INITIALIZER_RANGE))
    out.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(n, s, config.dtype) for n, s in expected_shapes(config).items()]
    shards = _shards(specs, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(out / name, shard, seed, deviation)
    (out / INDEX_FILE).unlink(missing_ok=True)
    if len(shards) > 1:
        where = {s.name: n for n, shard in zip(names, shards, strict=True) for s in shard}
        total = sum(spec.num_bytes for spec in specs)
        _write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    _write_json(out / "config.json", raw_config)


def _shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def _write_safetensors(
    path: Path, specs: Iterable[TensorSpec], seed: int, deviation: float
) -> None:
    specs = list(specs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for spec in specs:
            tensor = _random_tensor(spec, seed, deviation)
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    os.replace(partial, path)


def _random_tensor(spec: TensorSpec, seed: int, deviation: float) -> torch.Tensor:
    """The values depend on the seed and the tensor's name alone, not on the sharding."""
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    values = torch.from_numpy(generator.standard_normal(spec.shape, dtype=np.float32))
    if spec.name.endswith("norm.weight"):
        return values.mul_(NORM_SPREAD).add_(1).to(spec.dtype)
    return values.mul_(deviation).to(spec.dtype)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
