"""The picture of ``bench quantization``: what a format costs in memory, and what it gives for it.

A panel for each quality, over the resident weights; a point a format, in its colour, with its
spread as a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .picture import require_picture_path
from .report import Row

SIZE = ("weights", "MiB")
PANELS = (
    ("accuracy", "right"),
    ("next token, mean KL", "nats"),
    ("next token, top-1 changed", "share"),
    ("decode b1", "tok/s"),
    ("decode b32", "tok/s"),
    ("prefill 512", "tok/s"),
)
"""Case and unit; one that was not measured has no panel."""


def draw_tradeoff(rows: Sequence[Row], path: Path) -> None:
    """Write the picture of the rows of ``quantization.rows``; the suffix decides the format.

    Raises ``ValueError`` for another suffix, and for rows without a size.
    """
    require_picture_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {(row.case, row.unit, row.system): row for row in rows}
    on_device = (f"{SIZE[0]}, on the device", SIZE[1])
    size = on_device if any((row.case, row.unit) == on_device for row in rows) else SIZE
    formats = list(dict.fromkeys(row.system for row in rows))
    if any((*size, name) not in found for name in formats):
        raise ValueError("rows of a quantization run have the size of every format's weights")
    panels = [p for p in PANELS if any((*p, name) in found for name in formats)]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in grid[len(panels) :]:
        panel.set_visible(False)
    for panel, (case, unit) in zip(grid, panels, strict=False):
        for number, name in enumerate(formats):
            row = found.get((case, unit, name))
            if row is None:
                continue
            at = found[*size, name].median
            spread = [[max(0.0, row.median - row.low)], [max(0.0, row.high - row.median)]]
            panel.errorbar(
                at, row.median, spread, fmt="o", color=f"C{number}", capsize=2, label=name
            )
        panel.set_title(case)
        panel.set_xlabel(f"resident weights, {size[1]}")
        panel.set_ylabel(unit)
        panel.margins(0.2)
        panel.spines[["top", "right"]].set_visible(False)
    # The last panel is of speed, which every format has.
    handles, labels = grid[len(panels) - 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=150)
