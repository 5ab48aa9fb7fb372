"""``inference-pio bench handoff``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...benchmarks import handoff
from ...benchmarks.handoff_peer import prefill_peer
from ...workers.config import EngineConfig
from .bench_runs import check_picture, publish, typed_command
from .console import CommandError, out, progress


def run_handoff(
    model: str,
    engine: Mapping[str, Any],
    lengths: Sequence[int],
    chunk: int,
    threads: int,
    rounds: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure a handoff between two engines on this machine; see ``benchmarks.handoff``."""
    from ...workers.engine import Engine

    check_picture(picture)
    config = EngineConfig.model_validate(
        {
            "model": model,
            **engine,
            "num_threads": threads,
            "max_batched_tokens": chunk,
            "kv_cache_bytes": 2**30,
            "max_num_seqs": 1 + max(handoff.LOADS),
            # Every prompt is new: a hit would be a prompt that nobody has to prefill.
            "prefix_caching": False,
        }
    )
    with progress() as say:
        say("starting the prefill engine")
        with prefill_peer(config) as peer:
            say(f"loading {model}")
            decoder = Engine(config)
            longest = max(lengths)
            if not 2 <= min(lengths) <= longest < decoder.max_model_len:
                raise CommandError(
                    f"--lengths are from 2 to {decoder.max_model_len - 1} for this model"
                )
            bench = handoff.HandoffBench(decoder, peer, chunk)
            rates, times = handoff.measure(bench, lengths, rounds, say)
    precision = str(decoder.loaded.model.dtype).removeprefix("torch.")
    publish(handoff.rows(rates, times, precision, typed_command()), json_file, picture)
    for load in handoff.LOADS:
        length = handoff.break_even(times, lengths, load)
        found = "at no measured length" if length is None else f"from {length} tokens on"
        out.print(f"with {load} others decoding, remote prefill is faster {found}")
