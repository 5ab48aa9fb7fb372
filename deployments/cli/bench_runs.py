"""What the ``bench`` commands do: set up, measure, show, write."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...benchmarks.picture import draw, require_picture_path
from ...benchmarks.report import Report, Row, describe_machine, show_number
from ...workers.config import EngineConfig
from .console import CommandError, err, out, progress

DEFAULT_STREAMS = 16


@dataclass(frozen=True, slots=True)
class ServeWishes:
    """The options of ``bench serve``."""

    model: str
    url: str | None
    config: Path | None
    dtype: str
    attention: str
    streams: int | None
    rate: float | None
    requests: int
    max_tokens: int
    rounds: int
    offline: bool


def run_speed(
    model: str,
    dtype: str,
    attention: str,
    rounds: int,
    threads: int | None,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure decode and prefill; see ``benchmarks.speed``."""
    from ...benchmarks.floor import FloorProbe
    from ...benchmarks.speed import DECODE, PREFILL, measure, rows, shapes_of
    from ...benchmarks.systems import KV_BYTES, OwnEngine

    check_picture(picture)
    config = EngineConfig.model_validate(
        {
            "model": model,
            "dtype": dtype,
            "attention": attention,
            "num_threads": threads,
            "kv_cache_bytes": KV_BYTES,
            "max_num_seqs": DECODE[-1].size,
            "prefix_caching": False,
        }
    )
    with progress() as say:
        say(f"loading {model}")
        own = OwnEngine(config)
        loaded = own.engine.loaded
        cases = [*DECODE, *(case for case in PREFILL if case.size < loaded.max_model_len)]
        shapes = shapes_of(loaded.text.folder, own.precision)
        probe = FloorProbe(loaded.model.device, loaded.model.dtype)
        found = measure([own], shapes, probe, cases, rounds, say)
    publish(rows(found, [own], typed_command()), json_file, picture)


def run_serve(wishes: ServeWishes, json_file: Path | None, picture: Path | None) -> None:
    """Measure a server, its own or a running one; see ``benchmarks.serving``."""
    from ...benchmarks import serving
    from ...workers.engine import Engine

    check_picture(picture)
    streams = wishes.streams or DEFAULT_STREAMS
    if wishes.rate is not None and (wishes.streams is not None or wishes.offline):
        raise CommandError("--rate is an open loop; --streams and --offline are a closed one")
    waves: list[serving.Wave] = []
    alone: list[float] = []
    with _server(wishes) as (url, model, config):
        precision: str = config.dtype
        engine = None
        with progress() as say:
            if wishes.offline:
                say("loading the engine")
                engine = Engine(config)
                precision = str(engine.loaded.model.dtype).removeprefix("torch.")
            for number in range(wishes.rounds + 1):
                say(f"round {number} of {wishes.rounds}" if number else "warming up")
                asked = serving.questions(wishes.requests, wishes.max_tokens, seed=number)
                if wishes.rate is not None:
                    wave = serving.serve_arrivals(url, model, asked, wishes.rate, seed=number)
                else:
                    wave = serving.serve_streams(url, model, asked, streams)
                own = serving.offline_tokens_per_s(engine, asked, streams) if engine else 0.0
                if number:
                    waves.append(wave)
                    alone.append(own)
    case = f"{wishes.rate:g} requests/s" if wishes.rate is not None else f"{streams} streams"
    found = serving.latency_rows(waves, precision, case, typed_command())
    if wishes.offline:
        found += serving.offline_rows(alone, waves, precision, case, typed_command())
    publish(found, json_file, picture)


def run_accuracy(
    count: int,
    temperature: float | None,
    seed: int,
    options: Mapping[str, Any],
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Ask the embedded model on an engine of these options; see ``benchmarks.accuracy``."""
    from ...benchmarks import accuracy
    from ...workers.llm import LLM
    from ...workers.types import SamplingParams

    check_picture(picture)
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=512)
    with progress() as say:
        say("loading the embedded model")
        with LLM("embedded", **options) as llm:
            config = llm.engine.config
            precision: str = config.quantization
            if precision == "none":
                precision = str(llm.engine.loaded.model.dtype).removeprefix("torch.")
            if not config.attention.is_exact:
                precision += f", {config.attention.label}"
            scores = accuracy.score_all(llm, count, seed, params, say)
    publish(accuracy.rows(scores, precision, typed_command()), json_file, picture)


@contextmanager
def _server(wishes: ServeWishes) -> Iterator[tuple[str, str, EngineConfig]]:
    """Address, model name and engine configuration of the server to measure."""
    from ..application_file import Wishes, load_application
    from ..launcher import LocalServer
    from ..local_ports import free_ports
    from .serve import stopped_by_signals
    from .talk_http import HttpTalker

    if wishes.url is not None:
        with HttpTalker(wishes.url) as talker:
            name = talker.name
        config = {"model": wishes.model, "dtype": wishes.dtype, "attention": wishes.attention}
        yield wishes.url.rstrip("/"), name, EngineConfig.model_validate(config)
        return
    application = load_application(
        wishes.config,
        Wishes(
            wishes.model,
            "127.0.0.1",
            free_ports(1)[0],
            dtype=wishes.dtype,
            attention=wishes.attention,
        ),
    )
    with stopped_by_signals(), LocalServer(application) as server:
        with progress() as say:
            server.start(say)
        yield server.address, application.config.model_name, application.config.engine


def check_picture(picture: Path | None) -> None:
    """Raise ``ValueError`` for a picture that could not be drawn in the end."""
    if picture is not None:
        require_picture_path(picture)


def publish(
    rows: Sequence[Row],
    json_file: Path | None,
    picture: Path | None,
    *,
    notes: Sequence[str] = (),
) -> None:
    """Print the rows, and write the report and the picture that were asked for."""
    _show(rows)
    for note in notes:
        out.print(note, markup=False)
    report = Report(describe_machine(), tuple(rows), tuple(notes))
    if json_file is not None:
        report.write(json_file)
        err.print(f"report: {json_file}", markup=False)
    if picture is not None:
        draw(rows, picture)
        err.print(f"picture: {picture}", markup=False)


def _show(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("case", "system"):
        table.add_column(heading, no_wrap=True)
    for heading in ("median", "low", "high", "unit", "of floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        share = "" if row.floor_share is None else f"{row.floor_share:.2f}"
        figures = (show_number(value) for value in (row.median, row.low, row.high))
        table.add_row(row.case, row.system, *figures, row.unit, share)
    # As wide as it needs: a report in a log file or a narrow window is not cut.
    wide = Console(width=max(out.width, 110), highlight=False)
    wide.print(f"[bold]{rows[0].benchmark}[/], {rows[0].precision}")
    wide.print(table)


def typed_command() -> str:
    """What was typed, without the folders of this machine."""
    words = [
        Path(word).name if word.startswith(("/", "~", "./", "../")) else word
        for word in sys.argv[1:]
    ]
    return shlex.join(["inference-pio", *words])
