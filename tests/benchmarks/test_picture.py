from __future__ import annotations

from pathlib import Path

import pytest

from inference_pio.benchmarks.picture import draw
from inference_pio.benchmarks.report import Row


def row(unit: str, case: str, system: str, precision: str = "float32") -> Row:
    return Row("speed", system, precision, case, unit, 2.0, 1.0, 4.0, None, "inference-pio bench")


ROWS = [row("tok/s", "decode b1", "a"), row("tok/s", "decode b1", "b"), row("ratio", "all", "a/b")]


def test_a_png_is_written(tmp_path: Path) -> None:
    draw(ROWS, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_an_svg_shows_every_unit_once(tmp_path: Path) -> None:
    draw(ROWS, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert text.count("<!-- tok/s -->") == 1
    assert text.count("<!-- ratio -->") == 1


def test_each_precision_has_a_bar_of_its_own(tmp_path: Path) -> None:
    draw([*ROWS, row("tok/s", "decode b1", "a", "int8")], tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert text.count("<!-- decode b1  float32  a -->") == 1
    assert text.count("<!-- decode b1  int8  a -->") == 1


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png or \.svg file, got 'p\.pdf'"):
        draw(ROWS, tmp_path / "p.pdf")
