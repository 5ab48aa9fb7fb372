"""A real scheduler, pool, cache and tiers, driven without a model.

What a model would compute is a number for each token that depends on all tokens up to it and on the
cache salt, so a block with the content of another one is seen wherever it is used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from inference_pio.workers.config import EngineConfig, KVPagingConfig
from inference_pio.workers.kv.block import pack_tokens
from inference_pio.workers.kv.manager import KVManager
from inference_pio.workers.kv.page_store import PageStore
from inference_pio.workers.kv.ticket import KVLayout
from inference_pio.workers.model.cache import KVCache
from inference_pio.workers.model.config import ModelConfig
from inference_pio.workers.paging_desk import PagingDesk
from inference_pio.workers.scheduler import Scheduler
from inference_pio.workers.sequence import Sequence, SequenceStatus
from inference_pio.workers.types import GenerateRequest, SamplingParams

from .conftest import TINY

BLOCK = 4
FINGERPRINT = bytes(range(32))
SHAPES = ModelConfig.from_dict(TINY | {"num_hidden_layers": 2, "head_dim": 8}, "tests")
LAYOUT = KVLayout(
    FINGERPRINT, "float32", SHAPES.num_layers, SHAPES.num_kv_heads, SHAPES.head_dim, BLOCK
)
PAGE = LAYOUT.bytes_per_block


class CacheExecutor:
    """The blocks of an executor whose tokens are computed by :class:`World`."""

    vocab_size = 0

    def __init__(self, num_blocks: int) -> None:
        cpu = torch.device("cpu")
        self.cache = KVCache(SHAPES, num_blocks, BLOCK, torch.float32, cpu)

    def copy_blocks(self, pairs: Any) -> None:
        self.cache.copy_blocks(pairs)

    def read_blocks(self, block_ids: Any, out_Ln2KSD: Tensor) -> None:
        self.cache.read_blocks(block_ids, out_Ln2KSD)

    def write_blocks(self, block_ids: Any, blocks_Ln2KSD: Tensor) -> None:
        self.cache.write_blocks(block_ids, blocks_Ln2KSD)

    def forward(self, inputs: Any) -> Tensor:
        raise AssertionError("nothing is computed here")

    def logits(self, rows: Any) -> Tensor:
        raise AssertionError("nothing is computed here")

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class World:
    """Steps as the engine's, with every block's content checked in each."""

    def __init__(
        self,
        *,
        num_blocks: int,
        host: int,
        disk: int = 0,
        folder: Path | None = None,
        budget: int = 32,
        prefill_rate: float | None = None,
    ) -> None:
        """``host`` and ``disk`` are the tiers' sizes in blocks."""
        paging = KVPagingConfig(host_bytes=host * PAGE, disk_bytes=disk * PAGE, folder=folder)
        config = EngineConfig(
            block_size=BLOCK,
            max_num_seqs=4,
            max_batched_tokens=budget,
            default_reservation=2,
            kv_paging=paging,
        )
        self.executor = CacheExecutor(num_blocks)
        self.kv = KVManager(num_blocks, BLOCK, FINGERPRINT, keep_evictions=True)
        self.scheduler = Scheduler(config, self.kv)
        self.store = PageStore(paging, LAYOUT)
        self.desk = PagingDesk(
            self.executor,
            self.scheduler,
            self.kv,
            self.store,
            tokens_per_step=budget,
            prefill_rate=lambda: prefill_rate,
        )
        self.scheduler.await_restored = self.desk.begin
        self.scheduler.on_release = self.desk.release
        self.gate = threading.Event()
        """Closed, the disk's thread waits before each job."""
        self.gate.set()
        if self.store._file is not None:
            self._gate_the_file(self.store._file)
        self.num_computed = 0
        """Tokens computed in all steps."""
        self._number = 0

    def _gate_the_file(self, file: Any) -> None:
        plain = file._do

        def gated(job: Any) -> None:
            self.gate.wait(60)
            plain(job)

        file._do = gated

    def add(
        self, prompt: Items[int], *, salt: str = "", output: int = 1, priority: int = 0
    ) -> Sequence:
        self._number += 1
        request = GenerateRequest(
            str(self._number),
            tuple(prompt),
            SamplingParams(max_tokens=output),
            cache_salt=salt,
            priority=priority,
        )
        sequence = Sequence.from_request(request, arrival=float(self._number), max_len=10_000)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        batch = self.scheduler.schedule(0.0)
        self.desk.spill()
        self.executor.copy_blocks(batch.block_copies)
        for item in batch.sequences:
            assert item.start == item.sequence.num_computed_tokens
            self.check_content(item.sequence)
            self._compute(item.sequence, item.start + item.num_new_tokens)
            self.num_computed += item.num_new_tokens
        self.scheduler.commit(batch)
        for item in batch.sequences:
            sequence = item.sequence
            if sequence.num_uncomputed_tokens == 0:
                sequence.append(7 + sequence.num_tokens % 5)
                if sequence.room == 0:
                    self.scheduler.finish(sequence)
        if self.gate.is_set():
            self.wait_for_the_disk()
        self.desk.advance(idle=not batch.sequences)
        self.check()

    def check(self) -> None:
        for sequence in self.scheduler.running:
            self.check_content(sequence)
        awaiting = {s for s in self.scheduler.running if s.is_awaiting}
        assert awaiting == set(self.desk.sequences)
        self.scheduler.check_integrity()
        self.desk.check_integrity()
        assert self.store.used_bytes("host") <= self.store._budgets["host"]
        assert self.store.used_bytes("disk") <= self.store._budgets["disk"]

    def run(self) -> None:
        """To the end of all work."""
        deadline = time.monotonic() + 60
        while self.scheduler.has_work or self.desk.has_work:
            self.step()
            assert time.monotonic() < deadline, "no progress"
        assert self.scheduler.is_empty

    def wait_for_the_disk(self) -> None:
        """Until its thread has nothing to do, so that every run of a test goes the same way."""
        while self.store.num_writing or self.store.num_reading:
            self.store.wait(10)
            self.store.collect()
        self.check()

    def ask(self, prompt: Items[int], **options: Any) -> Sequence:
        """Run one sequence to its end."""
        sequence = self.add(prompt, **options)
        self.run()
        assert sequence.status is SequenceStatus.FINISHED
        return sequence

    def close(self) -> None:
        self.gate.set()
        self.desk.close()
        assert self.store._file is None or not self.store._file.is_alive

    # --- content --------------------------------------------------------------------------------

    def _values(self, sequence: Sequence, start: int, end: int) -> Tensor:
        salt = sequence.cache_salt.encode()
        return torch.tensor(
            [
                float(1 + crc32(salt + pack_tokens(sequence.token_ids[: position + 1])) % 2**23)
                for position in range(start, end)
            ]
        )

    def _compute(self, sequence: Sequence, end: int) -> None:
        start = sequence.num_computed_tokens
        for position, value in zip(
            range(start, end), self._values(sequence, start, end), strict=True
        ):
            block = sequence.block_table[position // BLOCK]
            self.executor.cache.blocks_LN2KSD[:, block, :, :, position % BLOCK] = value

    def check_content(self, sequence: Sequence) -> None:
        end = sequence.num_computed_tokens
        if end == 0:
            return
        table = sequence.block_table[: -(-end // BLOCK)]
        blocks = self.executor.cache.blocks_LN2KSD[:, table]  # L n 2 K S D
        tokens = blocks.permute(1, 4, 0, 2, 3, 5).flatten(0, 1)[:end].flatten(1)
        expected = self._values(sequence, 0, end)
        assert torch.equal(tokens, expected[:, None].expand_as(tokens)), "wrong KV"
