"""How answers are drawn: as the model's card asks, in each mode, or greedily."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .item import Mode


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of a request, by the names of the API."""

    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    def fields(self) -> dict[str, Any]:
        """What goes into the request's body; ``None`` leaves a setting to the server."""
        return {name: value for name, value in asdict(self).items() if value is not None}


MODEL_CARD: dict[Mode, Sampling] = {
    "thinking": Sampling(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0),
    "non-thinking": Sampling(temperature=0.7, top_p=0.8, top_k=20, min_p=0.0),
}
"""Qwen3's own recommendations; Qwen3-4B-Instruct-2507 has the second."""


def sampling_for(mode: Mode, temperature: float | None) -> Sampling:
    """The card's settings, or with a temperature of one's own nothing but that."""
    return MODEL_CARD[mode] if temperature is None else Sampling(temperature)
