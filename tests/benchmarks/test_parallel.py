"""``bench parallel``: a grid is started, measured and ended."""

from __future__ import annotations

import pytest

from inference_pio.benchmarks import parallel
from inference_pio.workers.config import EngineConfig


def test_the_cost_of_control_becomes_rows() -> None:
    config = EngineConfig.model_validate(
        {"kv_cache_bytes": 8 << 20, "block_size": 16, "parallel": {"tensor": 2}}
    )
    said: list[str] = []
    cost = parallel.measure(config, 2, said.append, batches=(1, 3))
    assert said[0] == "decode b1, round 0 of 2"
    for rounds in cost.rounds.values():
        assert [one.steps for one in rounds] == [parallel.DECODE_STEPS] * 2
        for one in rounds:
            assert 0 < one.send_s < one.step_s
            assert 0 < one.receive_s < one.step_s
            assert one.share == max(one.send_s, one.receive_s) / one.step_s
    rows = parallel.rows(cost, "bench")
    assert {row.case.partition(":")[0] for row in rows} == {"decode b1", "decode b3"}
    assert all(row.system == "tensor 2 x pipeline 1" for row in rows)
    assert all(row.low <= row.median <= row.high for row in rows)


def test_one_rank_has_nobody_to_tell() -> None:
    with pytest.raises(ValueError, match="the configuration has one rank"):
        parallel.measure(EngineConfig(), 1, lambda text: None)
