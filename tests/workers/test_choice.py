"""What a step that was launched ahead of a token took for granted about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inference_pio.workers.choice import Choice, DecodingContext
from inference_pio.workers.config import LoopGuardConfig
from inference_pio.workers.phases import PhaseTokens
from inference_pio.workers.sampling.resolve import SamplingDefaults
from inference_pio.workers.sampling.row import SampledToken
from inference_pio.workers.sequence import Sequence
from inference_pio.workers.text.tokenizer import Tokenizer
from inference_pio.workers.types import GenerateRequest, PhaseSampling, SamplingParams

OPEN, CLOSE, END = 90, 91, 92
# What a thought without a budget ends with is a single id: as long as a sampled token.
TOKENS = PhaseTokens(OPEN, CLOSE, stop_text_ids=(50, CLOSE), eos=frozenset({END}))


@pytest.fixture(scope="module")
def embedded_tokenizer(embedded_dir: Path) -> Tokenizer:
    return Tokenizer.load(embedded_dir)


def make(tokenizer: Tokenizer, tokens: PhaseTokens = TOKENS, **params: Any) -> Choice:
    request = GenerateRequest("r", (1, OPEN), SamplingParams(**params))
    sequence = Sequence.from_request(request, arrival=0.0, max_len=40)
    context = DecodingContext(
        tokenizer, tokens, SamplingDefaults(), LoopGuardConfig(), frozenset({END})
    )
    others = tuple(range(1, request.params.n))
    return Choice(request, sequence, context, 1, other_indices=others)


@pytest.mark.parametrize(
    ("params", "token_id", "right"),
    [
        ({}, 7, True),
        ({}, END, False),
        ({"ignore_eos": True}, END, True),
        ({}, CLOSE, True),
        ({"answer": PhaseSampling(temperature=0.5)}, 7, True),
        ({"answer": PhaseSampling(temperature=0.5)}, CLOSE, False),
        ({"thinking_budget": 0}, 7, False),
        ({"thinking_budget": 0}, CLOSE, True),
        ({"thinking_budget": 1}, 7, False),
        ({"thinking_budget": 2}, 7, True),
        ({"max_tokens": 1}, 7, False),
        ({"min_tokens": 1}, 7, True),
        ({"min_tokens": 2}, 7, True),
        ({"stop": ("a",), "stop_in_thought": True}, 64, False),
        ({"logprobs": 0, "frequency_penalty": 0.1}, 7, True),
        ({"repetition_penalty": 1.1}, CLOSE, True),
        ({"thinking": PhaseSampling(repetition_penalty=1.1)}, 7, True),
        ({"thinking": PhaseSampling(repetition_penalty=1.1)}, CLOSE, False),
    ],
)
def test_a_step_ahead_holds_where_the_token_is_all_that_came(
    embedded_tokenizer: Tokenizer, params: dict[str, Any], token_id: int, right: bool
) -> None:
    if "stop" in params:
        (token_id,) = embedded_tokenizer.encode("a")
    choice = make(embedded_tokenizer, **params)
    row = choice.row_behind()
    assert row is not None
    sampled = SampledToken(token_id)
    choice.take(sampled)
    assert choice.continues(sampled, row) is right
    if right:
        assert choice.row() == row


def test_a_forced_text_that_ends_with_the_sampled_token_is_not_that_token(
    embedded_tokenizer: Tokenizer,
) -> None:
    tokens = PhaseTokens(OPEN, CLOSE, stop_text_ids=(50, CLOSE, 7), eos=frozenset({END}))
    choice = make(embedded_tokenizer, tokens, thinking_budget=1)
    row = choice.row_behind()
    assert row is not None
    choice.take(SampledToken(7))
    assert choice.sequence.output_token_ids == [7, 50, CLOSE, 7]
    assert not choice.continues(SampledToken(7), row)


@pytest.mark.parametrize(
    "params",
    [
        {"n": 2},
        {"bad_words": ((3, 4),)},
    ],
)
def test_what_depends_on_the_token_has_no_row_before_it(
    embedded_tokenizer: Tokenizer, params: dict[str, Any]
) -> None:
    assert make(embedded_tokenizer, **params).row_behind() is None
    assert make(embedded_tokenizer, bad_words=((3,),)).row_behind() is not None
