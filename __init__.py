"""Inference-PIO: a Ray Serve cluster for Qwen3 with an engine of its own.

The names below are loaded on first use, so that a process which needs only the configuration or
the HTTP side does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .workers.config import EngineConfig
    from .workers.llm import LLM, ChoiceOutput, RequestOutput, StreamDelta
    from .workers.plugin import (
        PluginConfig,
        Qwen3Plugin,
        create_qwen3_0_6b_plugin,
        create_qwen3_4b_instruct_2507_plugin,
    )
    from .workers.types import PhaseSampling, RequestError, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ChoiceOutput",
    "EngineConfig",
    "PhaseSampling",
    "PluginConfig",
    "Qwen3Plugin",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StreamDelta",
    "create_qwen3_0_6b_plugin",
    "create_qwen3_4b_instruct_2507_plugin",
]

_HOMES = {
    "EngineConfig": "config",
    "LLM": "llm",
    "ChoiceOutput": "llm",
    "RequestOutput": "llm",
    "StreamDelta": "llm",
    "PluginConfig": "plugin",
    "Qwen3Plugin": "plugin",
    "create_qwen3_0_6b_plugin": "plugin",
    "create_qwen3_4b_instruct_2507_plugin": "plugin",
    "PhaseSampling": "types",
    "RequestError": "types",
    "SamplingParams": "types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.workers.{_HOMES[name]}"), name)
