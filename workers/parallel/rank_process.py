"""A rank in a process of its own: ``python -m ...rank_process``, its spec as JSON on stdin."""

from __future__ import annotations

import logging
import sys

from .launcher import RankSpec
from .rank import run_rank


def main() -> None:
    """Read the spec and be that rank."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run_rank(RankSpec.from_json(sys.stdin.read()))


if __name__ == "__main__":
    main()
