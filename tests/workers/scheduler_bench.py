"""A scheduler whose forward pass is a counter."""

from __future__ import annotations

from inference_pio.workers.batch import ScheduledBatch
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.kv.manager import KVManager
from inference_pio.workers.scheduler import Scheduler
from inference_pio.workers.sequence import Sequence
from inference_pio.workers.types import GenerateRequest, SamplingParams


class Bench:
    """A scheduler on a small pool whose forward pass is a counter."""

    def __init__(self, num_blocks: int = 16, block_size: int = 4, **config: int | float) -> None:
        settings = {"max_num_seqs": 4, "max_batched_tokens": 16, "default_reservation": 8}
        self.config = EngineConfig.model_validate(settings | config)
        self.kv = KVManager(num_blocks, block_size, b"model", prefix_caching=False)
        self.scheduler = Scheduler(self.config, self.kv)
        self.now = 0.0

    def add(
        self,
        name: str,
        prompt: int = 4,
        max_tokens: int | None = 4,
        *,
        priority: int = 0,
        n: int = 1,
    ) -> Sequence:
        """Queue a request that comes now, with a prompt of so many tokens."""
        params = SamplingParams(max_tokens=max_tokens, n=n)
        request = GenerateRequest(name, tuple(range(prompt)), params, priority)
        sequence = Sequence.from_request(request, arrival=self.now, max_len=self.kv.capacity_tokens)
        self.scheduler.add(sequence)
        return sequence

    def step(self, finish: bool = True) -> ScheduledBatch:
        """Schedule, compute, fork, append one token where one is sampled; end what is full."""
        batch = self.scheduler.schedule(self.now)
        self.scheduler.commit(batch)
        for item in batch.sequences:
            group = [item.sequence]
            if item.samples and item.sequence.num_pending_choices:
                count = item.sequence.num_pending_choices
                group += [item.sequence.fork(index) for index in range(1, count + 1)]
                self.scheduler.fork(item.sequence, group[1:])
            for sequence in group if item.samples else ():
                sequence.append(0)
                if finish and sequence.room == 0:
                    self.scheduler.finish(sequence)
        self.scheduler.check_integrity()
        self.now += 1.0
        return batch

    def names(self, batch: ScheduledBatch) -> dict[str, int]:
        """Tokens of the step by request."""
        return {item.sequence.request_id: item.num_new_tokens for item in batch.sequences}
