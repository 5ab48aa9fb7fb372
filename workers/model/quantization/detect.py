"""Which layout a checkpoint's ``quantization_config`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import CheckpointError, read_json
from .awq import AWQLayout
from .bitsandbytes import BitsAndBytesLayout
from .fp8 import FP8Layout
from .gptq import GPTQLayout
from .layout import Layout, Settings
from .own import METHOD, OwnLayout

LAYOUTS: dict[str, Callable[[Settings], Layout]] = {
    METHOD: OwnLayout,
    "fp8": FP8Layout,
    "gptq": GPTQLayout,
    "awq": AWQLayout,
    "bitsandbytes": BitsAndBytesLayout,
}
"""By ``quant_method``."""


def layout_of_folder(folder: Path) -> Layout | None:
    """The layout of a checkpoint; ``None`` for weights as they were trained.

    Raises ``CheckpointError`` for a method or settings that are not read.
    """
    path = folder / "config.json"
    return layout_of(read_json(path), str(path))


def layout_of(raw: Mapping[str, Any], origin: str) -> Layout | None:
    """The same from a parsed ``config.json``; ``origin`` names it in errors."""
    settings = raw.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{origin}: quantization_config is {settings!r}, not an object")
    method = settings.get("quant_method")
    if method not in LAYOUTS:
        raise CheckpointError(
            f"{origin}: quantization_config.quant_method is {method!r}; "
            f"read are {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[method](Settings(settings, origin))
