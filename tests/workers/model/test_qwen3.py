"""Parity with transformers on random checkpoints of odd shapes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from inference_pio.kernels.context import ContextItem, build_context
from inference_pio.kernels.native.library import cpu_flags, usable
from inference_pio.workers.model.qwen3 import Qwen3Model

MakeCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
BLOCK = 16
FP32_TOLERANCE = 2e-4
BF16_TOLERANCE = 0.05

NATIVE = [f"native:{name}" for name in usable(cpu_flags())]

SHAPES: dict[str, dict[str, Any]] = {
    "6/3 heads of 24, tied": {},
    "5/1 heads of 32, untied, biases": {
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_size": 100,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "4/2 heads of 80, rope_parameters": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 80,
        "hidden_size": 130,
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    },
}


class Runner:
    """Runs sequences through our model in given chunks, with scattered blocks."""

    def __init__(self, folder: Path, dtype: torch.dtype, num_blocks: int = 64) -> None:
        self.model = Qwen3Model.load(folder, dtype=dtype, device=CPU)
        self.cache = self.model.new_cache(num_blocks, BLOCK)
        # What an earlier owner may have left behind.
        self.cache.blocks_LN2KSD.fill_(float("nan"))
        self.free = list(range(num_blocks))
        random.Random(1).shuffle(self.free)

    def table(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // BLOCK))]

    def step(self, parts: Sequence[tuple[list[int], int, Tensor]]) -> list[Tensor]:
        """Logprobs of each part's rows; a part is (block table, computed, new ids)."""
        items = [ContextItem(table, computed, len(ids)) for table, computed, ids in parts]
        context = build_context(items, BLOCK, CPU)
        hidden = self.model.forward(torch.cat([ids for *_, ids in parts]), context, self.cache)
        logprobs = self.model.logits(hidden).log_softmax(-1)
        starts = context.query_starts
        return [logprobs[starts[i] : starts[i + 1]] for i in range(len(parts))]

    def run(self, sequences: Sequence[Tensor], chunks: Sequence[Sequence[int]]) -> list[Tensor]:
        """All sequences side by side, each in its own chunks."""
        tables = [self.table(len(ids)) for ids in sequences]
        outcomes: list[list[Tensor]] = [[] for _ in sequences]
        done = [0] * len(sequences)
        for step in range(max(map(len, chunks))):
            active = [i for i, sizes in enumerate(chunks) if step < len(sizes)]
            parts = [
                (tables[i], done[i], sequences[i][done[i] : done[i] + chunks[i][step]])
                for i in active
            ]
            for i, rows in zip(active, self.step(parts), strict=True):
                outcomes[i].append(rows)
                done[i] += len(rows)
        return [torch.cat(rows) for rows in outcomes]


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(211, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def oracle(folder: Path, sequences: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype)
    return [model(ids[None]).logits[0].float().log_softmax(-1) for ids in sequences]


def worst(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(**SHAPES[request.param])


@pytest.mark.parametrize("kernels", ["torch", "reference", *NATIVE])
def test_prompt_lengths_around_block_and_chunk_edges(
    folder: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", kernels)
    sequences = [prompt(n, n) for n in (1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 257)]
    runner = Runner(folder, torch.float32)
    alone = [runner.run([ids], [[len(ids)]])[0] for ids in sequences[:10]]
    alone += [Runner(folder, torch.float32).run([ids], [[len(ids)]])[0] for ids in sequences[10:]]
    assert worst(alone, oracle(folder, sequences, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.parametrize("seed", range(3))
def test_mixed_batches_of_chunks_and_decode_rows(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    sequences = [prompt(rng.randint(1, 90), i) for i in range(7)]
    chunks = []
    for ids in sequences:
        sizes: list[int] = []
        while sum(sizes) < len(ids):
            sizes.append(min(rng.choice([1, 1, 1, 2, 15, 16, 17, 40]), len(ids) - sum(sizes)))
        chunks.append(sizes)
    got = Runner(folder, torch.float32).run(sequences, chunks)
    assert worst(got, oracle(folder, sequences, torch.float32)) <= FP32_TOLERANCE


def test_a_sequence_does_not_see_its_neighbours(folder: Path) -> None:
    ids = prompt(40)
    chunks = [20] + [1] * 20
    alone = Runner(folder, torch.float32).run([ids], [chunks])
    for others in ([prompt(50, 1)], [prompt(30, 2), prompt(200, 3), prompt(21, 4)]):
        sequences = [ids, *others]
        sizes = [chunks, *([len(o) - 9] + [1] * 9 for o in others)]
        together = Runner(folder, torch.float32).run(sequences, sizes)
        assert worst(together[:1], alone) <= FP32_TOLERANCE


def test_a_neighbours_nan_stays_with_it(folder: Path) -> None:
    ids, chunks = prompt(24), [20, 1, 1, 1, 1]
    alone = Runner(folder, torch.float32).run([ids], [chunks])
    runner = Runner(folder, torch.float32)
    runner.model.embedding = runner.model.embedding.clone()
    poison = next(token for token in range(211) if token not in ids)
    runner.model.embedding[poison] = float("nan")
    bad = torch.full((24,), poison)
    got = runner.run([bad, ids], [chunks, chunks])
    assert got[0].isnan().all()
    assert worst(got[1:], alone) <= FP32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(
    make_checkpoint: MakeCheckpoint, dtype: torch.dtype
) -> None:
    folder = make_checkpoint(initializer_range=0.06, head_dim=32)
    sequences = [prompt(n, n) for n in (5, 33, 130)]
    chunks = [[5], [17] + [1] * 16, [64, 60, 1, 1, 1, 1, 1, 1]]
    got = Runner(folder, dtype).run(sequences, chunks)
    assert worst(got, oracle(folder, sequences, torch.float32)) <= BF16_TOLERANCE
    assert worst(got, oracle(folder, sequences, dtype)) <= BF16_TOLERANCE


def test_positions_beyond_8k(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(num_hidden_layers=2)
    ids = prompt(8300)
    sizes = [2048, 2048, 2048, 2047, 2] + [90] + [1] * 17
    assert sum(sizes) == 8300
    got = Runner(folder, torch.float32, num_blocks=600).run([ids], [sizes])
    expected = oracle(folder, [ids], torch.float32)
    assert worst([got[0][8000:]], [expected[0][8000:]]) <= FP32_TOLERANCE


@pytest.mark.parametrize("offset", [8192, 40_900, 262_000])
def test_far_positions_keep_relative_distances(
    make_checkpoint: MakeCheckpoint, offset: int
) -> None:
    """RoPE is relative: the same tokens further along give the same logits."""
    runner = Runner(make_checkpoint(max_position_embeddings=262_144), torch.float32)
    ids = prompt(60)
    context = build_context([ContextItem(runner.table(60), 0, 60)], BLOCK, CPU)
    outcomes = []
    for shift in (0, offset):
        shifted = dataclasses.replace(context, positions_T=context.positions_T + shift)
        hidden = runner.model.forward(ids, shifted, runner.cache)
        outcomes.append(runner.model.logits(hidden).log_softmax(-1))
    assert worst(outcomes[:1], outcomes[1:]) <= FP32_TOLERANCE


def test_sequences_beyond_the_limit_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    model = Qwen3Model.load(make_checkpoint(), dtype=None, device=CPU, max_positions=20)
    cache = model.new_cache(4, BLOCK)
    context = build_context([ContextItem([0, 1], 0, 21)], BLOCK, CPU)
    with pytest.raises(ValueError, match="21 tokens is past the model's 20 positions"):
        model.forward(prompt(21), context, cache)


def test_a_context_of_another_block_size_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    model = Qwen3Model.load(make_checkpoint(), dtype=None, device=CPU)
    context = build_context([ContextItem([0], 0, 2)], 8, CPU)
    with pytest.raises(ValueError, match="blocks of 8 tokens, the cache has 16"):
        model.forward(prompt(2), context, model.new_cache(4, BLOCK))
