"""Blocks that the KV pool has no room for, in host memory and behind it on a disk.

A block's life here:
1. ``put`` copies it into the host tier, as its youngest page, with a checksum;
2. all but the tier's youngest quarter is written to the disk ahead of need, as fast as the disk
   takes it: a restored prompt drives many blocks out of the pool at once. The pages stay where they
   are meanwhile, so a hit still finds them in memory;
3. ``find`` says where the blocks of a prompt lie, for a caller that holds them while it checks and
   copies them (``is_sound``, ``host_blocks``) or has them read and checked (``read_disk``);
4. a block that is put again while it is here becomes the youngest; one that is only on the disk
   gets a page in host memory again;
5. it leaves with its last page: as the oldest of the last tier, or because something is wrong with
   it. Each loss is counted by its reason, and none is an error: the block is computed again.

All but the file's own thread run in the engine's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.host_copy import pin, pinned_memory, unpin
from ..config import KVPagingConfig
from ..memory import free_bytes
from ..types import BlockHash
from .block import EvictedBlock, IntegrityError
from .page_file import PageFile, PageRead, PageWrite, page_checksum
from .tensor_words import as_tensor
from .ticket import Buffer, KVLayout
from .ticket_memory import TicketMemory
from .tier import Page, Tier, TierName

_BATCH_BYTES = 32 << 20
"""Of blocks that are moved at a time: enough that the calls cost nothing beside the copies, little
enough that a step does not wait long."""
_MOST_BATCHED = 32
_MOST_WRITTEN_AHEAD = 512
"""Pages: as many as a restored prompt of 32,768 tokens drives out of the pool at once."""


class PageStore:
    """The tiers of one engine, whose blocks look as ``layout`` says.

    ``pinned``: host memory is pinned, for a pool on a CUDA device. Raises ``ValueError`` for
    budgets that hold no block or that the machine has no room for.
    """

    def __init__(self, config: KVPagingConfig, layout: KVLayout, *, pinned: bool = False) -> None:
        self.page_bytes = layout.bytes_per_block
        self.batch = max(1, min(_MOST_BATCHED, _BATCH_BYTES // self.page_bytes))
        """Blocks that are best moved at a time."""
        self.num_spilled = 0
        """Blocks copied into the host tier, since start."""
        self.drops: Counter[str] = Counter()
        """Blocks lost, by reason."""
        self.num_reading = 0
        """Reads from the disk that have not been collected."""
        self._layout = layout
        self._budgets: dict[TierName, int] = {"host": config.host_bytes, "disk": config.disk_bytes}
        slots = {name: self._slots(name) for name in self._budgets}
        self._pages = self._host_memory(slots["host"])
        self._file = PageFile(config.folder, config.disk_bytes) if config.disk_bytes else None
        self._tiers = {name: Tier(name, count) for name, count in slots.items()}
        self._host, self._disk = self._tiers["host"], self._tiers["disk"]
        self._ahead = max(1, min(_MOST_WRITTEN_AHEAD, self._host.num_slots * 3 // 4))
        self._writing: dict[PageWrite, Page] = {}  # with the host page that is written
        batch_bytes = self.batch * self.page_bytes
        if pinned:
            pin(self._pages)
            self._memory = TicketMemory(batch_bytes, pinned_memory)
        else:
            self._memory = TicketMemory(batch_bytes)
        self._is_pinned = pinned

    def _slots(self, tier: TierName) -> int:
        budget = self._budgets[tier]
        if 0 < budget < self.page_bytes:
            raise ValueError(
                f"kv_paging.{tier}_bytes is {budget}; one KV block takes {self.page_bytes} bytes"
            )
        return budget // self.page_bytes

    def _host_memory(self, num_slots: int) -> Buffer:
        num_bytes = num_slots * self.page_bytes
        free = free_bytes(torch.device("cpu"))
        if num_bytes > free:
            raise ValueError(
                f"kv_paging.host_bytes is {self._budgets['host']}, but {free} bytes of memory are "
                "free beside the model and its KV cache; lower it"
            )
        # Written to, so that a lack of memory shows now and no step waits for the first touch.
        return np.ones((num_slots, self.page_bytes), np.uint8)

    # --- in -------------------------------------------------------------------------------------

    def missing(self, blocks: Iterable[EvictedBlock]) -> list[EvictedBlock]:
        """Those that are not in host memory; those that are become the youngest."""
        found = []
        for block in blocks:
            page = self._host.lookup(block.name, block.tokens)
            if page is None:
                found.append(block)
            else:
                self._host.touch(page)
        return found

    def put(self, blocks: Sequence[EvictedBlock], blocks_Ln2KSD: Tensor) -> None:
        """Keep the content of blocks, copied."""
        for number, block in enumerate(blocks):
            old = self._host.get(block.name)
            if old is not None:
                self._host.drop(old)
            page, gone = self._host.add(block.name, block.tokens)
            self._count_loss(gone)
            if page is None:
                self.drops["host_busy"] += 1
                continue
            content = self._pages[page.slot]
            self.as_blocks(content)[:, 0].copy_(blocks_Ln2KSD[:, number])
            page.checksum = page_checksum(page.name, content)
            page.is_ready = True
            self.num_spilled += 1
        self._write_ahead()

    def room(self, num_blocks: int) -> Tensor:
        """Contiguous memory for so many blocks, ``blocks_Ln2KSD``, of any content."""
        memory = self._memory.take(num_blocks * self.page_bytes)
        words = memory.view(self._layout.words).reshape(self._layout.shape(num_blocks))
        return as_tensor(words, self._layout.dtype)

    def _count_loss(self, gone: Page | None) -> None:
        """Count a page that went for another, where it was its block's last."""
        if gone is None or any(gone.name in tier for tier in self._tiers.values()):
            return
        late = gone.tier == "host" and self._file is not None
        self.drops["queue_full" if late else f"{gone.tier}_full"] += 1

    def _write_ahead(self) -> None:
        """Queue pages of the host tier, the oldest first, that the disk does not have."""
        if self._file is None:
            return
        for page in self._host.oldest(max(0, self._ahead - self._host.num_free)):
            if len(self._writing) >= self._ahead:
                return
            if page.name in self._disk:
                continue
            copy, gone = self._disk.add(page.name, page.tokens)
            self._count_loss(gone)
            if copy is None:
                return
            copy.checksum = page.checksum
            self._host.hold(page)
            self._disk.hold(copy)
            job = PageWrite(copy, self._pages[page.slot])
            self._writing[job] = page
            self._file.submit(job)

    # --- out ------------------------------------------------------------------------------------

    def find(self, names: Iterable[tuple[BlockHash, bytes]]) -> list[Page]:
        """Pages of the leading blocks that are here; each becomes its tier's youngest."""
        found = []
        for name, tokens in names:
            page = self._host.lookup(name, tokens) or self._disk.lookup(name, tokens)
            if page is None:
                break
            found.append(page)
        # The first block of a prompt is of use to most, so it is to go last.
        for page in reversed(found):
            self._tiers[page.tier].touch(page)
        return found

    def hold(self, page: Page) -> None:
        """Keep a page's content where it is until ``release``."""
        self._tiers[page.tier].hold(page)

    def release(self, page: Page) -> None:
        """See ``hold``."""
        self._tiers[page.tier].release(page)

    def drop(self, page: Page, reason: str) -> None:
        """Take out a page that is of no use, and count it."""
        if self._tiers[page.tier].drop(page):
            self.drops[reason] += 1

    def forget(self, names: Iterable[BlockHash]) -> None:
        """Take blocks out that nobody may hit any more."""
        for name in names:
            for tier in self._tiers.values():
                page = tier.get(name)
                if page is not None:
                    self.drop(page, "forgotten")

    def is_sound(self, page: Page) -> bool:
        """Whether a held page in host memory has its checksum."""
        return page_checksum(page.name, self._pages[page.slot]) == page.checksum

    def host_blocks(self, pages: Sequence[Page]) -> Tensor:
        """Held pages in neighbouring slots as ``blocks_Ln2KSD`` over the same memory."""
        first = pages[0].slot
        return self.as_blocks(self._pages[first : first + len(pages)].reshape(-1))

    def read_disk(self, pages: Sequence[Page]) -> PageRead:
        """Begin to read held pages, ``batch`` at most; ``collect`` says when that is done."""
        assert self._file is not None, "a page on the disk lies in the file"
        job = PageRead(tuple(pages), self._memory.take(len(pages) * self.page_bytes))
        self.num_reading += 1
        self._file.submit(job)
        return job

    def as_blocks(self, content: Buffer) -> Tensor:
        """The bytes of blocks, one behind the other, as ``blocks_Ln2KSD`` over the same memory."""
        layers, _, *rest = self._layout.shape(1)
        words = content.view(self._layout.words).reshape(-1, layers, *rest)
        return as_tensor(words, self._layout.dtype).transpose(0, 1)

    # --- the file's thread ----------------------------------------------------------------------

    def collect(self) -> None:
        """Take note of the reads and writes that have finished."""
        for job in self._file.collect() if self._file is not None else ():
            if isinstance(job, PageRead):
                job.is_done = True
                self.num_reading -= 1
            else:
                self._end_write(job)

    def _end_write(self, job: PageWrite) -> None:
        source = self._writing.pop(job)
        if job.error is None:
            job.page.is_ready = True
        else:
            # Out of host memory too: as its oldest page it would only be tried again and again.
            self.drop(job.page, job.error)
            self._host.drop(source)
        self._host.release(source)
        self._disk.release(job.page)

    def wait(self, timeout: float) -> None:
        """Return as soon as a job has finished, after ``timeout`` seconds at most."""
        if self._file is not None:
            self._file.wait(timeout)

    def close(self) -> None:
        """End the file and its thread; what was here is gone."""
        if self._file is not None:
            self._file.close()
        if self._is_pinned:
            unpin(self._pages)
            self._is_pinned = False

    # --- views ----------------------------------------------------------------------------------

    def used_bytes(self, tier: TierName) -> int:
        """What the pages of a tier take."""
        return self._tiers[tier].num_used * self.page_bytes

    @property
    def num_writing(self) -> int:
        """Pages on their way to the disk."""
        return len(self._writing)

    def check_integrity(self, held: Iterable[Page]) -> None:
        """Raise ``IntegrityError`` where budgets, tiers and queue disagree.

        ``held`` lists every page that callers hold, once for each holder.
        """
        holders = Counter(held)
        holders.update(self._writing.values())
        holders.update(job.page for job in self._writing)
        if len(self._writing) > self._ahead:
            raise IntegrityError(f"{len(self._writing)} pages are being written")
        for name, tier in self._tiers.items():
            tier.check_integrity()
            if self.used_bytes(name) > self._budgets[name]:
                raise IntegrityError(f"the {name} tier takes {self.used_bytes(name)} bytes")
            for page in tier.pages():
                if page.num_holders != holders[page]:
                    raise IntegrityError(
                        f"a page of the {name} tier counts {page.num_holders} holders, "
                        f"there are {holders[page]}"
                    )
        unwritten = {page for page in self._disk.pages() if not page.is_ready}
        if not unwritten <= {job.page for job in self._writing}:
            raise IntegrityError("a page of the disk tier was never queued")
