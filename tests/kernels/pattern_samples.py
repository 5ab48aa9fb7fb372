"""Random batches under a pattern, and what is masked in float64: the definition, written anew."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference_pio.kernels.context import (
    ALL_PROMPT,
    NO_BLOCK,
    ContextItem,
    ForwardContext,
    build_context,
)
from inference_pio.kernels.pattern import FULL, AttentionPattern
from inference_pio.kernels.reference import ReferenceKernels

CPU = torch.device("cpu")
PART = 512
"""Keys whose softmax the native kernels compute at once: kPartKeys."""
WINDOWS = [
    AttentionPattern(window, sinks)
    for window in (1, 15, 16, 17, 64, 700)
    for sinks in (0, 1, 16, 40)
]
PAGES = [AttentionPattern(pages=1), AttentionPattern(pages=3)]
EVERYTHING = [
    FULL,
    AttentionPattern(window=5000),
    AttentionPattern(window=5000, sinks=9),
    AttentionPattern(pages=900),
]
"""Nothing is left out of sequences of the batches below."""
BATCHES: dict[str, list[tuple[int, int]]] = {
    "first token": [(0, 1)],
    "one prompt": [(0, 150)],
    "one row at a block's end": [(127, 1)],
    "one row at a block's begin": [(128, 1)],
    "mixed": [(3, 1), (0, 20), (31, 1), (16, 16), (90, 3), (300, 1), (299, 1)],
    "at the ends of parts": [(PART - 1, 1), (PART, 1), (2 * PART - 1, 2), (PART - 7, 14)],
    "behind many parts": [(5 * PART + 3, 1), (3 * PART - 5, 12)],
}


@dataclass
class PatternCase:
    """``lengths`` are computed and new tokens of each sequence, ``prompt_len`` the prompt of each.

    Slots that hold no token are NaN.
    """

    lengths: list[tuple[int, int]]
    pattern: AttentionPattern
    heads: tuple[int, int, int] = (4, 2, 24)
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    prompt_len: int = ALL_PROMPT
    seed: int = 0
    context: ForwardContext = field(init=False)
    cache: Tensor = field(init=False)
    q: Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_heads, kv_heads, dim = self.heads
        size = self.block_size
        torch.manual_seed(self.seed)
        need = [-(-(computed + new) // size) for computed, new in self.lengths]
        blocks = list(range(sum(need) + 3))
        random.Random(self.seed).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in need]
        self.context = self.context_with(self.pattern)
        self.cache = torch.randn(sum(need) + 3, 2, kv_heads, size, dim).to(self.dtype)
        q = torch.randn(self.context.query_starts[-1], num_heads, dim) * dim**-0.5
        self.q = q.to(self.dtype)
        used = torch.zeros(self.cache.shape[0], size, dtype=torch.bool)
        for length, table in zip(self.context.seq_lens, self.tables, strict=True):
            for position in range(length):
                used[table[position // size], position % size] = True
        self.clean = self.cache.clone()
        self.cache.permute(0, 3, 1, 2, 4)[~used] = float("nan")

    def context_with(
        self, pattern: AttentionPattern, tables: list[list[int]] | None = None
    ) -> ForwardContext:
        items = [
            ContextItem(table, computed, new, self.prompt_len)
            for table, (computed, new) in zip(tables or self.tables, self.lengths, strict=True)
        ]
        return build_context(items, self.block_size, CPU, pattern)

    def given_back(self, cache: Tensor) -> tuple[ForwardContext, Tensor]:
        """The context without the blocks that it hides from all new tokens, and a copy of the cache
        in which those, and the block that -1 would be in torch, are NaN."""
        tables, cache = [list(table) for table in self.tables], cache.clone()
        for table, (computed, _) in zip(tables, self.lengths, strict=True):
            for number in self.pattern.hidden_blocks(computed, self.block_size):
                cache[table[number]] = float("nan")
                table[number] = NO_BLOCK
        nothing = torch.full_like(cache[:1], float("nan"))
        return self.context_with(self.pattern, tables), torch.cat((cache, nothing))

    @functools.cached_property
    def bounds(self) -> Tensor:
        """Of every full block; of the others NaN, as nobody may read them."""
        keys = self.cache[:, 0].float()
        least, most = keys.amin(2), keys.amax(2)
        full = ~self.cache[:, 0].isnan().flatten(1).any(1)
        bounds = torch.stack((least, most), dim=1)
        bounds[~full] = float("nan")
        return bounds.to(self.dtype)

    def masked(self) -> Tensor:
        """In float64, with a loop over rows and heads."""
        num_heads, kv_heads, dim = self.heads
        out = torch.empty(self.q.shape[0], num_heads, dim, dtype=torch.float64)
        for i, table in enumerate(self.tables):
            end = self.context.seq_lens[i]
            flat = self.clean[table].double().permute(1, 2, 0, 3, 4).flatten(2, 3)
            keys_KLD, values_KLD = flat[:, :, :end]
            for row in range(*self.context.query_starts[i : i + 2]):
                position = end - (self.context.query_starts[i + 1] - row)
                q_HD = self.q[row].double()
                for head in range(num_heads):
                    kv_head = head * kv_heads // num_heads
                    group = q_HD.view(kv_heads, -1, dim)[kv_head]
                    seen = self.seen(position, group, keys_KLD[kv_head])
                    weights = (keys_KLD[kv_head][seen] @ q_HD[head]).softmax(0)
                    out[row, head] = weights @ values_KLD[kv_head][seen]
        return out.flatten(1)

    def seen(self, position: int, q_GD: Tensor, keys_LD: Tensor) -> list[int]:
        """Positions of the keys that one KV head's queries see."""
        pattern, size = self.pattern, self.block_size
        if pattern.window is not None:
            begin = position - pattern.window
            return [j for j in range(position + 1) if j > begin or j < pattern.sinks]
        own = position // size
        if pattern.pages is None or position < self.prompt_len or own < 3 + pattern.pages:
            return list(range(position + 1))
        scores = {}
        for block in range(1, own - 1):
            keys = keys_LD[block * size : (block + 1) * size]
            best = torch.maximum(q_GD * keys.amin(0), q_GD * keys.amax(0))
            scores[block] = float(best.sum())
        chosen = sorted(scores, key=lambda block: -scores[block])
        ranked = [scores[block] for block in chosen]
        # Otherwise the rounding of float32 decides, and the test says nothing.
        assert ranked[pattern.pages - 1] - ranked[pattern.pages] > 4e-6 * abs(ranked[0])
        numbers = {0, own - 1, own, *chosen[: pattern.pages]}
        return [j for j in range(position + 1) if j // size in numbers]


@functools.cache
def sample(batch: str, pattern: AttentionPattern, dtype: torch.dtype) -> tuple[PatternCase, Tensor]:
    """A case of ``BATCHES`` whose prompts have 40 tokens, and what the reference gives for it."""
    case = PatternCase(BATCHES[batch], pattern, dtype=dtype, prompt_len=40)
    return case, ReferenceKernels().plan_attention(case.context)(case.q, case.clean)


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
