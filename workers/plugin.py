"""The plugin API: one object a model, with ``load_model``, ``generate`` and ``generate_text``.

A thin face over :class:`~inference_pio.workers.llm.LLM` for programs that hold models as plugins:
configure, load, use, unload. What is not built yet is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from .config import EngineConfig, FrozenConfig, KVCacheDType, ParallelConfig, QuantizationName
from .llm import LLM, Message, RequestOutput
from .types import SamplingParams

PRECISIONS: dict[str, Literal["auto", "float32", "bfloat16", "float16"]] = {
    "auto": "auto",
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}

_LONG_PROMPT = 512
"""Prompt tokens of a step from which sequence parallel ranks split it: chat turns stay below."""


class PluginConfig(FrozenConfig):
    """What a plugin may be told; every key has a default that serves one machine."""

    model_path: str
    """A checkpoint folder, a hub name, or ``embedded``."""
    max_batch_size: int = Field(64, ge=1)
    """Sequences computed in one step."""
    kv_cache_bytes: int | None = Field(None, ge=1)
    """Memory for the KV cache; ``None``: a share of what is free."""
    max_model_len: int | None = Field(None, ge=2)
    """Prompt plus output of one sequence, in tokens."""
    precision: str = "auto"
    """``auto``, ``fp32``, ``bf16`` or ``fp16``."""
    quantization: QuantizationName = "none"
    """What linears are rounded to on load: ``int8``, ``w8a8``, ``int4``, ``w4a8`` or ``nf4``."""
    kv_cache_dtype: KVCacheDType = "auto"
    """What keys and values are rounded to: ``int8`` or ``fp8``; ``auto`` keeps the precision."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that share every layer."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """Stages that the layers are split into."""
    sequence_parallel_size: int = Field(1, ge=1)
    """Ranks that split a long prompt's tokens: the tensor ranks, or 1 for none."""

    @field_validator("precision")
    @classmethod
    def _built_precision(cls, value: str) -> str:
        if value not in PRECISIONS:
            raise ValueError(
                f"precision {value!r} is not built; built are {', '.join(sorted(PRECISIONS))}"
            )
        return value

    @model_validator(mode="after")
    def _tensor_ranks_split_tokens(self) -> Self:
        if self.sequence_parallel_size not in (1, self.tensor_parallel_size):
            raise ValueError(
                f"sequence_parallel_size is {self.sequence_parallel_size}; the tensor ranks split "
                f"the tokens, so it is tensor_parallel_size ({self.tensor_parallel_size}) or 1"
            )
        return self

    def engine_config(self) -> EngineConfig:
        """The engine's view of this configuration."""
        return EngineConfig(
            model=self.model_path,
            dtype=PRECISIONS[self.precision],
            quantization=self.quantization,
            kv_cache_dtype=self.kv_cache_dtype,
            max_num_seqs=self.max_batch_size,
            max_batched_tokens=max(1024, self.max_batch_size),
            kv_cache_bytes=self.kv_cache_bytes,
            max_model_len=self.max_model_len,
            parallel=ParallelConfig(
                tensor=self.tensor_parallel_size,
                pipeline=self.pipeline_parallel_size,
                sequence_from=_LONG_PROMPT if self.sequence_parallel_size > 1 else None,
            ),
        )


class Qwen3Plugin:
    """A Qwen3 model behind the plugin API."""

    def __init__(self, name: str, config: PluginConfig) -> None:
        self.name = name
        self.config = config
        self._llm: LLM | None = None

    @property
    def is_loaded(self) -> bool:
        return self._llm is not None

    def load_model(self) -> Self:
        """Load the checkpoint and start the engine; a loaded plugin stays as it is.

        Raises ``CheckpointError`` with the reason where the checkpoint cannot be used.
        """
        if self._llm is None:
            self._llm = LLM(self.config.engine_config())
        return self

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete raw prompts (text or token ids), all in one batch; results in their order."""
        return self._loaded().generate(prompts, params)

    def generate_text(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
    ) -> str:
        """Answer a question, or a conversation, through the chat template; only the answer."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        output = self._loaded().chat(messages, params, enable_thinking=enable_thinking)
        return output.choices[0].content

    def unload(self) -> None:
        """Stop the engine and give its memory back."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None

    def _loaded(self) -> LLM:
        if self._llm is None:
            raise RuntimeError(f"plugin {self.name!r} is not loaded; call load_model() first")
        return self._llm


def create_qwen3_0_6b_plugin(model_path: str = "Qwen/Qwen3-0.6B", **options: object) -> Qwen3Plugin:
    """A plugin for Qwen3-0.6B; ``options`` are the keys of :class:`PluginConfig`."""
    config = PluginConfig.model_validate({"model_path": model_path, **options})
    return Qwen3Plugin("qwen3-0.6b", config)


def create_qwen3_4b_instruct_2507_plugin(
    model_path: str = "Qwen/Qwen3-4B-Instruct-2507", **options: object
) -> Qwen3Plugin:
    """A plugin for Qwen3-4B-Instruct-2507; ``options`` are the keys of :class:`PluginConfig`."""
    config = PluginConfig.model_validate({"model_path": model_path, **options})
    return Qwen3Plugin("qwen3-4b-instruct-2507", config)
