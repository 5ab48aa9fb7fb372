"""The groups that a rank belongs to, and what each is for."""

from __future__ import annotations

import torch

from ..model.shard import ShardSpec
from .collectives import Group, Watch
from .store import Store


class GridGroups:
    """Every group of one rank, connected and warmed up.

    ``grid`` joins all ranks on the host, for commands and KV blocks; ``tensor`` those of the same
    stage, ``before`` and ``after`` a rank and its twins in the neighbouring stages (the earlier is
    rank 0 of the pair), ``logits`` rank 0 and the last stage. ``None`` where there is nobody else.
    """

    def __init__(
        self,
        shard: ShardSpec,
        store: Store,
        device: torch.device,
        address: str,
        watch: Watch,
    ) -> None:
        self._all: list[Group] = []
        tp, pp, size = shard.tp_rank, shard.pp_rank, shard.tp_size

        def join(name: str, members: list[int], where: torch.device) -> Group | None:
            if shard.rank not in members or len(members) == 1:
                return None
            place = members.index(shard.rank)
            group = Group(store, name, place, len(members), where, address, watch)
            self._all.append(group)
            return group

        # Everybody joins in the same order, so that nobody waits in a circle.
        grid = join("grid", list(range(shard.num_ranks)), torch.device("cpu"))
        assert grid is not None, "a grid has more than one rank"
        self.grid = grid
        self.tensor = join(f"tensor{pp}", [pp * size + r for r in range(size)], device)
        pairs = [
            join(f"pipe{stage}.{tp}", [stage * size + tp, (stage + 1) * size + tp], device)
            for stage in range(shard.pp_size - 1)
        ]
        self.before = pairs[pp - 1] if pp > 0 else None
        self.after = pairs[pp] if pp < shard.pp_size - 1 else None
        last = [(shard.pp_size - 1) * size + r for r in range(size)]
        self.logits = self.tensor if shard.pp_size == 1 else join("logits", [0, *last], device)

    def close(self) -> None:
        """Leave them all."""
        for group in self._all:
            group.close()
