"""Every grid against the engine of one process: the same text, log-probabilities and KV blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_pio import LLM, SamplingParams
from inference_pio.kernels.context import ContextItem
from inference_pio.workers.batch import BatchInputs
from inference_pio.workers.engine import Engine
from inference_pio.workers.parallel import stage
from inference_pio.workers.parallel.micro_batches import split_step
from inference_pio.workers.types import BlockId

MakeCheckpoint = Callable[..., Path]
MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

TOLERANCE = 1e-3
GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "ignore_eos": True,
    "loop_guard": False,
    "logprobs": 3,
}
SAMPLED: dict[str, Any] = GREEDY | {"temperature": 1.0, "seed": 5}
SHAPES: dict[str, dict[str, Any]] = {
    "4/2 heads, tied": {},
    "8/4 heads, untied, biases, 3 layers": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "intermediate_size": 75,
    },
}
GRIDS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "TP4": {"tensor": 4},
    "PP2": {"pipeline": 2},
    "PP2 in 3 parts": {"pipeline": 2, "micro_batches": 3},
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "SP2": {"tensor": 2, "sequence_from": 8},
    "SP4 with shared heads": {"tensor": 4, "sequence_from": 3},
    "SP2 PP2 in 3 parts": {
        "tensor": 2,
        "pipeline": 2,
        "sequence_from": 8,
        "micro_batches": 3,
    },
}
BOTH_WAYS = ("TP2 PP2", "SP2 PP2 in 3 parts")
"""Grids for which the second shape, whose layers stages share unevenly, asks more."""
CASES = [
    *(
        pytest.param("4/2 heads, tied", grid, marks=[pytest.mark.slow] if grid in BOTH_WAYS else [])
        for grid in GRIDS
    ),
    *(("8/4 heads, untied, biases, 3 layers", grid) for grid in ("TP4", *BOTH_WAYS)),
]


def run_everything(driver: Any, prompt: Prompt) -> None:
    """Chunks, prefix hits, forks, block copies, prompt log-probabilities and preemptions."""
    first = prompt(70)
    driver.add("first", first, max_tokens=6, **GREEDY)
    driver.run()
    driver.add("hit", [*first[:64], *prompt(21, 1)], max_tokens=9, **GREEDY)
    driver.add("forks", prompt(39), max_tokens=12, n=2, **SAMPLED)
    driver.add("scored", prompt(60), max_tokens=3, prompt_logprobs=2, **GREEDY)
    driver.run()
    assert driver.last("hit").usage.cached_tokens == 64
    for length in (3, 31, 33):
        driver.add(f"grows{length}", prompt(length), **GREEDY)
    driver.run()
    assert driver.engine.stats().preemptions > 0


def options(folder: Path) -> dict[str, Any]:
    return {
        "folder": folder,
        "num_blocks": 12,
        "max_model_len": 96,
        "max_batched_tokens": 47,
        "default_reservation": 1,
    }


@pytest.fixture(scope="module")
def single(
    make_text_checkpoint: MakeCheckpoint, make_driver: MakeDriver, prompt: Prompt
) -> Callable[[str], Any]:
    """The driver of the engine in one process after ``run_everything``, by shape."""

    @functools.cache
    def run(shape: str) -> Any:
        driver = make_driver(**options(make_text_checkpoint(**SHAPES[shape])))
        run_everything(driver, prompt)
        return driver

    return run


def assert_near(found: Any, expected: Any) -> None:
    assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours.logprob - theirs.logprob) <= TOLERANCE
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        for (_, one), (_, other) in zip(ours.top, theirs.top, strict=True):
            assert abs(one - other) <= TOLERANCE


@pytest.mark.parametrize(("shape", "grid"), CASES)
def test_everything_equals_one_process(
    single: Callable[[str], Any],
    make_text_checkpoint: MakeCheckpoint,
    make_grid: MakeDriver,
    prompt: Prompt,
    shape: str,
    grid: str,
) -> None:
    expected = single(shape)
    driver = make_grid(**options(make_text_checkpoint(**SHAPES[shape])), parallel=GRIDS[grid])
    run_everything(driver, prompt)
    assert driver.chunks.keys() == expected.chunks.keys()
    for name, index in expected.chunks:
        assert driver.tokens(name, index) == expected.tokens(name, index), name
        assert_near(driver.logprobs(name, index), expected.logprobs(name, index))
    ours, theirs = (d.chunks["scored", 0][0].prompt_logprobs for d in (driver, expected))
    assert ours[0] is theirs[0] is None
    assert_near(ours[1:], theirs[1:])
    assert driver.engine.stats().steps == expected.engine.stats().steps


def test_long_steps_are_split_by_tokens_and_in_parts(
    make_grid: MakeDriver, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the parity above is worth: the paths that it means to compare are really taken."""
    by_tokens: list[int] = []
    parts: list[int] = []

    class Spy(stage.ByTokens):
        def __init__(self, group: Any, columns: Any, num_tokens: int) -> None:
            by_tokens.append(num_tokens)
            super().__init__(group, columns, num_tokens)

    def split(items: Any, count: int) -> Any:
        parts.append(count)
        return split_step(items, count)

    monkeypatch.setattr(stage, "ByTokens", Spy)
    monkeypatch.setattr(stage, "split_step", split)
    driver = make_grid(parallel=GRIDS["SP2 PP2 in 3 parts"])
    driver.add("long", prompt(23), max_tokens=3, **GREEDY)
    driver.run()
    # Every rank: 23 tokens in parts of 8, 8 and 7, then two steps of one token, which are whole.
    assert sorted(by_tokens) == sorted([8, 8, 7] * 4)
    assert sorted(parts) == sorted([3, 1, 1] * 4)
    driver.add("short", prompt(7, 1), max_tokens=1, **GREEDY)
    driver.run()
    assert len(by_tokens) == 12
    assert sorted(parts)[-4:] == [3] * 4


def step(ids: list[int], table: list[int], start: int) -> BatchInputs:
    """The tokens of ``ids`` from ``start``, with logits of the last."""
    item = ContextItem(table, start, len(ids) - start)
    return BatchInputs(ids[start:], [item], [len(ids) - start - 1], [])


def read(engine: Engine, block_ids: list[int]) -> Tensor:
    """A copy of some blocks, over memory that held something else."""
    out = torch.full(engine.kv_layout.shape(len(block_ids)), float("nan"))
    engine.executor.read_blocks([BlockId(block) for block in block_ids], out)
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_blocks_go_from_any_grid_to_any_other(
    make_text_checkpoint: MakeCheckpoint,
    make_driver: MakeDriver,
    make_grid: MakeDriver,
    prompt: Prompt,
    grid: str,
) -> None:
    """KV computed on one side is that of the other, and decodes there to the same logits."""
    folder = make_text_checkpoint(num_hidden_layers=3)
    one = make_driver(folder, num_blocks=8).engine
    many = make_grid(folder, num_blocks=8, parallel=GRIDS[grid]).engine
    twin = make_grid(folder, num_blocks=8, parallel={"tensor": 2}).engine
    ids = prompt(41)
    for engine, table in ((one, [3, 1, 6]), (many, [5, 0, 2])):
        engine.executor.forward(step(ids[:-1], table, 0))
    blocks = read(one, [3, 1, 6])
    torch.testing.assert_close(read(many, [5, 0, 2]), blocks, rtol=1e-4, atol=1e-4)
    # Zeros behind the end: the last block has room for more tokens than there are.
    assert not read(many, [2])[..., 40 % 16 :, :].any()
    with torch.inference_mode():
        expected = one.executor.forward(step(ids, [3, 1, 6], 40)).clone()
    many.executor.write_blocks([7, 4, 1], blocks)
    assert torch.equal(read(many, [7, 4, 1]), blocks)
    assert torch.equal(read(many, [1, 7]), blocks[:, [2, 0]])
    torch.testing.assert_close(
        many.executor.forward(step(ids, [7, 4, 1], 40)), expected, rtol=1e-4, atol=1e-4
    )
    # And on, to a third degree.
    twin.executor.write_blocks([0, 1, 2], read(many, [7, 4, 1]))
    torch.testing.assert_close(
        twin.executor.forward(step(ids, [0, 1, 2], 40)), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("grid", ["TP2", "TP4", "SP2 PP2 in 3 parts"])
def test_blocks_in_codes_go_from_any_grid_to_any_other(
    make_text_checkpoint: MakeCheckpoint,
    make_driver: MakeDriver,
    make_grid: MakeDriver,
    prompt: Prompt,
    grid: str,
    codes: str,
) -> None:
    options = {
        "folder": make_text_checkpoint(num_hidden_layers=3),
        "num_blocks": 8,
        "kv_cache_dtype": codes,
    }
    one = make_driver(**options).engine
    many = make_grid(**options, parallel=GRIDS[grid]).engine
    ids = prompt(41)
    for engine, table in ((one, [3, 1, 6]), (many, [5, 0, 2])):
        engine.executor.forward(step(ids[:-1], table, 0))
    shape = one.kv_layout.shape(3)
    blocks, theirs = (torch.full(shape, 0xA5, dtype=torch.uint8) for _ in range(2))
    one.executor.read_blocks([BlockId(block) for block in (3, 1, 6)], blocks)
    many.executor.read_blocks([BlockId(block) for block in (5, 0, 2)], theirs)
    with torch.inference_mode():
        expected = one.executor.forward(step(ids, [3, 1, 6], 40)).clone()
        # Sums over ranks are rounded otherwise, and a number between two codes takes either.
        assert (blocks != theirs)[..., : 16 * 16].float().mean() < 0.01
        many.executor.write_blocks([BlockId(block) for block in (7, 4, 1)], blocks)
        got = many.executor.forward(step(ids, [7, 4, 1], 40))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_blocks_of_another_shape_are_refused_and_the_group_lives_on(
    make_grid: MakeDriver, prompt: Prompt
) -> None:
    driver = make_grid(parallel={"tensor": 2})
    executor = driver.engine.executor
    blocks = read(driver.engine, [0])
    for method in (executor.write_blocks, executor.read_blocks):
        with pytest.raises(
            ValueError, match=r"\[2, 1, 2, 1, 16, 16\]; \[2, 1, 2, 2, 16, 16\] are meant"
        ):
            method([BlockId(0)], blocks[:, :, :, :1])
    with pytest.raises(ValueError, match="needs 2 blocks of 16 for 20 tokens, its table has 1"):
        executor.forward(step(prompt(20), [0], 0))
    driver.add("r", prompt(20), max_tokens=3, **GREEDY)
    driver.run()


@pytest.mark.parametrize("grid", ["TP2", "SP2", "PP2"])
def test_bfloat16_stays_near(
    make_driver: MakeDriver, make_grid: MakeDriver, prompt: Prompt, grid: str
) -> None:
    logits = []
    for make, more in ((make_driver, {}), (make_grid, {"parallel": GRIDS[grid]})):
        executor = make(dtype="bfloat16", **more).engine.executor
        with torch.inference_mode():
            logits.append(executor.forward(step(prompt(40), [0, 1, 2], 0)).clone())
    assert (logits[0] - logits[1]).abs().max() < 0.1


@pytest.mark.parametrize("kept_as", ["auto", "int8", "fp8"])
def test_the_embedded_model_solves_its_sums_on_two_ranks(
    monkeypatch: pytest.MonkeyPatch, thread_ranks: type, kept_as: str
) -> None:
    monkeypatch.setattr("inference_pio.workers.parallel.grid.LocalRanks", thread_ranks)
    sums = [(417, 58, 903), (250, 58, 903), (999, 1, 5), (12, 700, 33), (8, 9, 10), (640, 21, 77)]
    prompts = [
        f"<|im_start|>user\nWhat is {a} + {b} - {c}?<|im_end|>\n<|im_start|>assistant\n"
        for a, b, c in sums
    ]
    options = {"dtype": "float32", "kv_cache_dtype": kept_as, "kv_cache_bytes": 8 << 20}
    with LLM("embedded", parallel={"tensor": 2}, **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0))
    answers = [int(output.choices[0].content) for output in outputs]
    assert answers == [a + b - c for a, b, c in sums]
