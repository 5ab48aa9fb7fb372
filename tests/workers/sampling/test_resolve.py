from __future__ import annotations

import pytest

from inference_pio.workers.sampling.resolve import (
    DefaultSampling,
    EffectiveSampling,
    RepetitionWindow,
    SamplingDefaults,
    resolve,
)
from inference_pio.workers.types import (
    SAMPLING_PROFILES,
    PhaseSampling,
    SamplingParams,
    SequencePhase,
    ThinkingMode,
)

HYBRID = SamplingDefaults.from_generation(0.6, 0.95, 20)
THINKING, NON_THINKING = ThinkingMode.THINKING, ThinkingMode.NON_THINKING
PROMPT, THOUGHT, ANSWER, TOOL_CALL = SequencePhase


def values(sampling: EffectiveSampling) -> tuple[float, float, int]:
    return sampling.temperature, sampling.top_p, sampling.top_k


class TestDefaults:
    def test_of_a_hybrid_depend_on_the_mode(self) -> None:
        assert HYBRID.thinking == DefaultSampling(0.6, 0.95, 20)
        assert HYBRID.non_thinking == DefaultSampling(0.7, 0.8, 20)

    def test_of_another_checkpoint_hold_in_both_modes(self) -> None:
        instruct = SamplingDefaults.from_generation(0.7, 0.8, 20)
        assert instruct.thinking == instruct.non_thinking == DefaultSampling(0.7, 0.8, 20)

    def test_that_are_missing_filter_nothing(self) -> None:
        assert SamplingDefaults.from_generation(None, None, None) == SamplingDefaults()
        assert SamplingDefaults().thinking == DefaultSampling(1.0, 1.0, 0)

    @pytest.mark.parametrize("phase", SequencePhase)
    def test_fill_what_the_request_leaves_open(self, phase: SequencePhase) -> None:
        assert values(resolve(SamplingParams(), HYBRID, THINKING, phase)) == (0.6, 0.95, 20)
        assert values(resolve(SamplingParams(), HYBRID, NON_THINKING, phase)) == (0.7, 0.8, 20)

    def test_give_way_to_the_request(self) -> None:
        params = SamplingParams(temperature=0.0, top_p=0.5, top_k=-1)
        sampling = resolve(params, HYBRID, THINKING, ANSWER)
        assert values(sampling) == (0.0, 0.5, 0)
        assert sampling.greedy


class TestProfiles:
    PARAMS = SamplingParams(
        temperature=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        thinking=PhaseSampling(
            temperature=0.3,
            top_p=0.4,
            top_k=5,
            min_p=0.0,
            presence_penalty=1.0,
            frequency_penalty=0.5,
        ),
        answer=PhaseSampling(repetition_penalty=1.2),
    )

    @pytest.mark.parametrize(
        ("mode", "phase", "in_thought"),
        [
            (THINKING, PROMPT, True),
            (THINKING, THOUGHT, True),
            (THINKING, ANSWER, False),
            (THINKING, TOOL_CALL, False),
            (NON_THINKING, PROMPT, False),
            (NON_THINKING, ANSWER, False),
            (NON_THINKING, TOOL_CALL, False),
        ],
    )
    def test_hold_in_their_phase(
        self, mode: ThinkingMode, phase: SequencePhase, in_thought: bool
    ) -> None:
        sampling = resolve(self.PARAMS, SamplingDefaults(), mode, phase)
        thought = EffectiveSampling(
            0.3, 0.4, 5, 0.0, 1.0, 0.5, repetition_penalty=1.1,
            repetition_window=RepetitionWindow.SEQUENCE,
        )  # fmt: skip
        answer = EffectiveSampling(
            0.9, 1.0, 0, 0.1, repetition_penalty=1.2, repetition_window=RepetitionWindow.ANSWER
        )
        assert sampling == (thought if in_thought else answer)

    def test_loop_averse_penalises_the_thought_alone(self) -> None:
        profile = SAMPLING_PROFILES["loop_averse"]
        params = SamplingParams(
            thinking=profile.thinking, answer=profile.answer, repetition_penalty=1.3
        )
        thought = resolve(params, HYBRID, THINKING, THOUGHT)
        assert thought.repetition_penalty == 1.5
        assert thought.repetition_window is RepetitionWindow.THOUGHT
        assert resolve(params, HYBRID, THINKING, ANSWER).repetition_penalty == 1.0
