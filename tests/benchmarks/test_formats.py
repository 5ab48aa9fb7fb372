"""Memory, divergence and the table of formats, once each on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from inference_pio.benchmarks import memory, quantization
from inference_pio.benchmarks.divergence import Divergence, compare_with, prompts, write_reference
from inference_pio.benchmarks.engine_process import EngineProcess
from inference_pio.benchmarks.memory import MIB, Figures
from inference_pio.benchmarks.resident import resident
from inference_pio.benchmarks.speed import Case
from inference_pio.benchmarks.staged_engine import fill
from inference_pio.benchmarks.tradeoff import draw_tradeoff
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine
from inference_pio.workers.loading import LoadedModel, load_model

KV_MIB = 16
SMALL = {"kv_cache_bytes": KV_MIB * MIB, "max_num_seqs": 4, "num_threads": 1}


def config(quantization: str = "none", **options: object) -> EngineConfig:
    wanted = {"quantization": quantization, "prefix_caching": False, **SMALL, **options}
    return EngineConfig.model_validate(wanted)


def loaded(quantization: str) -> LoadedModel:
    return load_model(config(quantization))


def test_what_is_allocated_shows_and_what_is_freed_goes() -> None:
    before = resident()
    room = np.ones(64 * MIB, dtype=np.uint8)
    held = resident()
    assert 63 * MIB < held.total - before.total < 66 * MIB
    assert held.peak >= held.total
    assert held.proportional <= held.total
    del room
    after = resident()
    assert after.total < held.total - 60 * MIB
    assert after.peak > held.total - MIB  # counted in batches of pages


@pytest.fixture(scope="module")
def figures() -> Figures:
    with EngineProcess("int8", config("int8")) as process:
        return memory.figures(process.stages, process.fill(), config("int8"))


def test_the_kv_of_a_token_is_what_the_shapes_say(figures: Figures, embedded_dir: Path) -> None:
    shapes = json.loads((embedded_dir / "config.json").read_text())
    width = {"bfloat16": 2, "float32": 4}[shapes.get("dtype") or shapes["torch_dtype"]]
    heads, layers = shapes["num_key_value_heads"], shapes["num_hidden_layers"]
    expected = 2 * layers * heads * shapes["head_dim"] * width
    assert figures["KV cache", "bytes/token"] == pytest.approx(expected, rel=0.05)
    assert figures["KV cache", "MiB"] == pytest.approx(KV_MIB, rel=0.05)


def test_the_parts_make_up_the_whole(figures: Figures) -> None:
    parts = sum(figures[name, "MiB"] for name in ("weights", "KV cache", "rest"))
    assert parts == pytest.approx(figures["steady", "MiB"])
    assert figures["weights", "MiB"] > 1
    assert figures["peak", "MiB"] >= figures["steady", "MiB"]
    assert figures["tokens held at once", "tokens"] > 0.9 * KV_MIB * MIB / 1280


def test_filling_leaves_the_engine_empty() -> None:
    engine = Engine(config())
    filled = fill(engine)
    assert filled.capacity - 4 * engine.config.block_size <= filled.tokens <= filled.capacity
    assert engine.stats().kv_blocks_used == 0
    engine.check_integrity()


def test_a_pool_that_cannot_be_filled_is_told() -> None:
    # 64 steps of 64 tokens, while the first sequence has 16 tokens to go on with.
    engine = Engine(config(max_batched_tokens=64, block_size=16, kv_cache_bytes=5 * MIB))
    with pytest.raises(ValueError, match="measure with a smaller pool"):
        fill(engine)


def test_a_configuration_that_is_refused_is_told() -> None:
    refused = config(kv_cache_bytes=1)
    with pytest.raises(ValueError, match="do not hold one block"), EngineProcess("x", refused):
        pass


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "plain"
    write_reference(loaded("none"), path)
    return path


def test_a_model_does_not_diverge_from_itself(reference: Path) -> None:
    same = compare_with(loaded("none"), reference)
    assert len(same.kl) == len(same.changed) > 200
    assert max(same.kl) < 1e-6
    assert not any(same.changed)


def test_fewer_bits_diverge_more(reference: Path) -> None:
    int8, int4 = compare_with(loaded("int8"), reference), compare_with(loaded("int4"), reference)
    assert 0 < np.mean(int8.kl) < 0.1 * np.mean(int4.kl) < 0.1
    assert 0 < np.mean(int8.changed) < np.mean(int4.changed) < 0.5


def test_the_divergence_is_that_of_the_distributions(reference: Path) -> None:
    model = loaded("int4")
    ids = prompts(model)[0]
    plain_V = torch.from_numpy(np.fromfile(reference, np.float32)[: model.model.config.vocab_size])
    from inference_pio.kernels.context import ContextItem, build_context

    cache = model.model.new_cache(1, 64)
    context = build_context([ContextItem([0], 0, 1)], 64, torch.device("cpu"))
    hidden_TC = model.model.forward(torch.tensor(ids[:1]), context, cache)
    other_V = model.model.logits(hidden_TC)[0].clone().log_softmax(0)
    expected = torch.nn.functional.kl_div(other_V, plain_V, reduction="sum", log_target=True)
    assert compare_with(model, reference).kl[0] == pytest.approx(float(expected), rel=0.05)


def test_another_models_reference_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"1234")
    with pytest.raises(ValueError, match="reference is not of a model with"):
        compare_with(loaded("none"), tmp_path / "r")


def test_points_are_lost_on_the_same_questions() -> None:
    plain = {("a",): True, ("b",): True, ("c",): False, ("d",): True}
    other = {("a",): True, ("b",): False, ("c",): True, ("d",): False}
    assert quantization.points_lost(plain, other).median == 25.0
    assert quantization.points_lost(plain, plain).high == 0.0


def test_one_run_gives_rows_and_a_picture(tmp_path: Path) -> None:
    configs = {name: config(name) for name in ("none", "w8a8")}
    cases = [Case("decode", 1), Case("prefill", 32)]
    measured = quantization.measure(configs, 1, lambda _: None, cases)
    answers = {"none": {("a",): True}, "w8a8": {("a",): False}}
    rows = quantization.rows(measured, answers, "inference-pio bench quantization")
    told = {(row.system, row.case) for row in rows}
    for name in configs:
        for case in ("weights", "peak", "accuracy", "decode b1", "prefill 32"):
            assert (name, case) in told
    assert ("w8a8", "next token, mean KL") in told
    assert ("none", "next token, mean KL") not in told
    lost = [row for row in rows if row.case == "accuracy lost"]
    assert [(row.system, row.median) for row in lost] == [("w8a8", 100.0)]
    draw_tradeoff(rows, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert all(f"<!-- {word} -->" in text for word in ("w8a8", "none", "decode b1", "accuracy"))
    with pytest.raises(ValueError, match="size of every format"):
        draw_tradeoff([row for row in rows if row.case != "weights"], tmp_path / "q.svg")


def test_a_mean_has_its_error() -> None:
    found = quantization.mean_with_error(Divergence((0.0, 2.0), (False, True)).kl)
    assert (found.median, round(found.high - found.median, 2)) == (1.0, 1.96)
