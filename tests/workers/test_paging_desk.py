"""Spills and restores, one thing going wrong at a time; contents are checked in every step."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inference_pio.workers.kv.block import IntegrityError
from inference_pio.workers.paging_desk import DEADLINE_S

from .paging_world import BLOCK, PAGE, World

MakeWorld = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeWorld]:
    made: list[World] = []

    def build(**sizes: Any) -> World:
        made.append(World(**{"num_blocks": 10, "host": 40, "folder": tmp_path} | sizes))
        return made[-1]

    yield build
    for world in made:
        world.close()


def family(number: int, blocks: int = 6) -> list[int]:
    """A prompt of so many full blocks and one token, which shares nothing with other families."""
    return [1000 * number + position for position in range(blocks * BLOCK + 1)]


def fill(world: World, count: int = 8) -> None:
    """Prompts one after another, the first of which are then out of the pool and of host memory
    where that is small."""
    for number in range(count):
        world.ask(family(number))
        world.wait_for_the_disk()


def test_a_hit_is_restored_and_counted(make: MakeWorld) -> None:
    world = make()
    fill(world)
    before = world.num_computed
    sequence = world.ask(family(0))
    assert world.num_computed - before == 1
    assert sequence.num_cached_tokens == 6 * BLOCK
    assert world.desk.hit_tokens == {"host": 6 * BLOCK}
    assert world.desk.ends == {"done": 1}


def test_a_hit_on_the_disk_is_read_by_the_thread(make: MakeWorld) -> None:
    world = make(host=12, disk=60)
    fill(world)
    before = world.num_computed
    world.ask(family(0))
    assert world.num_computed - before == 1
    assert world.desk.hit_tokens == {"disk": 6 * BLOCK}


def test_tiers_go_on_where_the_pool_ends(make: MakeWorld) -> None:
    world = make(num_blocks=14)
    world.ask(family(0))
    world.ask(family(1, blocks=9))  # evicts the tail of the one before
    before = world.num_computed
    sequence = world.ask(family(0))
    assert 0 < world.desk.hit_tokens["host"] < 6 * BLOCK
    assert sequence.num_cached_tokens == 6 * BLOCK
    assert world.num_computed - before == 1


def test_another_salt_does_not_hit(make: MakeWorld) -> None:
    world = make()
    fill(world)
    before = world.num_computed
    world.ask(family(0), salt="another tenant")
    assert world.num_computed - before == 6 * BLOCK + 1
    assert not world.desk.hit_tokens


def test_what_a_failure_may_have_spoilt_is_forgotten(make: MakeWorld) -> None:
    world = make()
    fill(world)
    spoilt = world.add(family(0))
    world.step()
    world.kv.forget(spoilt)
    world.scheduler.finish(spoilt)
    fill(world, 1)
    assert world.store.drops["forgotten"] == 6
    assert world.desk.ends == {"done": 1}  # of the spoilt one


def test_blocks_evicted_in_the_same_step_are_found(make: MakeWorld) -> None:
    """The running sequence takes the very blocks that the head of the queue hopes for."""
    world = make(num_blocks=14)
    world.ask(family(0))
    running = world.add(family(1, blocks=1), output=40)
    world.step()
    while world.kv._pool.num_free > 6:  # until it takes the first block of the prompt above
        world.step()
    while world.kv._pool._empty or running.num_computed_tokens % BLOCK:
        world.step()
    sequence = world.add(family(0))
    world.run()
    assert sequence.num_cached_tokens == 6 * BLOCK


@pytest.mark.parametrize("bit", [0, 7])
def test_a_bit_that_flips_in_memory_costs_its_block(make: MakeWorld, bit: int) -> None:
    world = make()
    fill(world)
    damaged = world.store._host.oldest(100)
    for page in damaged:
        world.store._pages[page.slot, PAGE - 1] ^= 1 << bit
    before = world.num_computed
    sequence = world.ask(family(0))
    assert world.num_computed - before == 6 * BLOCK + 1
    assert sequence.num_cached_tokens == 0
    assert world.store.drops["checksum"] == 1
    assert world.desk.ends == {"damaged": 1}


def test_a_damaged_block_behind_sound_ones_costs_only_what_follows(make: MakeWorld) -> None:
    world = make()
    fill(world)
    sequence = world.add(family(0))
    third = list(world.kv.names_behind(sequence))[2]
    page = world.store.find([third])[0]
    world.store._pages[page.slot, 5] ^= 1
    world.run()
    assert sequence.num_cached_tokens == 2 * BLOCK
    assert world.store.drops["checksum"] == 1


def _flip(world: World, file: int) -> None:
    for place in range(10, os.fstat(file).st_size, PAGE):
        os.pwrite(file, bytes([os.pread(file, 1, place)[0] ^ 1]), place)


def _truncate(world: World, file: int) -> None:
    os.ftruncate(file, 0)


def _unreadable(world: World, file: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), file)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(_flip, "checksum"), (_truncate, "truncated"), (_unreadable, "read_failed")],
)
def test_a_damaged_file_costs_time_and_nothing_else(
    make: MakeWorld, damage: Callable[[World, int], None], reason: str
) -> None:
    world = make(host=12, disk=60)
    fill(world)
    assert world.store._file is not None
    damage(world, world.store._file._file)
    before = world.num_computed
    world.ask(family(0))
    assert world.num_computed - before == 6 * BLOCK + 1
    assert world.store.drops[reason] == 1
    assert world.desk.ends == {"damaged": 1}


def test_a_full_disk_loses_blocks_and_nothing_else(make: MakeWorld) -> None:
    world = make(host=12, disk=60)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, hard))
    try:
        fill(world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert world.store.drops["no_room"] > 0
    assert world.store.used_bytes("disk") <= 3 * PAGE
    world.ask(family(0))


def test_a_folder_that_vanishes_costs_nothing(make: MakeWorld, tmp_path: Path) -> None:
    world = make(host=12, disk=60, folder=tmp_path / "pages")
    shutil.rmtree(tmp_path / "pages")
    fill(world)
    world.ask(family(0))
    assert world.desk.hit_tokens == {"disk": 6 * BLOCK}


def test_the_disk_has_a_budget_and_loses_its_oldest(make: MakeWorld) -> None:
    world = make(host=4, disk=9)
    fill(world)
    assert world.store.drops["disk_full"] > 0
    assert world.store.used_bytes("disk") == 9 * PAGE
    world.ask(family(0))
    assert not world.desk.ends


def test_what_the_disk_cannot_take_in_time_is_lost_and_counted(make: MakeWorld) -> None:
    world = make(host=8, disk=60)
    world.gate.clear()
    for number in range(6):
        world.ask(family(number))
    assert world.store.num_writing == 6  # of 8 pages three quarters are written ahead
    assert world.store.drops["queue_full"] > 0


def stalled(make: MakeWorld, **options: Any) -> tuple[World, Any]:
    """A sequence whose blocks are being read from a disk that does not answer."""
    world = make(host=12, disk=60, **options)
    fill(world)
    world.gate.clear()
    sequence = world.add(family(0))
    world.step()
    assert sequence.is_awaiting
    return world, sequence


def test_others_go_on_while_the_disk_is_waited_for(make: MakeWorld) -> None:
    world, sequence = stalled(make)
    other = world.add([5, 6, 7], output=3)
    for _ in range(4):
        world.step()
    assert other.room == 0
    assert sequence.is_awaiting
    world.gate.set()
    world.run()
    assert sequence.num_cached_tokens == 6 * BLOCK


def test_a_request_that_ends_while_its_blocks_are_read_leaves_nothing(make: MakeWorld) -> None:
    world, sequence = stalled(make)
    world.scheduler.abort(sequence.request_id)
    world.check()
    assert world.desk.ends == {"released": 1}
    assert not world.desk.has_work
    for number in range(20, 26):  # its pages may go to others before the late read is there
        world.ask(family(number))
    world.gate.set()
    world.wait_for_the_disk()
    world.ask(family(0))
    assert world.kv.num_used_blocks == 0


def test_a_preempted_restore_begins_anew(make: MakeWorld) -> None:
    world, sequence = stalled(make)
    urgent = world.add(family(9, blocks=8), priority=-5)
    world.step()
    assert sequence.num_preemptions == 1
    assert world.desk.ends == {"released": 1}
    world.gate.set()
    world.run()
    assert urgent.room == sequence.room == 0
    assert world.desk.ends == {"released": 1, "done": 1}


def test_a_disk_that_does_not_answer_is_given_up(
    make: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, sequence = stalled(make, prefill_rate=BLOCK)
    monkeypatch.setattr(world.desk._open[sequence], "deadline", 0.0)
    world.step()
    assert world.desk.ends == {"deadline": 1}
    world.gate.set()
    world.run()
    assert sequence.num_cached_tokens == 0
    world.ask(family(1))
    assert world.desk.ends == {"deadline": 1, "slower": 1}, "it is left alone for a while"
    assert DEADLINE_S > 1


def test_a_block_evicted_again_while_it_is_written_is_found(make: MakeWorld) -> None:
    world = make(host=24, disk=60)
    world.gate.clear()
    for number in range(3):
        world.ask(family(number))
    written = {page.name for page in world.store._writing.values()}
    sequence = world.ask(family(0))
    assert written & set(sequence.block_hashes)
    assert world.desk.hit_tokens == {"host": 6 * BLOCK}
    world.ask(family(1))  # evicts them again
    world.gate.set()
    world.wait_for_the_disk()
    assert world.ask(family(0)).num_cached_tokens == 6 * BLOCK


def test_a_preempted_sequence_is_swapped_in(make: MakeWorld) -> None:
    world = make()
    sequence = world.add(family(0), output=8)
    world.step()
    world.add(family(1, blocks=9), priority=-5)
    world.run()
    assert sequence.num_preemptions == 1
    assert world.desk.hit_tokens["host"] >= 5 * BLOCK


def test_computing_is_preferred_where_it_is_faster(make: MakeWorld) -> None:
    world = make(prefill_rate=1e12)
    fill(world)
    world.ask(family(0))  # tried once: nothing was measured yet
    world.ask(family(1))
    assert world.desk.ends == {"done": 1, "slower": 1}


def test_a_step_restores_no_more_than_it_computes(make: MakeWorld) -> None:
    world = make(budget=2 * BLOCK)
    fill(world)
    sequence = world.add(family(0))
    seen = []
    while sequence.room:
        world.step()
        seen.append(sequence.num_computed_tokens // BLOCK)
    assert seen[:3] == [2, 4, 6]


def test_the_check_finds_a_page_that_nobody_lets_go(make: MakeWorld) -> None:
    world = make()
    fill(world)
    world.store.hold(world.store._host.oldest(1)[0])
    with pytest.raises(IntegrityError, match="counts 1 holders, there are 0"):
        world.desk.check_integrity()
