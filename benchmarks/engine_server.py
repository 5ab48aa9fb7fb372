"""Runs one engine in a fresh process and answers what is asked of it, one JSON object a line.

``python -m inference_pio.benchmarks.engine_server CONFIG`` loads the engine of that configuration
(JSON). The first answer is the memory after each stage of that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..workers.config import EngineConfig
from .compare.peers.runner import end_with_parent, own_stdout, say
from .divergence import compare_with, write_reference
from .resident import resident
from .staged_engine import build_in_stages, fill
from .systems import OwnEngine


def main() -> None:
    """See the module."""
    answers = own_stdout()
    end_with_parent()
    config = EngineConfig.model_validate_json(sys.argv[1])
    try:
        engine, stages = build_in_stages(config)
    except (ValueError, OSError) as error:
        say(answers, error=str(error))
        return
    own = OwnEngine(engine)
    say(answers, value={"stages": asdict(stages), "precision": own.precision})
    actions: dict[str, Callable[..., Any]] = {
        "resident": lambda: asdict(resident()),
        "fill": lambda: asdict(fill(engine)),
        "decode_rate": own.decode_rate,
        "prefill_rate": own.prefill_rate,
        "write_reference": lambda path: write_reference(engine.loaded, Path(path)),
        "compare_with": lambda path: asdict(compare_with(engine.loaded, Path(path))),
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            value = actions[request["action"]](*request["arguments"])
        except ValueError as error:
            say(answers, error=str(error))
        else:
            say(answers, value=value)


if __name__ == "__main__":
    main()
