"""What a checkpoint says about itself: its shapes and its own sampling defaults."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ARCHITECTURE = "Qwen3ForCausalLM"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded, with the file and what is wrong in it."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a Qwen3 model, all read from ``config.json``."""

    vocab_size: int
    """Rows of the embedding; rows above the tokenizer's tokens are padding."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    dtype: torch.dtype
    """The dtype that the checkpoint was saved in."""

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads ``config.json``; raises ``CheckpointError`` where it is absent or not Qwen3."""
        return cls.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], origin: str) -> ModelConfig:
        """The same from parsed JSON; ``origin`` names it in errors."""
        _refuse_what_is_not_qwen3(raw, origin)
        read = _Reader(raw, origin)
        num_heads = read.positive("num_attention_heads")
        hidden_size = read.positive("hidden_size")
        config = cls(
            vocab_size=read.positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.positive("intermediate_size"),
            num_layers=read.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=read.positive("num_key_value_heads", num_heads),
            head_dim=read.positive("head_dim", hidden_size // num_heads),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(raw, origin),
            max_position_embeddings=read.positive("max_position_embeddings"),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            attention_bias=read.flag("attention_bias"),
            dtype=_dtype(raw, origin),
        )
        if config.num_heads % config.num_kv_heads:
            raise CheckpointError(
                f"{origin}: {config.num_heads} query heads cannot share "
                f"{config.num_kv_heads} key/value heads evenly"
            )
        if config.head_dim % 2:
            raise CheckpointError(f"{origin}: head_dim is {config.head_dim}; RoPE needs it even")
        return config


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The checkpoint's own sampling settings; ``None`` where it names none."""

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Reads ``generation_config.json`` where there is one, else the eos of ``config.json``."""
        path = folder / "generation_config.json"
        raw = read_json(path) if path.exists() else {}
        config = read_json(folder / "config.json")
        read = _Reader(raw, str(path))
        greedy = raw.get("do_sample") is False
        return cls(
            eos_token_ids=_eos(raw.get("eos_token_id", config.get("eos_token_id")), str(path)),
            temperature=0.0 if greedy else read.optional_number("temperature"),
            top_p=read.optional_number("top_p"),
            top_k=None if raw.get("top_k") is None else read.whole("top_k"),
        )


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object; raises ``CheckpointError`` with the path and the reason."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}; an object is expected")
    return raw


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed look-ups that name the file and the key when a value is wrong."""

    raw: dict[str, Any]
    origin: str

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.origin}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.origin}: {key} is {value!r}; an integer is expected")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.whole(key, default)
        if value < 1:
            raise CheckpointError(f"{self.origin}: {key} is {value}; it must be at least 1")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.raw.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.origin}: {key} is {value!r}; a number is expected")
        if not math.isfinite(value):
            raise CheckpointError(f"{self.origin}: {key} is {value}; it must be finite")
        return float(value)

    def number(self, key: str, default: float) -> float:
        value = self.optional_number(key)
        return default if value is None else value

    def flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.origin}: {key} is {value!r}; true or false is expected")
        return value


def _refuse_what_is_not_qwen3(raw: dict[str, Any], origin: str) -> None:
    if "auto_map" in raw:
        raise CheckpointError(
            f"{origin} has auto_map: code that comes with a checkpoint is never run"
        )
    architectures = raw.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise CheckpointError(
            f"{origin}: architectures is {architectures!r}; only [{ARCHITECTURE!r}] is supported"
        )
    if raw.get("use_sliding_window"):
        raise CheckpointError(f"{origin}: use_sliding_window is not supported")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{origin}: hidden_act is {activation!r}; only 'silu' is supported")


def _rope_theta(raw: dict[str, Any], origin: str) -> float:
    """transformers 5 writes ``rope_parameters``, older ones ``rope_theta`` and ``rope_scaling``."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{origin}: rope_parameters is {rope!r}; an object is expected")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{origin}: RoPE type {kind!r} is not supported; only 'default' is")
    source = rope if "rope_theta" in rope else raw
    theta = _Reader(source, origin).optional_number("rope_theta")
    if theta is None:
        raise CheckpointError(f"{origin}: neither rope_parameters nor rope_theta gives a RoPE base")
    if theta <= 1:
        raise CheckpointError(f"{origin}: rope_theta is {theta}; it must be above 1")
    return theta


def _dtype(raw: dict[str, Any], origin: str) -> torch.dtype:
    name = raw.get("dtype", raw.get("torch_dtype", "float32"))
    if name not in DTYPES:
        raise CheckpointError(
            f"{origin}: dtype is {name!r}; supported are {', '.join(sorted(DTYPES))}"
        )
    return DTYPES[name]


def _eos(value: Any, origin: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise CheckpointError(f"{origin}: eos_token_id is {value!r}; token ids are expected")
    return tuple(ids)
