"""What ``inference-pio check`` prints: pools, nodes, problems."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from ..config import ServiceConfig
from .nodes import gib
from .plan import Node
from .review import PoolReview, Review


def print_review(review: Review, console: Console) -> None:
    """Everything about a file, the problems last."""
    console.print(f"[bold]{review.path}[/]: {review.kind}")
    if review.pools:
        console.print(_pools(review))
    if review.plan is not None and review.is_sound:
        console.print(_nodes(review.plan.nodes))
    for problem in review.problems:
        mark = "[bold red]error[/]" if problem.is_error else "[bold yellow]warning[/]"
        console.print(f"{mark} {review.path}:", end=" ")
        console.print(f"{problem.key}: {problem.message}", markup=False, soft_wrap=True)
    if review.is_sound:
        console.print("[bold green]ok[/]")


def _pools(review: Review) -> Table:
    """A column for each pool, so that long names have room."""
    assert review.config is not None
    table = Table(title="pools", title_justify="left", title_style="bold")
    table.add_column("")
    facts = []
    for pool in review.pools:
        table.add_column(pool.pool.name, overflow="fold")
        facts.append(_facts(pool, review.config))
    for label in facts[0]:
        table.add_row(label, *(column[label] for column in facts))
    return table


def _facts(review: PoolReview, config: ServiceConfig) -> dict[str, str]:
    pool, parallel = review.pool, config.engine_of(review.pool).parallel
    ranks = str(parallel.num_ranks)
    if parallel.num_ranks > 1:
        ranks += f": TP{parallel.tensor} x PP{parallel.pipeline}, {pool.placement}"
    reserved = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    weights, kv = _sizes(review)
    return {
        "role": pool.role,
        "model": review.model,
        "modes": "-" if pool.role == "prefill" else ", ".join(pool.modes),
        "KV from": "-" if pool.prefill is None else f"{pool.prefill.pool}, {pool.prefill.when}",
        "replicas": str(pool.replicas),
        "ranks": ranks,
        "a rank reserves": ", ".join(f"{n:g} {name}" for name, n in reserved.items() if n) or "-",
        "attention": config.engine_of(pool).attention.label,
        "weights a rank": weights,
        "KV a rank": kv,
    }


def _sizes(pool: PoolReview) -> tuple[str, str]:
    if pool.memory is None:
        return "unknown", "unknown"
    weights = max(rank.weights for rank in pool.memory)
    kv = [rank.kv for rank in pool.memory if rank.kv is not None]
    return gib(weights), gib(max(kv)) if kv else "a share"


def _nodes(nodes: tuple[Node, ...]) -> Table:
    table = Table(title="nodes", title_justify="left", title_style="bold")
    for column in ("node", "holds", "reserved"):
        table.add_column(column)
    table.add_column("memory needed", justify="right")
    table.add_column("of", justify="right")
    for node in nodes:
        held = Counter(rank.group.pool.name for rank in node.ranks)
        what = ", ".join(f"{count} x {name}" for name, count in held.items()) or "no engine"
        reserved = ", ".join(
            f"{amount:g}/{node.type.resources.get(name, 0):g} {name}"
            for name, amount in node.used.items()
        )
        memory = "unknown" if node.type.memory is None else gib(node.type.memory)
        table.add_row(node.name, what, reserved or "-", _needed(node), memory)
    return table


def _needed(node: Node) -> str:
    """``≥`` where an engine takes a share of what is free beyond that, or its model is unknown."""
    memories = [rank.memory for rank in node.ranks]
    exact = all(m is not None and m.kv is not None for m in memories)
    return gib(node.host_bytes) if exact else f"≥ {gib(node.host_bytes)}"
