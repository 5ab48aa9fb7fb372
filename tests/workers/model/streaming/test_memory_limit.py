"""A model whose weights do not fit runs within a limit that the system enforces.

The limit is that of a cgroup, where a test may make one: every page of the process counts, cached
pages of files are taken back when it is reached, and a process that needs more is killed. It is
also that of ``RLIMIT_DATA``, which any process may set for itself: private writable memory counts,
among it the checkpoint's mapping as long as the model is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from inference_pio.benchmarks.memory_limit import memory_cgroup
from inference_pio.kernels.native.library import cpu_flags, usable
from inference_pio.workers.model.random_checkpoint import (
    CONFIGS,
    make_random_checkpoint,
    write_random_checkpoint,
)

pytestmark = pytest.mark.skipif(
    not usable(cpu_flags()), reason="no native kernels for this CPU, and nothing else is streamed"
)

CHILD = Path(__file__).with_name("limited_run.py")
MIB = 2**20
NUM_LAYERS = 8
LAYER_BYTES = 30 * MIB
"""Of Qwen3-0.6B in bfloat16."""
WEIGHT_BYTES = 96 * MIB
KV_BYTES = 32 * MIB
PROCESS_BYTES = 288 * MIB
"""An engine process beside weights and KV: 225 MiB here, most of it imported modules."""


@dataclass(frozen=True)
class Outcome:
    """How a limited process ended."""

    status: int
    found: dict[str, Any] | None
    errors: str


@contextlib.contextmanager
def limited_group(limit: int) -> Iterator[Path]:
    """A new cgroup with that limit; skips where none can be made."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_cgroup(limit))
        except OSError as error:
            pytest.skip(f"no cgroup can be made here, or none whose memory is limited: {error}")
        yield group


def run_child(
    folder: Path, weight_bytes: int, num_tokens: int, cache: Path, *, joins: Path | None, data: int
) -> Outcome:
    """The engine in a process that joins a cgroup or is held to ``data`` bytes before it starts."""

    def held() -> None:
        if joins is not None:
            (joins / "cgroup.procs").write_text(str(os.getpid()))
        if data:
            resource.setrlimit(resource.RLIMIT_DATA, (data, data))

    arguments = [str(folder), str(weight_bytes), str(num_tokens)]
    done = subprocess.run(
        [sys.executable, str(CHILD), *arguments],
        preexec_fn=held,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )
    found = json.loads(done.stdout) if done.returncode == 0 else None
    return Outcome(done.returncode, found, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, embedded_dir: Path) -> Path:
    """Layers of Qwen3-0.6B's shapes, and a vocabulary that is too small to matter."""
    out = tmp_path_factory.mktemp("model")
    change = {"vocab_size": 512, "num_hidden_layers": NUM_LAYERS, "eos_token_id": 490}
    write_random_checkpoint(CONFIGS["qwen3-0.6b"] | change, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(embedded_dir / name, out / name)
    return out


def test_a_model_runs_in_a_cgroup_that_its_weights_do_not_fit(folder: Path, tmp_path: Path) -> None:
    free = run_child(folder, 0, 4, tmp_path, joins=None, data=0)
    limit = WEIGHT_BYTES + KV_BYTES + PROCESS_BYTES
    with limited_group(limit) as group:
        streamed = run_child(folder, WEIGHT_BYTES, 4, tmp_path, joins=group, data=0)
        resident = run_child(folder, 0, 4, tmp_path, joins=group, data=0)
    assert resident.status == -signal.SIGKILL, resident
    assert free.found is not None, free.errors
    assert streamed.found is not None, (streamed.status, streamed.errors)
    assert streamed.found["tokens"] == free.found["tokens"]
    # Seven of eight layers a step, for a prefill and three more tokens at least.
    assert streamed.found["streamed"] >= 4 * 7 * LAYER_BYTES
    assert streamed.found["own"] < limit < free.found["own"]


@pytest.mark.slow
def test_a_model_runs_within_rlimit_data(folder: Path, tmp_path: Path) -> None:
    """Twice the weights are no room for the mapping and all weights together."""
    mapped = (folder / "model.safetensors").stat().st_size
    limit = mapped + WEIGHT_BYTES + KV_BYTES + PROCESS_BYTES
    streamed = run_child(folder, WEIGHT_BYTES, 4, tmp_path, joins=None, data=limit)
    resident = run_child(folder, 0, 4, tmp_path, joins=None, data=limit)
    assert streamed.found is not None, streamed.errors
    assert resident.status == 1, resident
    assert "memory" in resident.errors.lower() or "alloc" in resident.errors


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_4b_model_runs_in_three_gib(data_dir: Path, tmp_path: Path) -> None:
    """Its weights are 7.5 GiB; the same tokens as with all of them in memory."""
    model = tmp_path / "model"
    make_random_checkpoint("qwen3-4b", model, data_dir / "hf-qwen3-4b-instruct-2507", 0)
    weights = 2400 * MIB
    with limited_group(3072 * MIB) as group:
        streamed = run_child(model, weights, 4, tmp_path, joins=group, data=0)
    resident = run_child(model, 0, 4, tmp_path, joins=None, data=0)
    shutil.rmtree(model)
    assert streamed.found is not None, (streamed.status, streamed.errors)
    assert resident.found is not None, resident.errors
    assert streamed.found["tokens"] == resident.found["tokens"]
    print(f"streamed: {streamed.found}\nresident: {resident.found}")
