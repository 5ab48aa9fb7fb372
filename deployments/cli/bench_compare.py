"""``inference-pio bench compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...benchmarks.compare.catalog import PRECISIONS, catalog
from ...benchmarks.compare.comparison import compare, fastest_other
from ...benchmarks.speed import DECODE, PREFILL
from ...workers.model_source import resolve_model
from ..ray_settings import usable_cores
from .bench_runs import check_picture, publish, typed_command
from .console import CommandError, err, progress


def run_compare(
    model: str,
    against: Sequence[str],
    precisions: Sequence[str],
    case_names: Sequence[str],
    rounds: int,
    threads: int | None,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure this engine and its peers; see ``benchmarks.compare``."""
    check_picture(picture)
    known = catalog()
    own, *others = known
    cases = {case.name: case for case in (*DECODE, *PREFILL)}
    _require_known("--case", case_names, list(cases))
    _require_known("--against", against, others)
    _require_known("--precision", precisions, PRECISIONS)
    command = typed_command()
    with progress() as say:
        outcome = compare(
            resolve_model(model),
            [known[own], *(known[name] for name in against or others)],
            precisions,
            [cases[name] for name in case_names or cases],
            threads=threads or usable_cores(),
            rounds=rounds,
            command=command,
            progress=say,
        )
    if not outcome.rows:
        raise CommandError("nothing could be measured:\n" + "\n".join(outcome.notes))
    publish(outcome.rows, json_file, picture, notes=outcome.notes)
    behind = [row for row in fastest_other(outcome.rows, own) if row.median < 1]
    for row in behind:
        err.print(f"behind: {row.precision} {row.case}, {row.system} {row.median:.2f}")


def _require_known(option: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    for name in wanted:
        if name not in known:
            raise CommandError(f"{option} {name!r} is not known; it is one of {', '.join(known)}")
