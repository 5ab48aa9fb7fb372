"""Draws a service: ingress, router, pools with their replicas and ranks, and where KV travels.

Four columns from left to right: ingress, router, the pools that own requests, the pools that
prefill for them. Every box is as wide as the text in it, by a width per character that is generous
for any sans-serif font, so that nothing depends on fonts being installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .nodes import gib
from .plan import Node
from .review import PoolReview, Review

EM = 0.62
"""Width of a character by the font's size; sans-serif letters average 0.5 to 0.55."""
SIZE = 13
SMALL = 11
MARGIN = 24
GAP = 96
KV_GAP = 190
PAD = 12
LINE = 18
CELL_HEIGHT = 40
SHOWN_REPLICAS = 3

INK, MUTED, LINE_COLOUR, KV_COLOUR = "#1f2933", "#52606d", "#7b8794", "#b44d12"
FILLS = {"unified": "#e3f2e6", "decode": "#e3edf9", "prefill": "#fbeadb"}


@dataclass(frozen=True, slots=True, eq=False)
class PoolBox:
    """A pool's place and the lines in it."""

    review: PoolReview
    columns: int
    rows: int
    lines: tuple[str, ...]
    places: dict[tuple[int, int], str]
    """Node of each (replica, rank)."""

    @property
    def shown(self) -> int:
        return min(self.review.pool.replicas, SHOWN_REPLICAS)

    @property
    def hidden(self) -> int:
        return self.review.pool.replicas - self.shown

    def cell_text(self, replica: int, rank: int) -> tuple[str, str]:
        """Two lines of a rank: its number and memory, and its node."""
        memory = self.review.memory
        size = ""
        if memory is not None:
            kv = memory[rank].kv
            size = f" · {gib(memory[rank].weights + (kv or 0))}"
        return f"rank {rank}{size}", self.places.get((replica, rank), "")

    @property
    def cell_width(self) -> int:
        texts = [
            text
            for replica in range(self.shown)
            for rank in range(self.columns * self.rows)
            for text in self.cell_text(replica, rank)
        ]
        return max(72, max(width(text, SMALL) for text in texts) + 12)

    @property
    def box_width(self) -> int:
        grid = self.columns * (self.cell_width + 6) + 2 * PAD + 10
        title = width(f"{self.review.pool.name}  {self.review.pool.role}", SIZE + 2) + 10
        return max(grid, title, *(width(line, SMALL) for line in self.lines)) + 2 * PAD

    @property
    def replica_height(self) -> int:
        return self.rows * (CELL_HEIGHT + 6) + LINE + 14

    @property
    def height(self) -> int:
        head = PAD + LINE + len(self.lines) * (LINE - 2) + 8
        more = LINE if self.hidden else 0
        return head + self.shown * (self.replica_height + 8) + more + PAD - 8


class Canvas:
    """SVG elements in the order they are drawn."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: int, y: int, w: int, h: int, fill: str, radius: int = 8) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{fill}" '
            f'stroke="{LINE_COLOUR}"/>'
        )

    def text(
        self,
        x: int,
        y: int,
        words: str,
        size: int = SIZE,
        *,
        colour: str = INK,
        bold: bool = False,
        anchor: str = "start",
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def arrow(
        self, points: Sequence[tuple[int, int]], colour: str, *, dashed: bool = False
    ) -> None:
        path = " ".join(f"{'M' if i == 0 else 'L'}{x} {y}" for i, (x, y) in enumerate(points))
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        head = "kv" if colour == KV_COLOUR else "flow"
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash} '
            f'marker-end="url(#{head})"/>'
        )

    def svg(self, w: int, h: int, title: str) -> str:
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
            f'markerHeight="8" orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
            for name, colour in (("flow", LINE_COLOUR), ("kv", KV_COLOUR))
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" '
            f'viewBox="0 0 {w} {h}" font-family="sans-serif" role="img">\n'
            f"<title>{escape(title)}</title>\n<defs>{heads}</defs>\n"
            f'<rect width="{w}" height="{h}" fill="#ffffff"/>\n{body}\n</svg>\n'
        )


def width(words: str, size: int) -> int:
    """Pixels that words take at most."""
    return round(len(words) * size * EM)


def draw(review: Review) -> str:
    """The drawing of a file's service, as SVG. It needs a configuration that could be read."""
    if review.config is None:
        raise ValueError(f"{review.path} holds no service that could be drawn")
    nodes = () if review.plan is None else review.plan.nodes
    boxes = [_pool_box(review, pool, nodes) for pool in review.pools]
    serving = [box for box in boxes if box.review.pool.role != "prefill"]
    prefill = [box for box in boxes if box.review.pool.role == "prefill"]
    heights = [_stack_height(serving), _stack_height(prefill)]
    height = max(*heights, 90) + 2 * MARGIN
    middle = height // 2
    canvas = Canvas()

    models = sorted({box.review.name for box in serving})
    ingress = ("ingress", ["HTTP, templates,", "tokens to text"])
    router = ("router", ["mode, complexity,", "prefix, load", *_shortened(models)])
    x = MARGIN
    ingress_right = _plain_box(canvas, x, middle, *ingress)
    router_left = ingress_right + GAP // 2
    router_right = _plain_box(canvas, router_left, middle, *router)
    canvas.arrow([(ingress_right, middle), (router_left, middle)], LINE_COLOUR)

    pool_left = router_right + GAP
    serving_width = max(box.box_width for box in serving)
    tops = _tops(serving, middle)
    for box, top in zip(serving, tops, strict=True):
        _draw_pool(canvas, box, pool_left, top, serving_width)
        y = top + PAD + LINE // 2
        turn = router_right + GAP // 2
        canvas.arrow(
            [(router_right, middle), (turn, middle), (turn, y), (pool_left, y)], LINE_COLOUR
        )
    right = pool_left + serving_width
    if prefill:
        left = right + KV_GAP
        prefill_width = max(box.box_width for box in prefill)
        sources = dict(zip(prefill, _tops(prefill, middle), strict=True))
        for box, top in sources.items():
            _draw_pool(canvas, box, left, top, prefill_width)
        _draw_handoffs(canvas, serving, tops, sources, right, left)
        right = left + prefill_width
    return canvas.svg(right + MARGIN, height, f"{review.path.name}: {review.kind}")


def _pool_box(review: Review, pool: PoolReview, nodes: Sequence[Node]) -> PoolBox:
    assert review.config is not None
    parallel = review.config.engine_of(pool.pool).parallel
    places = {
        (rank.group.index, rank.index): node.name
        for node in nodes
        for rank in node.ranks
        if rank.group.pool == pool.pool
    }
    modes = "computes KV only" if pool.pool.role == "prefill" else ", ".join(pool.pool.modes)
    lines: tuple[str, ...] = (pool.model if pool.pool.role == "prefill" else pool.name, modes)
    if parallel.num_ranks > 1:
        split = f"TP{parallel.tensor} x PP{parallel.pipeline}, {pool.pool.placement}"
        if parallel.sequence_from is not None:
            split += f", by tokens from {parallel.sequence_from}"
        lines = (*lines, split)
    return PoolBox(pool, parallel.tensor, parallel.pipeline, lines, places)


def _stack_height(boxes: Sequence[PoolBox]) -> int:
    return sum(box.height for box in boxes) + 28 * max(0, len(boxes) - 1)


def _tops(boxes: Sequence[PoolBox], middle: int) -> list[int]:
    top = middle - _stack_height(boxes) // 2
    tops = []
    for box in boxes:
        tops.append(top)
        top += box.height + 28
    return tops


def _plain_box(canvas: Canvas, x: int, middle: int, title: str, lines: Sequence[str]) -> int:
    """A box around ``middle``; returns its right edge."""
    w = max(width(title, SIZE + 2), *(width(line, SMALL) for line in lines)) + 2 * PAD
    h = 2 * PAD + LINE + len(lines) * (LINE - 2)
    top = middle - h // 2
    canvas.box(x, top, w, h, "#f5f7fa")
    canvas.text(x + w // 2, top + PAD + 12, title, SIZE + 2, bold=True, anchor="middle")
    for index, line in enumerate(lines):
        y = top + PAD + 12 + LINE + index * (LINE - 2)
        canvas.text(x + w // 2, y, line, SMALL, colour=MUTED, anchor="middle")
    return x + w


def _shortened(models: Sequence[str]) -> list[str]:
    """Model names for the router's box; a folder by its last part."""
    return [name.rstrip("/").rpartition("/")[2] for name in models]


def _draw_pool(canvas: Canvas, box: PoolBox, x: int, top: int, w: int) -> None:
    pool = box.review.pool
    canvas.box(x, top, w, box.height, FILLS[pool.role])
    y = top + PAD + 12
    canvas.text(x + PAD, y, pool.name, SIZE + 2, bold=True)
    canvas.text(x + w - PAD, y, pool.role, SMALL, colour=MUTED, anchor="end")
    for line in box.lines:
        y += LINE - 2
        canvas.text(x + PAD, y, line, SMALL, colour=MUTED)
    y += 10
    for replica in range(box.shown):
        _draw_replica(canvas, box, replica, x + PAD, y, w - 2 * PAD)
        y += box.replica_height + 8
    if box.hidden:
        words = f"and {box.hidden} more replicas"
        canvas.text(x + w // 2, y + 12, words, SMALL, colour=MUTED, anchor="middle")


def _draw_replica(canvas: Canvas, box: PoolBox, replica: int, x: int, y: int, w: int) -> None:
    canvas.box(x, y, w, box.replica_height, "#ffffff", 6)
    canvas.text(x + 10, y + 15, f"replica {replica}", SMALL, bold=True)
    cell = (w - 10 - 6 * box.columns) // box.columns
    for rank in range(box.rows * box.columns):
        row, column = divmod(rank, box.columns)
        left = x + 8 + column * (cell + 6)
        top = y + LINE + 6 + row * (CELL_HEIGHT + 6)
        canvas.box(left, top, cell, CELL_HEIGHT, "#f5f7fa", 4)
        first, second = box.cell_text(replica, rank)
        middle = left + cell // 2
        first_y = top + (17 if second else 25)
        canvas.text(middle, first_y, first, SMALL, anchor="middle")
        if second:
            canvas.text(middle, top + 32, second, SMALL, colour=MUTED, anchor="middle")


def _draw_handoffs(
    canvas: Canvas,
    serving: Sequence[PoolBox],
    tops: Sequence[int],
    sources: dict[PoolBox, int],
    from_x: int,
    to_x: int,
) -> None:
    """Arrows from prefill pools to the decode pools that take their KV, each in its own lane."""
    by_name = {box.review.pool.name: top for box, top in sources.items()}
    lane = 0
    for box, top in zip(serving, tops, strict=True):
        link = box.review.pool.prefill
        if link is None:
            continue
        start = by_name[link.pool] + PAD + LINE + lane * 14
        end = top + PAD + LINE // 2
        turn = to_x - 16 - lane * 10
        canvas.arrow([(to_x, start), (turn, start), (turn, end), (from_x, end)], KV_COLOUR)
        words = f"KV, {link.when}"
        canvas.text(from_x + 14, end - 6, words, SMALL, colour=KV_COLOUR)
        canvas.text(from_x + 14, end + 16, link.transport, SMALL, colour=KV_COLOUR)
        lane += 1
