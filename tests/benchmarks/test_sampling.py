"""``bench sampling``: both systems draw, and become rows."""

from __future__ import annotations

import pytest

from inference_pio.benchmarks import sampling
from inference_pio.kernels.sampling.torch_sampling import TorchSampling


def test_the_cost_of_sampling_becomes_rows() -> None:
    cost = sampling.measure(2, lambda text: None, batches=(1, 3), vocabulary=(700, 690))
    assert all(len(found) == 2 for found in cost.rounds.values())
    rows = sampling.rows(cost, "bench")
    assert {row.case for row in rows} == {
        f"{name} b{batch}" for name in sampling.PROFILES for batch in (1, 3)
    }
    assert "torch" in {row.system for row in rows}
    assert all(0 < row.low <= row.median <= row.high for row in rows)


def test_systems_that_draw_otherwise_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = TorchSampling.sample

    def off_by_one(self, logits, num_tokens, draws, edits):  # type: ignore[no-untyped-def]
        return (drawn(self, logits, num_tokens, draws, edits) + 1) % num_tokens

    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "reference")
    monkeypatch.setattr(TorchSampling, "sample", off_by_one)
    with pytest.raises(RuntimeError, match="reference and torch draw different tokens"):
        sampling.measure(1, lambda text: None, batches=(1,), vocabulary=(70, 69))
