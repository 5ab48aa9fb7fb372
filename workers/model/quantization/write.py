"""Writing a quantized copy of a checkpoint: what ``inference-pio quantize`` does.

Tensor by tensor, so that one weight at a time is in memory beside the file that is being filled;
into a folder beside the wanted one, which is renamed at the end: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import CheckpointError, ModelConfig, read_json
from ..loader import INDEX_FILE, SINGLE_FILE, Checkpoint, LoadProgress
from ..names import HEAD, expected_shapes, linear_of
from .detect import layout_of
from .own import own_settings, own_tensors
from .quantize import HEAD_FORMATS, MadeFormat, quantize

MAX_FILE_BYTES = 2 * 10**9
# Weights in any form; everything else in the folder belongs to the model and is copied.
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def write_quantized(
    source: Path, out: Path, format: MadeFormat, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the checkpoint ``source`` to the new folder ``out`` with its linears in ``format``.

    A tied head is not written: it is rounded from the embedding while loading. Raises
    ``CheckpointError`` for a source that is not whole or is quantized already, ``ValueError``
    where ``out`` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists; a new folder is expected")
    raw = read_json(source / "config.json")
    layout = layout_of(raw, str(source / "config.json"))
    if layout is not None:
        raise CheckpointError(
            f"{source} is quantized already ({layout.name}); "
            "quantize the checkpoint that it was made from"
        )
    config = ModelConfig.from_folder(source)
    checkpoint = Checkpoint(source)
    checkpoint.check(
        expected_shapes(config), frozenset({HEAD}) if config.tie_word_embeddings else frozenset()
    )
    partial = out.with_name(f".{out.name}.partial.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_weights(_tensors(checkpoint, config, format), partial, max_file_bytes)
        for file in source.iterdir():
            if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and file.name != INDEX_FILE:
                shutil.copyfile(file, partial / file.name)
        _write_json(partial / "config.json", raw | {"quantization_config": own_settings(format)})
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@torch.inference_mode()
def _tensors(
    checkpoint: Checkpoint, config: ModelConfig, format: MadeFormat
) -> Iterator[dict[str, Tensor]]:
    """What stands for each tensor of the source, in its order."""
    with LoadProgress(checkpoint.num_bytes, f"Quantizing {checkpoint.folder.name}") as progress:
        for name in expected_shapes(config):
            prefix = linear_of(name)
            stored = checkpoint.float_view(name)
            if prefix is None:
                yield {name: stored.clone()}
            else:
                try:
                    made = quantize(stored, HEAD_FORMATS[format] if name == HEAD else format)
                except ValueError as error:
                    raise CheckpointError(
                        f"{checkpoint.folder}: {name} cannot be quantized: {error}"
                    ) from error
                yield own_tensors(prefix, made)
            checkpoint.release(name)
            progress.advance(checkpoint.num_tensor_bytes(name))


def _write_weights(parts: Iterator[dict[str, Tensor]], folder: Path, max_bytes: int) -> None:
    """One file, or several with an index."""
    held: dict[str, Tensor] = {}
    files: list[list[str]] = []
    total = 0

    def flush() -> None:
        save_file(held, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for part in parts:
        size = sum(tensor.nbytes for tensor in part.values())
        if held and sum(tensor.nbytes for tensor in held.values()) + size > max_bytes:
            flush()
        held |= part
        total += size
    flush()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / SINGLE_FILE)
        return
    where: dict[str, str] = {}
    for number, tensors in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        where |= dict.fromkeys(tensors, name)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
