"""The embedded model: a tiny Qwen3 checkpoint that thinks, and the scripts that made it.

Importing this package loads nothing heavy; the training and evaluation scripts import torch.
"""

from pathlib import Path


def checkpoint_path() -> Path:
    """Folder that holds the checkpoint: weights, configuration, tokenizer and chat template."""
    return Path(__file__).parent / "checkpoint"
