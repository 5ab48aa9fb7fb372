"""Any order of arrivals, steps, aborts, stalls and damage: no block ever has another's content."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ..paging_world import PAGE, World

# Few prompts, which come again and again, share beginnings and end anywhere.
PROMPTS = st.tuples(st.integers(0, 2), st.sampled_from([3, 9, 17, 22, 24]), st.integers(0, 1))
SALTS = st.sampled_from(["", "", "other"])


class PagingMachine(RuleBasedStateMachine):
    """The world of ``paging_world``, which checks every content in every step."""

    @initialize(
        num_blocks=st.integers(8, 12),
        host=st.sampled_from([1, 4, 10, 30]),
        disk=st.sampled_from([0, 5, 40]),
        budget=st.sampled_from([4, 16, 64]),
    )
    def start(self, num_blocks: int, host: int, disk: int, budget: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.world = World(
            num_blocks=num_blocks,
            host=host,
            disk=disk,
            folder=Path(self.folder.name),
            budget=budget,
        )
        self.names: list[str] = []

    @rule(shape=PROMPTS, salt=SALTS, output=st.integers(1, 6))
    def add(self, shape: tuple[int, int, int], salt: str, output: int) -> None:
        family, length, tail = shape
        prompt = [100 * family + n for n in range(length)] + [300 + tail]
        priority = tail - 1
        sequence = self.world.add(prompt, salt=salt, output=output, priority=priority)
        self.names.append(sequence.request_id)
        self.world.step()

    @rule(shapes=st.lists(PROMPTS, min_size=1, max_size=5), salt=SALTS)
    def ask(self, shapes: list[tuple[int, int, int]], salt: str) -> None:
        """Prompts, and all that is open, to the end."""
        self.go_on()
        for shape in shapes:
            self.add(shape, salt, output=1)
        self.world.run()

    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.scheduler.abort(self.names.pop(data.draw(st.integers(0, len(self.names) - 1))))

    @precondition(lambda self: self.world.scheduler.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.world.scheduler.running))
        self.world.kv.forget(sequence)
        self.world.scheduler.finish(sequence)

    @rule()
    def stall_the_disk(self) -> None:
        self.world.gate.clear()

    @rule()
    def go_on(self) -> None:
        self.world.gate.set()
        self.world.wait_for_the_disk()

    @rule(number=st.integers(0, 40), byte=st.integers(0, PAGE - 1), bit=st.integers(0, 7))
    def damage_memory(self, number: int, byte: int, bit: int) -> None:
        pages = list(self.world.store._host.pages())
        if pages:
            self.world.store._pages[pages[number % len(pages)].slot, byte] ^= 1 << bit

    @rule(number=st.integers(0, 40), byte=st.integers(0, PAGE - 1), bit=st.integers(0, 7))
    def damage_file(self, number: int, byte: int, bit: int) -> None:
        pages = list(self.world.store._disk.pages())
        if not pages:
            return
        file = self.world.store._file._file  # type: ignore[union-attr]
        place = pages[number % len(pages)].slot * PAGE + byte
        if found := os.pread(file, 1, place):
            os.pwrite(file, bytes([found[0] ^ 1 << bit]), place)

    @precondition(lambda self: self.world.store._file is not None)
    @rule(size=st.integers(0, 5 * PAGE))
    def truncate_file(self, size: int) -> None:
        os.ftruncate(self.world.store._file._file, size)  # type: ignore[union-attr]

    @invariant()
    def books_agree(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.gate.set()
        self.world.run()
        self.world.wait_for_the_disk()
        assert self.world.kv.num_used_blocks == 0
        assert not any(page.num_holders for page in self.world.store._host.pages())
        assert not any(page.num_holders for page in self.world.store._disk.pages())
        self.world.close()
        self.folder.cleanup()


PagingMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestPagingMachine = PagingMachine.TestCase
