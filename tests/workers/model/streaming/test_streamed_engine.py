"""Engines whose layers do not all fit into memory: the same tokens, what it costs, a clean end."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_pio import LLM, EngineConfig, SamplingParams
from inference_pio.kernels.native.library import cpu_flags, usable
from inference_pio.workers.async_engine import EngineDeadError
from inference_pio.workers.engine import Engine
from inference_pio.workers.model.quantization.write import write_quantized
from inference_pio.workers.model.qwen3 import Qwen3Model
from inference_pio.workers.model.streaming.layers import ResidentLayers, StreamedLayers
from inference_pio.workers.types import RequestError

pytestmark = pytest.mark.skipif(
    not usable(cpu_flags()), reason="no native kernels for this CPU, and nothing else is streamed"
)

PARAMS = SamplingParams(
    temperature=0.0, max_tokens=16, ignore_eos=True, loop_guard=False, logprobs=2
)
PROMPTS = ["What is 417 + 58 - 903?", "Tell me about the sea.", "A " * 60, "1 2 3 4 5 6 7 8 9"]
OPTIONS: dict[str, Any] = {"block_size": 16, "kv_cache_bytes": 16 << 20}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the weights go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def least_bytes(model: str = "embedded", **options: Any) -> int:
    """The smallest limit, as its refusal names it."""
    with pytest.raises(ValueError, match="at least") as refusal:
        LLM(model, weight_memory_bytes=1, **OPTIONS, **options)
    return int(str(refusal.value).partition("at least ")[2].partition(" ")[0])


def answers(llm: LLM) -> list[tuple[Any, ...]]:
    """Tokens and log-probabilities: bits, not just which token is the likeliest."""
    return [(r.choices[0].token_ids, r.choices[0].logprobs) for r in llm.generate(PROMPTS, PARAMS)]


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weights"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "w8a8", "w4a8"])
def test_streamed_layers_compute_the_same_to_the_bit(dtype: str, quantization: str) -> None:
    options = {"dtype": dtype, "quantization": quantization}
    with LLM(**OPTIONS, **options) as llm:
        resident = answers(llm)
    limit = least_bytes(**options)
    with LLM(weight_memory_bytes=limit, **OPTIONS, **options) as llm:
        assert answers(llm) == resident
        stats, store = llm.engine.stats(), llm.engine.loaded.model._store
        assert isinstance(store, StreamedLayers)
        assert store.num_streamed == len(store.layers)
        assert stats.weight_bytes_streamed >= stats.steps * store.num_streamed * store.layer_bytes
        llm.engine.loaded.model.check_integrity()


def test_a_checkpoint_that_is_quantized_already(embedded_dir: Path, tmp_path: Path) -> None:
    write_quantized(embedded_dir, tmp_path / "int4", "int4")
    model = str(tmp_path / "int4")
    with LLM(model, **OPTIONS) as llm:
        resident = answers(llm)
    with LLM(model, weight_memory_bytes=least_bytes(model), **OPTIONS) as llm:
        assert answers(llm) == resident


@pytest.mark.parametrize("num_layers", [1, 2])
def test_more_memory_keeps_more_layers(num_layers: int) -> None:
    """Each in memory is one less to be read in a step."""
    least, per_step = least_bytes(), []
    layer = None
    for kept in (0, num_layers):
        limit = least + kept * (layer or 0)
        engine = Engine(EngineConfig(weight_memory_bytes=limit, **OPTIONS))
        store = engine.loaded.model._store
        assert isinstance(store, StreamedLayers)
        layer = store.layer_bytes
        per_step.append(store.num_streamed)
        engine.close()
    assert per_step[0] - per_step[1] == num_layers


def test_a_limit_that_holds_everything_streams_nothing(own_cache: Path) -> None:
    with LLM(weight_memory_bytes=1 << 30, **OPTIONS) as llm:
        assert isinstance(llm.engine.loaded.model._store, ResidentLayers)
        assert not reader_threads()
        answers(llm)
        assert llm.engine.stats().weight_bytes_streamed == 0
    assert not own_cache.exists()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("ending", ["closed", "dropped"])
def test_an_engine_leaves_no_thread_and_no_file(ending: str, own_cache: Path) -> None:
    limit = least_bytes()
    gc.collect()
    before = open_files()
    engine = Engine(EngineConfig(weight_memory_bytes=limit, **OPTIONS))
    assert len(reader_threads()) == 1
    assert open_files() > before
    if ending == "closed":
        engine.close()
    else:
        del engine
        gc.collect()
    assert not reader_threads()
    gc.collect()
    assert open_files() == before
    assert list((own_cache / "inference-pio" / "weights").iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_weights_that_cannot_be_read_end_the_engine(own_cache: Path) -> None:
    with LLM(weight_memory_bytes=least_bytes(), **OPTIONS) as llm:
        answers(llm)
        [thread] = reader_threads()
        store = llm.engine.loaded.model._store
        assert isinstance(store, StreamedLayers)
        os.ftruncate(store.fileno(), 0)
        with pytest.raises(RequestError, match=r"WeightReadError.*streamed weights in") as ended:
            llm.generate(PROMPTS, PARAMS)
        assert ended.value.code == "engine_dead"
        assert str(own_cache) in str(ended.value)
        with pytest.raises(EngineDeadError, match="WeightReadError"):
            llm.generate(PROMPTS, PARAMS)
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_checkpoint_that_is_cut_off_ends_the_engine(embedded_dir: Path, tmp_path: Path) -> None:
    """No signal: nothing of the checkpoint is mapped any more."""
    folder = shutil.copytree(embedded_dir, tmp_path / "model")
    weights = folder / "model.safetensors"
    with LLM(str(folder), weight_memory_bytes=least_bytes(), **OPTIONS) as llm:
        answers(llm)
        os.truncate(weights, 100)
        with pytest.raises(RequestError, match=f"WeightReadError: {weights} was cut off"):
            llm.generate(PROMPTS, PARAMS)


def test_a_checkpoint_that_is_deleted_changes_nothing(embedded_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(embedded_dir, tmp_path / "model")
    options = OPTIONS | {"prefix_caching": False}  # the same chunks both times
    with LLM(str(folder), weight_memory_bytes=least_bytes(), **options) as llm:
        before = answers(llm)
        shutil.rmtree(folder)
        assert answers(llm) == before


def test_what_is_not_streamed_is_refused_by_name(
    embedded_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="the device is cuda"):
        Qwen3Model.load(
            embedded_dir, dtype=None, device=torch.device("cuda"), weight_memory_bytes=1 << 30
        )
    with pytest.raises(ValueError, match=r"weight_memory_bytes and parallel\.sequence_from"):
        EngineConfig(weight_memory_bytes=1 << 30, parallel={"tensor": 2, "sequence_from": 8})
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "torch")
    with pytest.raises(ValueError, match=r"\w+Linear is kept as torch has it"):
        LLM(weight_memory_bytes=1 << 30, **OPTIONS)
    assert not reader_threads()
