"""One tier behind the KV pool: which blocks it holds, in which slots, and which goes next.

A page's life here:
1. ``add`` gives it a slot: a free one, or that of the oldest page that nobody holds, which goes;
2. once its content is in the slot (``is_ready``), ``lookup`` finds it, and ``touch`` makes it the
   youngest;
3. ``hold`` keeps its slot through a read or a write; each holder says ``release``;
4. ``drop``, or the need for its slot, ends it. One that is held is found no more, and its slot is
   free after the last release.

Only slot numbers live here; the bytes are the store's. A slot holds one block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from ..types import BlockHash
from .block import IntegrityError

TierName = Literal["host", "disk"]


@dataclass(slots=True, eq=False)
class Page:
    """One block's copy in one tier. Compared by identity."""

    tier: TierName
    name: BlockHash
    tokens: bytes
    """Packed token ids: compared at a hit, as in the pool."""
    slot: int
    checksum: int = 0
    """Of name and content."""
    is_ready: bool = False
    num_holders: int = 0


class Tier:
    """``num_slots`` slots and what is in them, oldest first."""

    def __init__(self, name: TierName, num_slots: int) -> None:
        self.name: TierName = name
        self.num_slots = num_slots
        self._pages: OrderedDict[BlockHash, Page] = OrderedDict()
        self._free = list(reversed(range(num_slots)))
        self._leaving: set[Page] = set()  # dropped, and still held

    @property
    def num_used(self) -> int:
        """Slots with a page."""
        return self.num_slots - len(self._free)

    @property
    def num_free(self) -> int:
        """Slots without one."""
        return len(self._free)

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._pages

    def lookup(self, name: BlockHash, tokens: bytes) -> Page | None:
        """The page of that name whose content is here and whose token ids are these too."""
        page = self._pages.get(name)
        return page if page is not None and page.is_ready and page.tokens == tokens else None

    def get(self, name: BlockHash) -> Page | None:
        """The page of that name, ready or not."""
        return self._pages.get(name)

    def oldest(self, count: int) -> list[Page]:
        """Up to ``count`` pages, from the one that goes first."""
        return list(islice(self._pages.values(), count))

    def touch(self, page: Page) -> None:
        """Make a page the youngest."""
        self._pages.move_to_end(page.name)

    def add(self, name: BlockHash, tokens: bytes) -> tuple[Page | None, Page | None]:
        """A new page, not ready, and the one that went for it.

        No new page where every slot is held, or where there is none.
        """
        if name in self._pages:
            raise IntegrityError(f"the {self.name} tier has a page of that name")
        gone = None
        if not self._free:
            gone = next((page for page in self._pages.values() if not page.num_holders), None)
            if gone is None:
                return None, None
            self.drop(gone)
        page = Page(self.name, name, tokens, self._free.pop())
        self._pages[name] = page
        return page, gone

    def hold(self, page: Page) -> None:
        """Keep the page's slot as it is until ``release``."""
        page.num_holders += 1

    def release(self, page: Page) -> None:
        """One holder less."""
        if page.num_holders == 0:
            raise IntegrityError(f"a page of the {self.name} tier is released but not held")
        page.num_holders -= 1
        if not page.num_holders and page in self._leaving:
            self._leaving.remove(page)
            self._free.append(page.slot)

    def drop(self, page: Page) -> bool:
        """Take a page out; ``False`` where it is out already."""
        if self._pages.get(page.name) is not page:
            return False
        del self._pages[page.name]
        if page.num_holders:
            self._leaving.add(page)
        else:
            self._free.append(page.slot)
        return True

    def pages(self) -> Iterator[Page]:
        """Every page whose slot is taken, dropped ones that are held too."""
        yield from self._pages.values()
        yield from self._leaving

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where slots, index and holders disagree."""
        slots = [*self._free, *(page.slot for page in self.pages())]
        if sorted(slots) != list(range(self.num_slots)):
            raise IntegrityError(
                f"the {self.name} tier has {self.num_slots} slots, its books name {sorted(slots)}"
            )
        if any(name != page.name for name, page in self._pages.items()):
            raise IntegrityError(f"a page of the {self.name} tier is indexed under another name")
        if any(not page.num_holders for page in self._leaving):
            raise IntegrityError(f"a dropped page of the {self.name} tier waits for no holder")
