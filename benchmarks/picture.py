"""Rows as a picture: a panel for each unit, a bar for each row, its spread as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import Row

SUFFIXES = (".png", ".svg")


def require_picture_path(path: Path) -> None:
    """Raise ``ValueError`` for a format that is not drawn; asked before a long measurement."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a picture is a {' or '.join(SUFFIXES)} file, got {path.name!r}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture; the suffix decides the format."""
    require_picture_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(row.unit for row in rows))
    by_unit = [[row for row in rows if row.unit == unit] for unit in units]
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(rows) + 0.7 * len(units)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(units), 1, squeeze=False, gridspec_kw={"height_ratios": [len(g) + 1 for g in by_unit]}
    )
    systems = list(dict.fromkeys(row.system for row in rows))
    tells_precision = len({row.precision for row in rows}) > 1
    for panel, unit, group in zip(panels[:, 0], units, by_unit, strict=True):
        panel.barh(
            range(len(group)),
            [row.median for row in group],
            xerr=(
                [max(0.0, row.median - row.low) for row in group],
                [max(0.0, row.high - row.median) for row in group],
            ),
            color=[f"C{systems.index(row.system) % 10}" for row in group],
            error_kw={"elinewidth": 1, "capsize": 2},
            tick_label=[_label(row, tells_precision) for row in group],
        )
        panel.invert_yaxis()
        panel.set_xlabel(unit)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _label(row: Row, tells_precision: bool) -> str:
    parts = (row.case, row.precision, row.system) if tells_precision else (row.case, row.system)
    return "  ".join(parts)
