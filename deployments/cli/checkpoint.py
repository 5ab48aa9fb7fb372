"""``inference-pio make-checkpoint``."""

from __future__ import annotations

from pathlib import Path

from ...workers.model.random_checkpoint import Shape, make_random_checkpoint
from .console import err, progress


def run_make_checkpoint(shape: Shape, out: Path, tokenizer: Path, seed: int) -> None:
    """Write the checkpoint and say how large it is."""
    with progress() as say:
        say(f"writing {shape} to {out}")
        make_random_checkpoint(shape, out, tokenizer, seed=seed)
    size = sum(file.stat().st_size for file in out.iterdir())
    err.print(f"{out}: {size / 2**30:.2f} GiB, random weights of seed {seed}", markup=False)
