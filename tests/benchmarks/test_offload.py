"""``bench offload``: engines stream from the disk within their limits, and become rows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inference_pio.benchmarks import offload
from inference_pio.benchmarks.engine_process import EngineProcess
from inference_pio.benchmarks.offload import Sizes
from inference_pio.benchmarks.speed import Case
from inference_pio.kernels.native.library import cpu_flags, usable
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.model.streaming.residency import plan_residency

pytestmark = pytest.mark.skipif(
    not usable(cpu_flags()), reason="no native kernels for this CPU, and nothing else is streamed"
)

CONFIG = EngineConfig(kv_cache_bytes=16 << 20, max_num_seqs=4, num_threads=1, prefix_caching=False)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offload, "DISK_BYTES", 4 << 20)
    monkeypatch.setattr(offload, "STEPS", 3)
    monkeypatch.setattr(offload, "CASES", (Case("decode", 2), Case("prefill", 64)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_limit_keeps_as_many_layers_as_it_says() -> None:
    sizes = offload.sizes_of(CONFIG)
    assert sizes.num_layers == 5
    for kept in range(sizes.kept(1.0) + 1):
        plan = plan_residency(
            num_layers=sizes.num_layers,
            layer_bytes=sizes.layer_bytes,
            fixed_bytes=sizes.fixed_bytes,
            limit=sizes.limit(kept),
        )
        assert plan.count(True) == kept
    assert sizes.kept(1.0) == 2  # with three, two slots would hold the rest
    assert Sizes(28, 1, 0).kept(0.5) == 14
    assert Sizes(2, 1, 0).kept(0.0) == 0


def test_engines_with_layers_on_the_disk_become_rows() -> None:
    engines = offload.limited_engines(CONFIG, offload.sizes_of(CONFIG), (0.4, 0.45))
    assert engines[0].name == "all in memory"
    assert [engine.name.split(", ")[1] for engine in engines[1:]] == ["3 of 5 streamed"]
    outcomes = offload.measure(engines, offload.CASES, 1, lambda _: None)
    rows = offload.rows(engines, outcomes, "bfloat16", "bench")
    by_key = {(row.case, row.system): row for row in rows}
    for engine in engines:
        streams = engine.streamed_bytes > 0
        for case in ("decode b2", "prefill 64"):
            row = by_key[case, engine.name]
            assert 0 < row.low <= row.median <= row.high
            assert (row.floor_share is not None) == streams
        assert (("disk read", engine.name) in by_key) == streams
        assert by_key["peak memory", engine.name].median > 100  # torch alone
    if any(outcome.in_cgroup for outcome in outcomes.values()):
        assert "in a cgroup of" in offload.notes(engines, outcomes)[0]
    assert os.listdir(Path(os.environ["XDG_CACHE_HOME"]) / "inference-pio" / "weights") == []


def test_the_share_is_that_of_the_disk() -> None:
    engine = offload.Limited("x", CONFIG, streamed_bytes=100)
    # Two tokens a step: 10 tokens/s are 500 bytes/s.
    outcome = offload.Outcome({"decode b2": [(10.0, 1000.0), (10.0, 2000.0)]}, peak_bytes=1)
    share = offload.rows([engine], {"x": outcome}, "bfloat16", "bench")[0].floor_share
    assert share == (0.5 + 0.25) / 2


def test_the_file_of_a_process_is_read() -> None:
    sizes = offload.sizes_of(CONFIG)
    limited = CONFIG.model_copy(update={"weight_memory_bytes": sizes.limit(0)})
    with (
        EngineProcess("x", limited) as process,
        offload.DiskProbe.of_process(process.pid) as probe,
    ):
        assert os.fstat(probe._fd).st_size == 5 * sizes.layer_bytes
        assert probe.sample() > 0
    with pytest.raises(ValueError, match="has no file of streamed weights in"):
        offload.DiskProbe.of_process(os.getpid())
