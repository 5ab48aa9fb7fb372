"""``inference-pio make-checkpoint`` and ``quantize``."""

from __future__ import annotations

from pathlib import Path

from ...workers.model.quantization.quantize import MadeFormat
from ...workers.model.quantization.write import write_quantized
from ...workers.model.random_checkpoint import Shape, make_random_checkpoint
from ...workers.model_source import resolve_model
from .console import err, progress


def run_make_checkpoint(shape: Shape, out: Path, tokenizer: Path, seed: int) -> None:
    """Write the checkpoint and say how large it is."""
    with progress() as say:
        say(f"writing {shape} to {out}")
        make_random_checkpoint(shape, out, tokenizer, seed=seed)
    err.print(f"{out}: {_gib(out):.2f} GiB, random weights of seed {seed}", markup=False)


def run_quantize(source: str, out: Path, format: MadeFormat) -> None:
    """Write the quantized copy and say how large both are."""
    folder = resolve_model(source)
    write_quantized(folder, out, format)
    err.print(f"{out}: {_gib(out):.2f} GiB in {format}, from {_gib(folder):.2f}", markup=False)


def _gib(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 2**30)
