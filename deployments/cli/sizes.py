"""Sizes in bytes on a command line."""

from __future__ import annotations

from typing import Annotated

import typer

from ..check.nodes import parse_bytes


def _parse(text: str) -> int:
    try:
        return parse_bytes(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


WeightMemory = Annotated[
    int | None,
    typer.Option(
        "--weight-memory",
        parser=_parse,
        metavar="SIZE",
        help="Stream layers from the disk beyond this, such as 6GiB. [default: all in memory]",
    ),
]
