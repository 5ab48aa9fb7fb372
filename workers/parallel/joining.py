"""How ranks become a group: find each other, load, connect, agree.

1. Every rank writes its machine's id into the store and counts who shares it, so that cores and
   memory are shared out.
2. Each loads its own part of the checkpoint.
3. When all have loaded, the groups are connected and warmed up.
4. Model, dtype and limits are compared, and the KV pool becomes the smallest that any rank has
   room for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from ..config import EngineConfig, KVCacheDType
from ..executor import GroupLostError
from ..loading import LoadedPart, load_part, pool_blocks
from ..model.config import DTYPES, CheckpointError
from ..model.shard import ShardSpec
from .collectives import Watch
from .groups import GridGroups
from .stage import Stage
from .store import Store

_POLL_S = 0.05
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class JoinedRank:
    """A rank that is ready to compute."""

    part: LoadedPart
    groups: GridGroups
    stage: Stage
    num_blocks: int


def join(
    config: EngineConfig, shard: ShardSpec, store: Store, address: str, watch: Watch
) -> JoinedRank:
    """Load one rank's part and join it to the others; ``address`` is this process's own.

    Raises what loading raises, ``CheckpointError`` where ranks disagree, ``GroupLostError`` where
    one is gone.
    """
    ranks_here = _ranks_here(store, shard, watch)
    part = load_part(config, shard, ranks_here=ranks_here)
    _say(store, "loaded", shard, "")
    _wait_for_all(store, "loaded", shard, watch)
    groups = GridGroups(shard, store, part.model.device, address, watch)
    try:
        num_blocks = pool_blocks(config, part, ranks_here=ranks_here)
        num_blocks = _agree(groups, part, num_blocks, config)
        stage = Stage(
            part,
            groups,
            config.parallel,
            num_blocks=num_blocks,
            block_size=config.block_size,
            kv_cache_dtype=config.kv_cache_dtype,
        )
    except BaseException:
        groups.close()
        raise
    return JoinedRank(part, groups, stage, num_blocks)


def _agree(groups: GridGroups, part: LoadedPart, num_blocks: int, config: EngineConfig) -> int:
    """The pool that every rank has room for; all ranks see the same words and decide alike."""
    digest = part.fingerprint
    names = {
        "checkpoint": [int.from_bytes(digest[i : i + 4], "big") for i in range(0, len(digest), 4)],
        "dtype": [list(DTYPES.values()).index(part.model.dtype)],
        "device": [int(part.model.device.type == "cuda")],
        "KV cache dtype": [get_args(KVCacheDType).index(config.kv_cache_dtype)],
        "block size": [config.block_size],
        "longest sequence": [part.limit],
    }
    words = [word for values in names.values() for word in values]
    found = groups.grid.all_gather(torch.tensor([*words, num_blocks], dtype=torch.int64))
    tables = [tensor.tolist() for tensor in found]
    for rank, table in enumerate(tables):
        start = 0
        for name, values in names.items():
            end = start + len(values)
            if table[start:end] != tables[0][start:end]:
                raise CheckpointError(f"rank {rank} has another {name} than rank 0")
            start = end
    return int(min(table[-1] for table in tables))


def _ranks_here(store: Store, shard: ShardSpec, watch: Watch) -> int:
    """Ranks on this machine, this one included."""
    machine = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    _say(store, "machine", shard, machine)
    _wait_for_all(store, "machine", shard, watch)
    found = [store.get(f"machine/{rank}").decode() for rank in range(shard.num_ranks)]
    return found.count(machine)


def _say(store: Store, what: str, shard: ShardSpec, value: str) -> None:
    store.set(f"{what}/{shard.rank}", value)


def _wait_for_all(store: Store, what: str, shard: ShardSpec, watch: Watch) -> None:
    """Looks again and again: a rank that never comes is the watch's business."""
    names = [f"{what}/{rank}" for rank in range(shard.num_ranks)]
    while not store.check(names):
        if watch.lost is not None:
            raise GroupLostError(watch.lost)
        time.sleep(_POLL_S)
