"""Which sampling values hold for a token: the phase's, else the request's, else the model's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from ..types import PhaseSampling, SamplingParams, SequencePhase, ThinkingMode

GREEDY_BELOW = 1e-5
"""Temperatures up to this take the best token; dividing by them would overflow."""


class RepetitionWindow(StrEnum):
    """Which tokens a repetition penalty counts."""

    SEQUENCE = "sequence"  # prompt and output
    THOUGHT = "thought"  # tokens generated in the thought
    ANSWER = "answer"  # tokens generated in the answer and its tool calls


@dataclass(frozen=True, slots=True)
class DefaultSampling:
    """A checkpoint's values for one mode; ``top_k`` 0 means all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


_QWEN_THINKING = DefaultSampling(0.6, 0.95, 20)
_QWEN_NON_THINKING = DefaultSampling(0.7, 0.8, 20)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """A checkpoint's values for both modes."""

    thinking: DefaultSampling = DefaultSampling()
    non_thinking: DefaultSampling = DefaultSampling()

    @classmethod
    def from_generation(
        cls, temperature: float | None, top_p: float | None, top_k: int | None
    ) -> Self:
        """From ``generation_config.json``; a value that is missing there filters nothing.

        The file has one set of values. Where it is Qwen3's for thinking, the checkpoint is a
        hybrid, and without thinking the values of its model card hold (0.7, 0.8, 20).
        """
        neutral = DefaultSampling()
        given = DefaultSampling(
            neutral.temperature if temperature is None else temperature,
            neutral.top_p if top_p is None else top_p,
            neutral.top_k if top_k is None else max(top_k, 0),
        )
        return cls(given, _QWEN_NON_THINKING if given == _QWEN_THINKING else given)


@dataclass(frozen=True, slots=True)
class EffectiveSampling:
    """The concrete numbers for one token; ``top_k`` 0 means all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: RepetitionWindow = RepetitionWindow.SEQUENCE

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, without chance."""
        return self.temperature <= GREEDY_BELOW


def resolve(
    params: SamplingParams,
    defaults: SamplingDefaults,
    mode: ThinkingMode,
    phase: SequencePhase,
) -> EffectiveSampling:
    """The values for the next token in ``phase``.

    A phase's repetition penalty takes the place of the request's and counts that phase's tokens.
    """
    model = defaults.thinking if mode is ThinkingMode.THINKING else defaults.non_thinking
    # Before its first token decides, a sequence in thinking mode is about to think.
    early = phase is SequencePhase.PROMPT and mode is ThinkingMode.THINKING
    in_thought = early or phase is SequencePhase.THINKING
    profile = (params.thinking if in_thought else params.answer) or PhaseSampling()
    repetition, window = params.repetition_penalty, RepetitionWindow.SEQUENCE
    if profile.repetition_penalty is not None:
        repetition = profile.repetition_penalty
        window = RepetitionWindow.THOUGHT if in_thought else RepetitionWindow.ANSWER
    return EffectiveSampling(
        temperature=_first(profile.temperature, params.temperature, model.temperature),
        top_p=_first(profile.top_p, params.top_p, model.top_p),
        top_k=max(int(_first(profile.top_k, params.top_k, model.top_k)), 0),
        min_p=_first(profile.min_p, params.min_p),
        presence_penalty=_first(profile.presence_penalty, params.presence_penalty),
        frequency_penalty=_first(profile.frequency_penalty, params.frequency_penalty),
        repetition_penalty=repetition,
        repetition_window=window,
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
