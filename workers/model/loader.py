"""Checkpoint folders: which file holds which tensor, checked before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .config import CheckpointError, read_json
from .safetensors_file import FLOAT_DTYPES, SafetensorsFile

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Loads shorter than this show no bar.
SECONDS_BEFORE_BAR = 2.0
# Buffers that old checkpoints carry and that are computed here.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


class Checkpoint:
    """The tensors of a folder, single file or sharded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {path.name: SafetensorsFile(path) for path in weight_files(folder)}
        self._where = {name: file for file in self._files.values() for name in file.entries}

    @property
    def num_bytes(self) -> int:
        """Size of all weight files."""
        return sum(file.size for file in self._files.values())

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def check(
        self, expected: Mapping[str, tuple[int, ...] | None], ignored: Collection[str]
    ) -> None:
        """Compares the tensors with what the architecture needs; shape ``None`` fits any.

        Raises ``CheckpointError`` for one that is missing, has another shape, or has no place in
        the model (a model that drops a part of its weights computes something else).
        """
        for name, shape in expected.items():
            if name not in self._where:
                size = "" if shape is None else f" {list(shape)}"
                raise CheckpointError(
                    f"{self.folder}: tensor {name}{size} is missing "
                    f"({len(self._where)} tensors in {', '.join(self._files)})"
                )
            stored = self._where[name].entries[name].shape
            if shape is not None and stored != shape:
                raise CheckpointError(
                    f"{self._where[name].path}: tensor {name} has shape {list(stored)}, "
                    f"config.json asks for {list(shape)}"
                )
        unknown = [
            name
            for name in self._where
            if name not in expected and name not in ignored and not name.endswith(IGNORED_SUFFIXES)
        ]
        if unknown:
            raise CheckpointError(
                f"{self.folder}: {len(unknown)} tensors have no place in this architecture, "
                f"the first is {unknown[0]}"
            )

    def view(self, name: str) -> Tensor:
        """A tensor as stored, mapped and not copied."""
        return self._where[name].view(name)

    def float_view(self, name: str) -> Tensor:
        """The same for a tensor that is not quantized; ``CheckpointError`` where it is."""
        if self.stored_dtype(name) not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self._where[name].path}: {name} is stored as {self.stored_dtype(name)}; "
                f"supported are {', '.join(FLOAT_DTYPES)}"
            )
        return self.view(name)

    def file_of(self, name: str) -> SafetensorsFile:
        """The file that has a tensor."""
        return self._where[name]

    def stored_dtype(self, name: str) -> str:
        """The dtype of a tensor as the file names it."""
        return self._where[name].entries[name].dtype

    def num_tensor_bytes(self, name: str) -> int:
        """Stored size of one tensor."""
        entry = self._where[name].entries[name]
        return entry.end - entry.start

    def release(self, name: str) -> None:
        """Gives the pages of a tensor back once it is packed."""
        self._where[name].release(name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raises ``CheckpointError`` where there are none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; a checkpoint folder is expected")
    index = folder / INDEX_FILE
    if index.exists():
        return _sharded_files(index)
    single = folder / SINGLE_FILE
    if single.exists():
        return [single]
    others = sorted(
        p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf"}
    )
    hint = (
        f"it has {others[0]}, which is never loaded: pickles run code; convert it to safetensors"
        if others
        else "the folder may be incomplete"
    )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; {hint}")


def _sharded_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}; a .safetensors file beside it is meant")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.parent / name} does not exist, {index.name} names it")
    return [index.parent / name for name in names]


class LoadProgress:
    """A bar over the bytes loaded, shown once a load has taken two seconds."""

    def __init__(
        self,
        total_bytes: int,
        title: str,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_bytes
        self._title = title
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._start = clock()
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """Counts bytes as loaded."""
        self._done += num_bytes
        if self._bar is None and self._clock() - self._start >= SECONDS_BEFORE_BAR:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
