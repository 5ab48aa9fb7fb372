"""A model larger than the memory for its weights: what streaming its layers reaches of the disk.

For each limit an engine in a process of its own, which is stopped while another one, or the disk,
is measured. The disk's read rate is taken before and after each turn on the very file that the
engine reads, past the page cache, as the engine reads it. Where the system lets us, the process
runs in a cgroup that holds little more than the limit, so that nothing can hide in the page cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ..kernels.api import Placeable
from ..workers.config import EngineConfig
from ..workers.model.config import DTYPES, ModelConfig
from ..workers.model.qwen3 import Qwen3Model
from ..workers.model.shard import ShardSpec
from ..workers.model.streaming.layer_stream import aligned_memory
from ..workers.model.streaming.layers import num_layer_bytes, num_vector_bytes
from ..workers.model.streaming.residency import NUM_SLOTS
from ..workers.model.streaming.weight_file import CHUNK
from ..workers.model_source import resolve_model
from ..workers.user_cache import cache_folder
from .engine_process import EngineProcess
from .memory_limit import memory_cgroup
from .report import Row, of_rounds
from .speed import PROMPT_TOKENS, Case

BENCHMARK = "offload"
CASES = (Case("decode", 1), Case("decode", 32), Case("prefill", 512))
STEPS = 8
"""Of a decode case: each reads every streamed layer."""
KV_BYTES = 512 * 2**20
PROCESS_BYTES = 640 * 2**20
"""Of a process beside weights and KV: code, tokenizer, activations, what malloc keeps."""
DISK_BYTES = 512 * 2**20
"""Read for one sample of the disk's rate; files that are smaller are read again."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model's weights as they lie in memory."""

    num_layers: int
    layer_bytes: int
    fixed_bytes: int
    """Of what is never streamed."""

    def limit(self, kept: int) -> int:
        """The least ``weight_memory_bytes`` with which so many layers stay in memory."""
        return self.fixed_bytes + (kept + NUM_SLOTS) * self.layer_bytes

    def kept(self, share: float) -> int:
        """The layers of a share, fewer than would all fit beside the slots."""
        return max(0, min(round(share * self.num_layers), self.num_layers - NUM_SLOTS - 1))


@dataclass(frozen=True, slots=True)
class Limited:
    """An engine with some of its layers on the disk; with none of them, what it is compared to."""

    name: str
    config: EngineConfig
    streamed_bytes: int
    """Of a step."""


@dataclass(slots=True)
class Outcome:
    """Tokens/s and the disk's bytes/s of each round by case, and what the process took at most."""

    rates: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)
    peak_bytes: int = 0
    in_cgroup: bool = False


def sizes_of(config: EngineConfig) -> Sizes:
    """Of a configuration's model: its last layer is loaded, with the head.

    Raises ``ValueError`` where nothing can be streamed.
    """
    folder = resolve_model(config.model)
    num_layers = ModelConfig.from_folder(folder).num_layers
    part = Qwen3Model.load(
        folder,
        dtype=None if config.dtype == "auto" else DTYPES[config.dtype],
        device=torch.device("cpu"),
        shard=ShardSpec(pp_rank=num_layers - 1, pp_size=num_layers),
        quantization=config.quantization,
    )
    (layer,) = part.layers
    head = part.head.num_bytes if isinstance(part.head, Placeable) else 0
    vectors = num_layers * num_vector_bytes(layer)
    return Sizes(num_layers, num_layer_bytes(layer), head + vectors)


def limited_engines(config: EngineConfig, sizes: Sizes, shares: Sequence[float]) -> list[Limited]:
    """One engine for each share of layers that stay, without repeats, behind one that has all."""
    found = [Limited("all in memory", config, 0)]
    for kept in dict.fromkeys(map(sizes.kept, shares)):
        limit, streamed = sizes.limit(kept), sizes.num_layers - kept
        name = f"{limit / MIB:.0f} MiB, {streamed} of {sizes.num_layers} streamed"
        own = config.model_copy(update={"weight_memory_bytes": limit})
        found.append(Limited(name, own, streamed * sizes.layer_bytes))
    return found


def measure(
    engines: Sequence[Limited],
    cases: Sequence[Case],
    rounds: int,
    progress: Callable[[str], None],
) -> dict[str, Outcome]:
    """Every case on every engine, ``rounds`` times after a warm-up, in turns; by name.

    Raises ``ValueError`` for a configuration that cannot be loaded.
    """
    found = {engine.name: Outcome() for engine in engines}
    with ExitStack() as stack:
        running: list[tuple[Limited, EngineProcess, DiskProbe | None]] = []
        for engine in engines:
            progress(f"loading: {engine.name}")
            group = _own_cgroup(engine, stack)
            found[engine.name].in_cgroup = group is not None
            process = stack.enter_context(EngineProcess(engine.name, engine.config, group=group))
            probe = None
            if engine.streamed_bytes:
                probe = stack.enter_context(DiskProbe.of_process(process.pid))
            running.append((engine, process, probe))
        for case in cases:
            for number in range(rounds + 1):
                progress(f"{case.name}, round {number} of {rounds}" if number else case.name)
                for engine, process, probe in running:
                    before = probe.sample() if probe else None
                    rate = _rate(process, case)
                    after = probe.sample() if probe else None
                    if number:
                        disk = (before + after) / 2 if before and after else None
                        own = found[engine.name].rates.setdefault(case.name, [])
                        own.append((rate, disk))
        for engine, process, _ in running:
            found[engine.name].peak_bytes = process.resident().peak
    return found


def rows(
    engines: Sequence[Limited], outcomes: Mapping[str, Outcome], precision: str, command: str
) -> list[Row]:
    """The rates of each case with the share of what the disk allowed, then disk and memory."""
    row = partial(Row.of, benchmark=BENCHMARK, precision=precision, command=command)
    found = []
    cases = {name: _tokens_a_step(name) for name in outcomes[engines[0].name].rates}
    for case, tokens in cases.items():
        for engine in engines:
            taken = outcomes[engine.name].rates[case]
            shares = [
                rate * engine.streamed_bytes / (tokens * disk) for rate, disk in taken if disk
            ]
            found.append(
                row(
                    of_rounds([rate for rate, _ in taken]),
                    system=engine.name,
                    case=case,
                    unit="tok/s",
                    floor_share=of_rounds(shares).median if shares else None,
                )
            )
    for engine in engines:
        taken = [pair for own in outcomes[engine.name].rates.values() for pair in own]
        disk = [rate / 1e9 for _, rate in taken if rate]
        if disk:
            found.append(row(of_rounds(disk), system=engine.name, case="disk read", unit="GB/s"))
    for engine in engines:
        peak = outcomes[engine.name].peak_bytes / MIB
        figure = of_rounds([peak])
        found.append(row(figure, system=engine.name, case="peak memory", unit="MiB"))
    return found


def notes(engines: Sequence[Limited], outcomes: Mapping[str, Outcome]) -> list[str]:
    """What was enforced."""
    held = [engine for engine in engines if outcomes[engine.name].in_cgroup]
    if not held:
        return ["no cgroup could be made here: nothing but the engine itself kept the limits"]
    return [
        f"{engine.name}: in a cgroup of {_cgroup_bytes(engine) / MIB:.0f} MiB" for engine in held
    ]


class DiskProbe:
    """Reads a file from the disk in the pieces in which layers are read; a context manager."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | os.O_DIRECT)
        except OSError:  # as file systems without it answer
            self._fd = os.open(path, flags)
        self._size = os.fstat(self._fd).st_size
        self._memory = aligned_memory(CHUNK).numpy().data

    @classmethod
    def of_process(cls, pid: int) -> DiskProbe:
        """Of the file that an engine process streams from. Raises ``ValueError`` without one."""
        folder = os.path.realpath(cache_folder() / "weights")
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if os.path.realpath(entry).startswith(f"{folder}/"):
                return cls(entry)
        raise ValueError(f"process {pid} has no file of streamed weights in {folder} open")

    def __enter__(self) -> DiskProbe:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._fd)

    def sample(self) -> float:
        """Bytes a second, of ``DISK_BYTES``."""
        read = offset = 0
        begin = time.perf_counter()
        while read < DISK_BYTES:
            if offset == 0:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            count = os.preadv(self._fd, [self._memory], offset)
            read, offset = read + count, (offset + count) % self._size
        return read / (time.perf_counter() - begin)


def _own_cgroup(engine: Limited, stack: ExitStack) -> Path | None:
    """A cgroup for an engine with a limit, until the stack ends; ``None`` where none can be."""
    if not engine.streamed_bytes:
        return None
    try:
        return stack.enter_context(memory_cgroup(_cgroup_bytes(engine)))
    except OSError:
        return None


def _cgroup_bytes(engine: Limited) -> int:
    config = engine.config
    assert config.weight_memory_bytes is not None
    assert config.kv_cache_bytes is not None
    return config.weight_memory_bytes + config.kv_cache_bytes + PROCESS_BYTES


def _rate(process: EngineProcess, case: Case) -> float:
    if case.kind == "decode":
        return process.decode_rate(case.size, PROMPT_TOKENS, STEPS)
    return process.prefill_rate(case.size)


def _tokens_a_step(case: str) -> int:
    return next(one.size for one in CASES if one.name == case)
