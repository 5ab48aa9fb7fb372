from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.kernels.dispatch import select_kernels
from inference_pio.workers.sampling.resolve import RepetitionWindow, SamplingDefaults
from inference_pio.workers.sampling.row import SampledToken
from inference_pio.workers.sampling.sampler import Sampler
from inference_pio.workers.sampling.state import SamplingState
from inference_pio.workers.types import (
    SAMPLING_PROFILES,
    SamplingParams,
    SequencePhase,
    ThinkingMode,
    TokenKind,
)


def state(params: SamplingParams, prompt: tuple[int, ...] = (1, 2)) -> SamplingState:
    return SamplingState(
        params,
        SamplingDefaults(),
        ThinkingMode.THINKING,
        prompt,
        seed=11,
        stop_ids=frozenset({8, 9}),
    )


def test_a_row_carries_seed_step_and_what_the_request_asks() -> None:
    sampling = state(SamplingParams(logit_bias={4: 1.5}, allowed_token_ids=(6, 4, 6), logprobs=3))
    sampling.append(4, TokenKind.CONTENT)
    row = sampling.row(SequencePhase.ANSWER)
    assert (row.seed, row.step, row.num_logprobs) == (11, 1, 3)
    assert row.bias is not None
    assert (row.bias.ids.tolist(), row.bias.values.tolist()) == ([4], [1.5])
    assert row.allowed is not None
    assert row.allowed.tolist() == [4, 6]


def test_stop_ids_are_banned_until_min_tokens_are_out() -> None:
    sampling = state(SamplingParams(min_tokens=2, max_tokens=5))
    banned = []
    for _ in range(4):
        banned.append(sampling.row(SequencePhase.ANSWER).banned)
        sampling.append(4, TokenKind.CONTENT)
    assert banned == [(8, 9), (8, 9), (), ()]


def test_a_bad_word_is_banned_after_its_beginning_was_generated() -> None:
    sampling = state(SamplingParams(bad_words=((5,), (1, 2, 3))), prompt=(1, 2))
    banned = []
    for token_id in (1, 2, 2, 1):
        banned.append(sampling.row(SequencePhase.ANSWER).banned)
        sampling.append(token_id, TokenKind.CONTENT)
    assert banned == [(5,), (5,), (5, 3), (5,)]


def test_tokens_are_counted_only_where_a_penalty_may_ask() -> None:
    assert state(SamplingParams()).row(SequencePhase.ANSWER).penalties is None


@pytest.mark.parametrize(
    ("phase", "penalty", "counted"),
    [(SequencePhase.THINKING, 1.5, [4]), (SequencePhase.ANSWER, 1.0, [5])],
)
def test_a_phase_penalises_its_own_tokens(
    phase: SequencePhase, penalty: float, counted: list[int]
) -> None:
    profile = SAMPLING_PROFILES["loop_averse"]
    sampling = state(SamplingParams(thinking=profile.thinking, answer=profile.answer))
    for token_id, kind in ((3, TokenKind.TAG), (4, TokenKind.THOUGHT), (5, TokenKind.CONTENT)):
        sampling.append(token_id, kind)
    row = sampling.row(phase)
    assert row.sampling.repetition_penalty == penalty
    assert row.penalties is not None
    assert row.penalties.window(row.sampling.repetition_window).ids.tolist() == counted


def test_a_fork_keeps_the_past_and_goes_on_with_its_own_seed() -> None:
    params = SamplingParams(repetition_penalty=1.2, bad_words=((4, 5),))
    sampling = state(params)
    sampling.append(4, TokenKind.CONTENT)
    fork = sampling.fork(seed=12)
    fork.append(6, TokenKind.CONTENT)
    row, forked = sampling.row(SequencePhase.ANSWER), fork.row(SequencePhase.ANSWER)
    assert (row.seed, row.step, row.banned) == (11, 1, (5,))
    assert (forked.seed, forked.step, forked.banned) == (12, 2, ())
    assert row.penalties is not None
    assert forked.penalties is not None
    assert row.penalties.window(RepetitionWindow.SEQUENCE).ids.tolist() == [1, 2, 4]
    assert forked.penalties.window(RepetitionWindow.SEQUENCE).ids.tolist() == [1, 2, 4, 6]


KERNELS = select_kernels(torch.device("cpu"), torch.float32).sampling
VOCAB = 10
STOPS = {8, 9}
requests = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.5]),
    top_p=st.sampled_from([0.7, 1.0]),
    top_k=st.sampled_from([0, 4]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    min_tokens=st.integers(0, 12),
    bad_words=st.lists(
        st.lists(st.integers(0, 7), min_size=2, max_size=3).map(tuple), max_size=4
    ).map(tuple),
)


def logits_after(output: list[int]) -> torch.Tensor:
    """A model of its own last two tokens."""
    generator = torch.Generator().manual_seed(hash(tuple(output[-2:])) % 2**31)
    return torch.randn(VOCAB, generator=generator) * 3


def complete(batch: list[SamplingParams], steps: int) -> list[list[int]]:
    """Outputs of requests that are sampled together; the place in the batch is no part of them."""
    states = [state(params) for params in batch]
    outputs: list[list[int]] = [[] for _ in batch]
    for _ in range(steps):
        logits_RV = torch.stack([logits_after(output) for output in outputs])
        rows = [sampling.row(SequencePhase.ANSWER) for sampling in states]
        for sampled, sampling, output in zip(
            Sampler(KERNELS, VOCAB, VOCAB).sample(logits_RV, rows), states, outputs, strict=True
        ):
            assert isinstance(sampled, SampledToken)
            output.append(sampled.token_id)
            sampling.append(sampled.token_id, TokenKind.CONTENT)
    return outputs


@settings(deadline=None, max_examples=50)
@given(st.lists(requests, min_size=1, max_size=4))
def test_whole_outputs_keep_to_what_was_asked_in_any_batch(batch: list[SamplingParams]) -> None:
    outputs = complete(batch, steps=16)
    for params, output in zip(batch, outputs, strict=True):
        assert STOPS.isdisjoint(output[: params.min_tokens])
        for word in params.bad_words:
            windows = [tuple(output[i : i + len(word)]) for i in range(len(output))]
            assert word not in windows
        assert complete([params], steps=16) == [output]
