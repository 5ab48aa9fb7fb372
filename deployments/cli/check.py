"""``inference-pio check``."""

from __future__ import annotations

from pathlib import Path

from ..check.report import print_review
from ..check.review import review_file
from .console import err, out


def run_check(file: Path, svg: Path | None) -> int:
    """Print what is in ``file`` and what is wrong with it; draw it where that was asked for.

    Returns the exit status: 1 for a file that cannot work.
    """
    review = review_file(file)
    print_review(review, out)
    if svg is not None:
        if review.config is None:
            err.print("nothing to draw: the file holds no service that can be read")
            return 1
        from ..check.svg import draw

        svg.write_text(draw(review), encoding="utf-8")
        err.print(f"drawn in {svg}", markup=False)
    return 0 if review.is_sound else 1
