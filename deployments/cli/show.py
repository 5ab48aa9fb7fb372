"""Prints a reply as it comes, the thought apart from the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from .talk import Piece


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply."""

    reasoning: str
    content: str


def show_reply(pieces: Iterator[Piece], console: Console) -> Reply:
    """Print every piece at once; returns the whole.

    The thought is dim and marked at its left edge, so it stays apart where there is no colour.
    """
    reasoning: list[str] = []
    content: list[str] = []
    for piece in pieces:
        if piece.reasoning:
            if not reasoning:
                console.print("┆ ", style="dim", end="")
            console.print(
                piece.reasoning.replace("\n", "\n┆ "),
                style="dim italic",
                end="",
                markup=False,
                soft_wrap=True,
            )
            reasoning.append(piece.reasoning)
        if piece.content:
            if reasoning and not content:
                console.print()
            console.print(piece.content, end="", markup=False, soft_wrap=True)
            content.append(piece.content)
    console.print()
    return Reply("".join(reasoning), "".join(content))
