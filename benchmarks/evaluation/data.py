"""Where the task sets lie. They are not part of this project: their licences are their sources'."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "INFERENCE_PIO_DATA"
FOLDER = "bench"


class DataError(ValueError):
    """A task set is absent or damaged; the message says where it was looked for."""


def data_file(name: str) -> Path:
    """The file of that name in the folder of task sets. Raises ``DataError``."""
    root = os.environ.get(VARIABLE)
    if not root:
        raise DataError(
            f"{VARIABLE} is not set: it names the folder whose {FOLDER}/{name} is to be read "
            "(docs/benchmarks.md says where the task sets come from)"
        )
    path = Path(root) / FOLDER / name
    if not path.is_file():
        raise DataError(f"{FOLDER}/{name} is not in the folder that {VARIABLE} names")
    return path


def read_rows(name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, gzipped where its name says so. Raises ``DataError``."""
    path = data_file(name)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{FOLDER}/{name}: {error}") from None
    # Not splitlines(): texts may hold other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{FOLDER}/{name}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{FOLDER}/{name}, line {number}: not a JSON object")
        yield row
