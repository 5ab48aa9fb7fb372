"""How much memory the KV cache may take, and giving back what is not in use."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now; on the host within the cgroup's limit, if it has one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = int(psutil.virtual_memory().available)
    limit = _cgroup_room()
    return available if limit is None else min(available, limit)


def give_back_freed() -> None:
    """Give freed memory that malloc holds back to the system, where the C library can.

    Loading allocates and frees blocks of tens of MB just below the size from which malloc maps each
    on its own, with small ones that stay in between: without this, loading Qwen3-4B left 860 MB of
    them behind.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def num_kv_blocks(
    *, bytes_per_block: int, told_bytes: int | None, free: int, share: float, most_blocks: int
) -> int:
    """Blocks of the KV pool: what was told, else ``share`` of the free memory; all in bytes.

    Never more than ``most_blocks``, which is what a full batch of the longest sequences fills.
    Raises ``ValueError`` where not one block fits.
    """
    size = int(free * share) if told_bytes is None else told_bytes
    blocks = min(size // bytes_per_block, most_blocks)
    if blocks < 1:
        raise ValueError(
            f"{size} bytes for the KV cache do not hold one block of {bytes_per_block} bytes; "
            "raise kv_cache_bytes, or lower block_size"
        )
    return blocks


def _cgroup_room() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text().strip()
    except OSError:
        return None  # not a cgroup v2, or the root, which has no limit
    return None if limit == "max" else max(0, int(limit) - int(used))
