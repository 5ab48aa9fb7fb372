"""What docs/disaggregation.md says is so; its Python runs with that of the other pages."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry, generate_latest

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_metrics import EngineCollector, EngineReading
from inference_pio.deployments.handoff_metrics import HandoffCollector, with_peers
from inference_pio.deployments.handoff_stats import DecodeStats, HandoffStats
from inference_pio.deployments.kv_transport import MAX_PULLS, WINDOW_BYTES, require_transports
from inference_pio.deployments.prefill_service import MAX_WAITING_BYTES
from inference_pio.workers.types import EngineStats

PAGE = (Path(__file__).parents[3] / "docs/disaggregation.md").read_text(encoding="utf-8")


def test_its_configuration_loads() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = load_config(yaml.safe_load(text))
    require_transports(config)
    assert [pool.role for pool in config.pools] == ["decode", "prefill"]


def test_its_metrics_are_those_that_are_shown() -> None:
    handoff = HandoffStats(peer_pool="prefill", decisions={("remote", "forced"): 1})
    stats = DecodeStats.of(
        EngineStats(kv_import_ends={"done": 1}), handoff, {"p1": EngineStats(kv_exported_tokens=3)}
    )
    registry, engines, handoffs = CollectorRegistry(), EngineCollector(), HandoffCollector()
    readings = with_peers([EngineReading("model", "answer", "a1", stats)])
    engines.show(readings)
    handoffs.show(readings)
    registry.register(engines)
    registry.register(handoffs)
    shown = generate_latest(registry).decode()
    for name in re.findall(r"`(inference_pio_\w+)`", PAGE):
        assert f"\n{name}{{" in shown, f"{name} is not shown"
    for name in re.findall(r"^# TYPE (inference_pio_(?:handoff|prefill_[dp])\w+)", shown, re.M):
        assert f"`{name}" in PAGE, f"{name} is not described"
    assert (
        'inference_pio_kv_exported_tokens_total{engine="p1",model_name="model",pool="prefill"} 3.0'
    ) in shown


def test_its_limits_are_those_of_the_code() -> None:
    assert f"At most {MAX_PULLS} handoffs" in PAGE
    assert f"At most {WINDOW_BYTES // 2**20} MiB" in PAGE
    assert f"at most {MAX_WAITING_BYTES // 2**30} GiB" in PAGE
