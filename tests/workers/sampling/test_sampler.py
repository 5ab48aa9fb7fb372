from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from inference_pio.kernels.dispatch import select_kernels
from inference_pio.workers.sampling.noise import uniform
from inference_pio.workers.sampling.resolve import EffectiveSampling
from inference_pio.workers.sampling.row import SampledToken, SamplingError, SamplingRow
from inference_pio.workers.sampling.sampler import Sampler

KERNELS = select_kernels(torch.device("cpu"), torch.float32).sampling
LARGE, LARGE_ROWS = 40_003, 40_064  # enough blocks for every way through the sampler

samplings = st.builds(
    EffectiveSampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([0.1, 0.8, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 20, 48, 49, 300, 1024, 5000]),
    min_p=st.sampled_from([0.0, 0.01, 0.2]),
)


def coarse_logits(rows: int, num_tokens: int, vocab_rows: int, seed: int) -> torch.Tensor:
    """Logits with equals among them, and padding that would win if it were looked at."""
    numbers = np.random.default_rng(seed).normal(scale=3.0, size=(rows, vocab_rows))
    logits_RV = torch.from_numpy((numbers * 8).round() / 8).float()
    logits_RV[:, num_tokens:] = 1e9
    return logits_RV


def probabilities(
    logits_N: NDArray[np.float64], sampling: EffectiveSampling, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids in the order they are drawn from, and their probabilities, by sorting everything."""
    order = np.argsort(-logits_N, kind="stable")
    scaled = (logits_N[order] - logits_N[order[0]]) / sampling.temperature
    weights = np.exp(scaled)
    if sampling.top_k:
        weights[logits_N[order] < logits_N[order[min(sampling.top_k, len(order)) - 1]]] = 0
    weights /= weights.sum()
    if top_p < 1:
        weights[np.cumsum(weights) - weights >= top_p] = 0
    weights[np.exp(scaled) < sampling.min_p] = 0
    if sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p == 0:
        weights, order = weights[np.argsort(order)], np.arange(len(order))
    return order, weights / weights.sum()


def expected_tokens(logits_N: NDArray[np.float64], row: SamplingRow) -> set[int]:
    """The token by definition; more than one where rounding decides at the edge of a filter."""
    if row.sampling.greedy:
        return {int(logits_N.argmax())}
    tokens = set()
    for top_p in (row.sampling.top_p - 1e-6, row.sampling.top_p, row.sampling.top_p + 1e-6):
        order, weights = probabilities(
            logits_N, row.sampling, top_p if row.sampling.top_p < 1 else 1.0
        )
        sums = np.cumsum(weights)
        for shift in (-1e-6, 0.0, 1e-6):
            number = min(max(uniform(row.seed, row.step) + shift, 0.0), 1 - 1e-12)
            place = min(int(np.searchsorted(sums, number * sums[-1], side="right")), len(order) - 1)
            tokens.add(int(order[place]))
    return tokens


def tokens_of(result: list[SampledToken | SamplingError]) -> list[int]:
    assert all(isinstance(sampled, SampledToken) for sampled in result)
    return [sampled.token_id for sampled in result if isinstance(sampled, SampledToken)]


class TestTokens:
    @settings(deadline=None)
    @given(st.lists(samplings, min_size=1, max_size=6), st.integers(1, 300), st.integers(0, 10**6))
    def test_are_those_of_the_definition(
        self, samplings: list[EffectiveSampling], num_tokens: int, seed: int
    ) -> None:
        logits_RV = coarse_logits(len(samplings), num_tokens, num_tokens + 9, seed)
        rows = [SamplingRow(sampling, seed, step) for step, sampling in enumerate(samplings)]
        tokens = tokens_of(
            Sampler(KERNELS, num_tokens + 9, num_tokens).sample(logits_RV.clone(), rows)
        )
        for logits_V, row, token_id in zip(logits_RV, rows, tokens, strict=True):
            logits_N = logits_V[:num_tokens].double().numpy()
            assert token_id in expected_tokens(logits_N, row)

    @settings(deadline=None, max_examples=15)
    @given(st.lists(samplings, min_size=1, max_size=3), st.integers(0, 10**6))
    def test_of_a_large_vocabulary_are_those_of_the_definition(
        self, samplings: list[EffectiveSampling], seed: int
    ) -> None:
        logits_RV = coarse_logits(len(samplings), LARGE, LARGE_ROWS, seed)
        rows = [SamplingRow(sampling, seed, step) for step, sampling in enumerate(samplings)]
        tokens = tokens_of(Sampler(KERNELS, LARGE_ROWS, LARGE).sample(logits_RV.clone(), rows))
        for logits_V, row, token_id in zip(logits_RV, rows, tokens, strict=True):
            assert token_id in expected_tokens(logits_V[:LARGE].double().numpy(), row)

    @pytest.mark.parametrize("num_tokens", [200, LARGE])
    @pytest.mark.parametrize("top_k", [0, 20, 100, 2000])
    def test_with_a_large_top_k_and_most_tokens_banned_come_from_the_rest(
        self, num_tokens: int, top_k: int
    ) -> None:
        allowed = np.array([3, 77, 140], dtype=np.int64)
        sampling = EffectiveSampling(top_k=top_k)
        rows = [SamplingRow(sampling, 3, step, allowed=allowed) for step in range(30)]
        logits_RV = torch.zeros(30, num_tokens)
        assert set(tokens_of(Sampler(KERNELS, num_tokens, num_tokens).sample(logits_RV, rows))) == {
            *(3, 77, 140)
        }

    @pytest.mark.parametrize("num_tokens", [200, LARGE])
    @pytest.mark.parametrize("top_k", [0, 20, 100])
    def test_among_equals_every_one_may_come(self, num_tokens: int, top_k: int) -> None:
        rows = [SamplingRow(EffectiveSampling(top_k=top_k), 3, step) for step in range(8)]
        tokens = tokens_of(
            Sampler(KERNELS, num_tokens, num_tokens).sample(torch.ones(8, num_tokens), rows)
        )
        for row, token_id in zip(rows, tokens, strict=True):
            assert token_id == int(uniform(3, row.step) * num_tokens)

    @pytest.mark.parametrize(
        "sampling",
        [
            EffectiveSampling(temperature=0.8),
            EffectiveSampling(top_k=6),
            EffectiveSampling(top_p=0.9),
            EffectiveSampling(min_p=0.1),
        ],
    )
    def test_come_as_often_as_they_are_likely(self, sampling: EffectiveSampling) -> None:
        torch.manual_seed(0)
        logits_V = torch.randn(12) * 1.5
        draws = 8_000
        rows = [SamplingRow(sampling, seed=5, step=step) for step in range(draws)]
        tokens = tokens_of(Sampler(KERNELS, 12, 12).sample(logits_V.repeat(draws, 1), rows))
        order, weights = probabilities(logits_V.double().numpy(), sampling, sampling.top_p)
        likely = weights > 0
        counts = np.bincount(tokens, minlength=12)[order]
        assert counts[~likely].sum() == 0
        surprise = ((counts - draws * weights)[likely] ** 2 / (draws * weights[likely])).sum()
        # At most 11 degrees of freedom: chance alone passes 40 once in ten thousand seeds.
        assert surprise < 40


class TestBatches:
    @settings(deadline=None, max_examples=15)
    @given(
        st.lists(samplings, min_size=2, max_size=6),
        st.randoms(use_true_random=False),
        st.sampled_from([(150, 160), (LARGE, LARGE_ROWS)]),
        st.integers(0, 10**6),
    )
    def test_do_not_change_a_rows_token_or_logprobs(
        self, samplings: list[EffectiveSampling], random: object, size: tuple[int, int], seed: int
    ) -> None:
        num_tokens, vocab_rows = size
        logits_RV = coarse_logits(len(samplings), num_tokens, vocab_rows, seed)
        rows = [
            SamplingRow(sampling, seed + number, 4, num_logprobs=3 if number % 2 else None)
            for number, sampling in enumerate(samplings)
        ]
        sampler = Sampler(KERNELS, vocab_rows, num_tokens)
        together = sampler.sample(logits_RV.clone(), rows)
        order = list(range(len(rows)))
        random.shuffle(order)  # type: ignore[attr-defined]
        shuffled = sampler.sample(logits_RV[order].clone(), [rows[number] for number in order])
        assert shuffled == [together[number] for number in order]
        for number, row in enumerate(rows):
            assert sampler.sample(logits_RV[number : number + 1].clone(), [row]) == [
                together[number]
            ]

    def test_an_empty_one_gives_nothing(self) -> None:
        assert Sampler(KERNELS, 8, 8).sample(torch.zeros(0, 8), []) == []

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("sampling", [EffectiveSampling(0.0), EffectiveSampling(top_k=20)])
    def test_go_on_without_a_row_that_is_not_sound(
        self, bad: float, sampling: EffectiveSampling
    ) -> None:
        logits_RV = coarse_logits(3, 150, 160, seed=1)
        rows = [SamplingRow(sampling, number, 0, num_logprobs=1) for number in range(3)]
        sampler = Sampler(KERNELS, 160, 150)
        expected = sampler.sample(logits_RV.clone(), rows)
        logits_RV[1, 77] = bad
        result = sampler.sample(logits_RV, rows)
        assert [result[0], result[2]] == [expected[0], expected[2]]
        error = result[1]
        assert isinstance(error, SamplingError)
        assert error.row == 1
        assert "its logits hold" in str(error)

    def test_a_fault_under_a_ban_is_still_the_rows_error(self) -> None:
        logits_RV = torch.zeros(1, 4)
        logits_RV[0, 2] = torch.nan
        row = SamplingRow(EffectiveSampling(), 0, 0, banned=(2,), num_logprobs=1)
        assert isinstance(Sampler(KERNELS, 4, 4).sample(logits_RV, [row])[0], SamplingError)

    def test_a_row_without_any_token_left_is_an_error(self) -> None:
        rows = [
            SamplingRow(EffectiveSampling(), 0, 0, banned=(0, 1)),
            SamplingRow(EffectiveSampling(), 0, 0, banned=(0,)),
        ]
        nothing, sampled = Sampler(KERNELS, 3, 2).sample(torch.zeros(2, 3), rows)
        assert isinstance(nothing, SamplingError)
        assert "no token is left" in str(nothing)
        assert sampled == SampledToken(1)


class TestConstraints:
    @settings(deadline=None)
    @given(samplings, st.sets(st.integers(0, 29), min_size=1), st.integers(0, 10**6))
    def test_only_allowed_ids_come(
        self, sampling: EffectiveSampling, allowed: set[int], seed: int
    ) -> None:
        ids = np.array(sorted(allowed), dtype=np.int64)
        rows = [SamplingRow(sampling, seed, step, allowed=ids) for step in range(5)]
        tokens = tokens_of(Sampler(KERNELS, 32, 30).sample(coarse_logits(5, 30, 32, seed), rows))
        assert set(tokens) <= allowed

    @settings(deadline=None)
    @given(samplings, st.sets(st.integers(0, 29), max_size=29), st.integers(0, 10**6))
    def test_banned_ids_do_not_come(
        self, sampling: EffectiveSampling, banned: set[int], seed: int
    ) -> None:
        rows = [SamplingRow(sampling, seed, step, banned=tuple(banned)) for step in range(5)]
        tokens = tokens_of(Sampler(KERNELS, 32, 30).sample(coarse_logits(5, 30, 32, seed), rows))
        assert banned.isdisjoint(tokens)

    def test_logprobs_are_of_the_models_own_distribution(self) -> None:
        logits_RV = coarse_logits(2, 30, 32, seed=4)
        expected = logits_RV[:, :30].log_softmax(1)
        banned = tuple(expected[0].topk(3).indices.tolist())
        rows = [
            SamplingRow(EffectiveSampling(0.5), 1, 0, banned=banned, num_logprobs=2),
            SamplingRow(EffectiveSampling(0.5), 1, 0),
        ]
        sampled, plain = Sampler(KERNELS, 32, 30).sample(logits_RV, rows)
        assert isinstance(sampled, SampledToken)
        assert sampled.logprob is not None
        assert sampled.token_id not in banned
        assert sampled.logprob.logprob == pytest.approx(float(expected[0, sampled.token_id]))
        assert [token_id for token_id, _ in sampled.logprob.top] == list(banned[:2])
        assert isinstance(plain, SampledToken)
        assert plain.logprob is None


def test_wrong_shapes_are_refused_with_what_would_be_right() -> None:
    with pytest.raises(ValueError, match="num_tokens is 9; it lies in \\[1, 8\\]"):
        Sampler(KERNELS, 8, 9)
    with pytest.raises(ValueError, match="at most 262144 tokens, not 262145"):
        Sampler(KERNELS, 262_145, 262_145)
    row = SamplingRow(EffectiveSampling(), 0, 0)
    with pytest.raises(ValueError, match="float32 \\[1, 8\\] is needed"):
        Sampler(KERNELS, 8, 8).sample(torch.zeros(2, 8), [row])
    with pytest.raises(ValueError, match="float32 \\[1, 8\\] is needed"):
        Sampler(KERNELS, 8, 8).sample(torch.zeros(1, 8, dtype=torch.float64), [row])
