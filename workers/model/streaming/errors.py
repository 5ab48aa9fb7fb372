"""What goes wrong when weights are read while the model runs."""

from __future__ import annotations


class WeightReadError(RuntimeError):
    """Weights that are not in memory cannot be read any more; the message names the file.

    The model computes nothing after that: only loading it anew helps.
    """
