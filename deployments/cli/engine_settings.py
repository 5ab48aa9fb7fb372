"""Keys of the engine's configuration on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
import yaml

from .console import CommandError

EngineSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="KEY=VALUE",
        help="Set a key of the engine's configuration, such as kv_cache_dtype=int8, "
        "attention=sliding_window:1024 or kv_paging.host_bytes=1GiB; may be repeated.",
    ),
]


def engine_settings(words: Sequence[str] | None, **named: Any) -> dict[str, Any]:
    """What the options say, with the sections of ``EngineConfig`` as mappings.

    ``named`` are keys with an option of their own, ``None`` where that is not given. Whether a key
    exists and takes its value is for the configuration to say. Raises ``CommandError``.
    """
    found = {key: value for key, value in named.items() if value is not None}
    for word in words or ():
        path, equals, text = word.partition("=")
        *sections, key = path.split(".")
        if not equals or not all((*sections, key)):
            raise CommandError(f"--engine {word!r} is not KEY=VALUE")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise CommandError(f"--engine {word!r}: {section!r} has a value already")
        try:
            place[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise CommandError(f"--engine {word!r}: {text!r} is not a YAML value") from None
    return found
