"""Which rank goes to which node, and whether it fits. Pure.

Ray places by logical resources alone. A plan respects memory as well: where none is found, nothing
Ray does can work; where one is found but Ray may choose worse, that is a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .demand import ReplicaGroup
from .memory import RankMemory
from .nodes import NodeType, gib

EPSILON = 1e-9

Memory = Sequence[RankMemory] | None
"""Of every rank of a replica; ``None`` where the model's shapes are not known."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a replica."""

    group: ReplicaGroup
    index: int
    memory: RankMemory | None

    @property
    def uses_gpu(self) -> bool:
        return self.group.pool.num_gpus > 0

    @property
    def host_bytes(self) -> int:
        """What is known of what it takes of its node's own memory."""
        if self.memory is None:
            return 0
        return self.memory.tier + (0 if self.uses_gpu else self.memory.total)


@dataclass(slots=True)
class Node:
    """One node with what was put on it."""

    type: NodeType
    index: int
    ranks: list[Rank] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.type.name if self.type.count == 1 else f"{self.type.name} {self.index + 1}"

    @property
    def used(self) -> dict[str, float]:
        """Logical resources that its ranks reserve."""
        total: Counter[str] = Counter()
        for rank in self.ranks:
            for name, amount in rank.group.per_rank.items():
                total[name] += amount  # type: ignore[assignment]
        return dict(total)

    @property
    def host_bytes(self) -> int:
        return sum(rank.host_bytes for rank in self.ranks)

    def has_room(self, rank: Rank) -> bool:
        """Whether a rank fits beside the others, in resources and memory."""
        used = self.used
        for name, amount in rank.group.per_rank.items():
            if used.get(name, 0.0) + amount > self.type.resources.get(name, 0.0) + EPSILON:
                return False
        return self.type.memory is None or self.host_bytes + rank.host_bytes <= self.type.memory


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a file. An error ends in exit status 1."""

    key: str
    message: str
    is_error: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """Nodes with their ranks, and what did not fit."""

    nodes: tuple[Node, ...]
    problems: tuple[Problem, ...]


def place(
    groups: Sequence[tuple[ReplicaGroup, Memory]], types: Sequence[NodeType], key: str = "pools"
) -> Plan:
    """Put every replica on the nodes, the hardest to place first.

    ``key`` is the place of the pools in the file, for the problems.
    """
    nodes = [Node(kind, index) for kind in types for index in range(kind.count)]
    problems: list[Problem] = []
    hard_first = sorted(groups, key=lambda pair: _difficulty(*pair), reverse=True)
    for group, memory in hard_first:
        where = f"{key}.{group.pool.name}"
        ranks = [
            Rank(group, index, None if memory is None else memory[index])
            for index in range(group.num_ranks)
        ]
        if (reason := _never_fits(ranks, types)) is not None:
            problem = Problem(where, reason)
        elif not _put(ranks, nodes):
            problem = Problem(where, _no_room(ranks, nodes))
        else:
            continue
        if problem not in problems:
            problems.append(problem)
    problems += _gpu_problems(groups, types, key)
    problems += _crowding(groups, types)
    return Plan(tuple(nodes), tuple(problems))


def _difficulty(group: ReplicaGroup, memory: Memory) -> tuple[float, ...]:
    wanted = group.per_rank
    custom = sum(1 for name in wanted if name not in ("CPU", "GPU"))
    together = group.num_ranks if group.pool.placement == "STRICT_PACK" else 1
    size = max((rank.total for rank in memory), default=0) if memory else 0
    return (custom, wanted.get("GPU", 0) * together, wanted.get("CPU", 0) * together, size)


def _put(ranks: Sequence[Rank], nodes: Sequence[Node]) -> bool:
    """Place the ranks of one replica, or none of them."""
    strategy = ranks[0].group.pool.placement
    if strategy in ("STRICT_PACK", "PACK"):
        for node in _emptiest(nodes):
            if _put_all(ranks, [node], spread=False):
                return True
        if strategy == "STRICT_PACK":
            return False
        return _put_all(ranks, list(_emptiest(nodes)), spread=False)
    if _put_all(ranks, list(_emptiest(nodes)), spread=True):
        return True
    return strategy == "SPREAD" and _put_all(ranks, list(_emptiest(nodes)), spread=False)


def _put_all(ranks: Sequence[Rank], nodes: Sequence[Node], *, spread: bool) -> bool:
    done: list[Node] = []
    for rank in ranks:
        room = [n for n in nodes if n.has_room(rank) and not (spread and n in done)]
        if not room:
            for node in done:
                node.ranks.pop()
            return False
        room[0].ranks.append(rank)
        done.append(room[0])
    return True


def _emptiest(nodes: Sequence[Node]) -> Iterable[Node]:
    """Serve spreads replicas; nodes with the fewest ranks come first."""
    return sorted(nodes, key=lambda node: len(node.ranks))


def _never_fits(ranks: Sequence[Rank], types: Sequence[NodeType]) -> str | None:
    """Why a replica fits on no empty cluster of these nodes, with the numbers."""
    if _put(ranks, [Node(kind, index) for kind in types for index in range(kind.count)]):
        return None
    group = ranks[0].group
    together = len(ranks) if group.pool.placement == "STRICT_PACK" else 1
    ask = {name: amount * together for name, amount in group.per_rank.items()}
    size = sum(rank.host_bytes for rank in ranks) if together > 1 else ranks[0].host_bytes
    what = "a rank" if together == 1 else f"STRICT_PACK puts {together} ranks on one node: they"
    need = ", ".join(
        [f"{amount:g} {name}" for name, amount in ask.items()] + [gib(size)] * (size > 0)
    )
    have = "; ".join(_offer(kind) for kind in types) or "none"
    return f"{what} need{'s' if together == 1 else ''} {need}; the nodes have: {have}"


def _no_room(ranks: Sequence[Rank], nodes: Sequence[Node]) -> str:
    group = ranks[0].group
    ask = ", ".join(f"{amount:g} {name}" for name, amount in group.per_rank.items())
    memory = f" and {gib(ranks[0].host_bytes)}" if ranks[0].host_bytes else ""
    left = "; ".join(_left(node, group.per_rank) for node in nodes)
    return (
        f"no room for {group.name} beside the others: each of its {len(ranks)} ranks needs {ask}"
        f"{memory}; left are {left}"
    )


def _left(node: Node, names: Iterable[str]) -> str:
    used = node.used
    parts = [f"{node.type.resources.get(n, 0.0) - used.get(n, 0.0):g} {n}" for n in names]
    if node.type.memory is not None:
        parts.append(gib(node.type.memory - node.host_bytes))
    return f"{node.name}: {', '.join(parts)}"


def _offer(kind: NodeType) -> str:
    parts = [f"{amount:g} {name}" for name, amount in kind.resources.items()]
    if kind.memory is not None:
        parts.append(gib(kind.memory))
    return f"{kind.count} x {kind.name} with {', '.join(parts) or 'nothing'}"


def _gpu_problems(
    groups: Sequence[tuple[ReplicaGroup, Memory]], types: Sequence[NodeType], key: str
) -> list[Problem]:
    sizes = [kind.gpu_memory for kind in types if kind.resources.get("GPU", 0) > 0]
    if not sizes or None in sizes:
        return []
    largest = max(size for size in sizes if size is not None)
    problems = []
    for group, memory in groups:
        if group.pool.num_gpus <= 0 or memory is None or group.index:
            continue
        most = max(rank.weights + (rank.kv or 0) for rank in memory)
        if most > largest * max(1.0, group.pool.num_gpus):
            problems.append(
                Problem(
                    f"{key}.{group.pool.name}",
                    f"a rank holds {gib(most)} of weights and KV; the largest GPU has "
                    f"{gib(largest)}",
                )
            )
    return problems


def _crowding(
    groups: Sequence[tuple[ReplicaGroup, Memory]], types: Sequence[NodeType]
) -> list[Problem]:
    """Node types on which Ray, which does not see memory, may put more than they hold."""
    ranks = [
        Rank(group, index, memory[index])
        for group, memory in groups
        if memory is not None
        for index in range(group.num_ranks)
    ]
    ranks.sort(key=lambda rank: rank.host_bytes, reverse=True)
    problems = []
    for kind in types:
        if kind.memory is None or sum(other.count for other in types) == 1:
            continue
        blind = Node(NodeType(kind.name, 1, kind.resources), 0)
        for rank in ranks:
            if blind.has_room(rank):
                blind.ranks.append(rank)
        if blind.host_bytes > kind.memory:
            names = Counter(rank.group.pool.name for rank in blind.ranks)
            crowd = ", ".join(f"{count} x {name}" for name, count in names.items())
            problems.append(
                Problem(
                    f"nodes.{kind.name}",
                    f"Ray places by CPUs, GPUs and resources, not by memory: {crowd} may meet on "
                    f"one node, {gib(blind.host_bytes)} of {gib(kind.memory)}; raise num_cpus, or "
                    "give the pools resources that fewer of them share",
                    is_error=False,
                )
            )
    return problems
