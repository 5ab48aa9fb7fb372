"""Engines whose attention approximates: transformers' own windows, and what must not matter."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from inference_pio.workers.config import AttentionConfig, EngineConfig
from inference_pio.workers.model.cache import KVCache
from inference_pio.workers.types import Resumption

from .engine_pair import MakePair, alone

MakeCheckpoint = Callable[..., Path]
MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]
OneByOne = Callable[[str], dict[str, list[int]]]

GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "repetition_penalty": 1.5,
    "ignore_eos": True,
    "loop_guard": False,
}
KINDS = ["sliding_window:24", "sink_window:20+4", "top_pages:2"]
PROMPTS = {"long": (150, 0), "short": (9, 1), "middle": (70, 2)}


def run_all(driver: Any, prompt: Prompt, **params: Any) -> dict[str, list[int]]:
    for name, (length, seed) in PROMPTS.items():
        driver.add(name, prompt(length, seed), max_tokens=40, **GREEDY, **params)
    driver.run()
    return {name: driver.tokens(name) for name in PROMPTS}


@pytest.fixture(scope="module")
def one_by_one(make_driver: MakeDriver, prompt: Prompt) -> OneByOne:
    """Each prompt alone, in one chunk, on an engine without a past."""

    @functools.cache
    def texts(attention: str) -> dict[str, list[int]]:
        return {
            name: alone(
                lambda **options: make_driver(
                    attention=attention, max_batched_tokens=512, prefix_caching=False, **options
                ),
                prompt(length, seed),
                max_tokens=40,
                **GREEDY,
            )
            for name, (length, seed) in PROMPTS.items()
        }

    return texts


@pytest.mark.parametrize("window", [1, 16, 24, 400])
def test_a_sliding_window_is_transformers_own(
    embedded_dir: Path, make_driver: MakeDriver, window: int
) -> None:
    """On the trained model, whose text depends on what it sees."""
    driver = make_driver(
        embedded_dir,
        dtype="float32",
        attention={"kind": "sliding_window", "window": window},
        max_batched_tokens=48,
    )
    layers = driver.engine.loaded.model.config.num_layers
    model = Qwen3ForCausalLM.from_pretrained(
        embedded_dir,
        dtype=torch.float32,
        attn_implementation="eager",
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=0,
        layer_types=["sliding_attention"] * layers,
    ).eval()
    tokenizer = driver.engine.loaded.tokenizer
    ids = tokenizer.encode("What is 417 + 58 - 903? Sort 30, 4, 12, 77, 5. " * 3)
    driver.add("r", ids, max_tokens=30, **(GREEDY | {"repetition_penalty": 1.0, "logprobs": 1}))
    driver.run()
    output = driver.tokens("r")
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *output]])).logits[0, len(ids) - 1 : -1]
    expected = logits[:, : tokenizer.num_tokens].log_softmax(-1)
    assert output == expected.argmax(-1).tolist()
    for entry, row in zip(driver.logprobs("r"), expected, strict=True):
        assert abs(entry.logprob - float(row.max())) < 2e-4


@pytest.mark.parametrize("attention", KINDS)
def test_neighbours_and_chunks_change_nothing(
    make_driver: MakeDriver, one_by_one: OneByOne, prompt: Prompt, attention: str
) -> None:
    expected = one_by_one(attention)
    assert expected != one_by_one("full"), "the control"
    for chunk in (16, 37):
        driver = make_driver(attention=attention, max_batched_tokens=chunk)
        assert run_all(driver, prompt) == expected


@pytest.mark.parametrize("attention", KINDS)
def test_prefix_hits_change_nothing(
    make_driver: MakeDriver, prompt: Prompt, attention: str
) -> None:
    """Of a second turn too, whose prompt holds the answer of the first."""
    driver = make_driver(attention=attention)
    driver.add("first", prompt(150), max_tokens=40, **GREEDY)
    driver.run()
    turn = [*prompt(150), *driver.tokens("first"), *prompt(20, 3)]
    for name, ids in (("again", prompt(150)), ("second turn", turn)):
        driver.add(name, ids, max_tokens=40, **GREEDY)
        driver.run()
        fresh = alone(
            lambda **options: make_driver(attention=attention, prefix_caching=False, **options),
            ids,
            max_tokens=40,
            **GREEDY,
        )
        assert driver.tokens(name) == fresh
    cached = driver.last("second turn").usage.cached_tokens
    assert cached == (144 if attention.startswith("top_pages") else 176)


@pytest.mark.parametrize("attention", KINDS)
def test_preemption_and_a_move_change_nothing(
    make_driver: MakeDriver, one_by_one: OneByOne, prompt: Prompt, attention: str
) -> None:
    """Generated tokens are computed again, in chunks."""
    expected = one_by_one(attention)
    num_blocks = 14 if attention.startswith("top_pages") else 8  # windows give blocks back
    driver = make_driver(attention=attention, num_blocks=num_blocks, max_model_len=190)
    for name, (length, seed) in PROMPTS.items():
        worse = name == "long"
        driver.add(name, prompt(length, seed), max_tokens=40, priority=worse, **GREEDY)
        for _ in range(25):
            driver.step()
    driver.run()
    assert driver.engine.stats().preemptions > 0
    assert {name: driver.tokens(name) for name in PROMPTS} == expected
    moved = make_driver(attention=attention, max_batched_tokens=33)
    told = Resumption(0, tuple(expected["long"][:33]))
    moved.add("long", prompt(150), max_tokens=40, resume=(told,), **GREEDY)
    moved.run()
    assert moved.tokens("long") == expected["long"][33:]


@pytest.mark.parametrize("attention", KINDS)
def test_choices_that_share_blocks(make_driver: MakeDriver, prompt: Prompt, attention: str) -> None:
    """Copies of a partly filled block are filled, and bounded, by their owners."""
    options = GREEDY | {"temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 60}
    together, roomy = (make_driver(attention=attention, max_batched_tokens=n) for n in (16, 512))
    for driver in (together, roomy):
        driver.add("n", prompt(120), **options)
        driver.run()
    texts = [together.tokens("n", index) for index in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    assert texts == [roomy.tokens("n", index) for index in range(3)]


@pytest.mark.parametrize("attention", KINDS)
def test_kv_that_another_engine_computed(
    make_pair: MakePair, one_by_one: OneByOne, prompt: Prompt, attention: str
) -> None:
    pair = make_pair({"max_batched_tokens": 32}, attention=attention)
    expected = one_by_one(attention)["long"]
    pair.decode.add("long", prompt(150), max_tokens=40, **GREEDY)
    pair.run()
    assert pair.ends == {"done": 1}
    assert pair.decode.tokens("long") == expected
    told = Resumption(0, tuple(expected[:33]))
    pair.decode.add("resumed", prompt(150), max_tokens=40, cache_salt="b", resume=(told,), **GREEDY)
    (request,) = pair.wanted()
    pair.run()
    assert pair.decode.tokens("resumed") == expected[33:]
    # A prefill engine takes every token for a prompt's.
    assert len(request.token_ids) == (150 if attention.startswith("top_pages") else 182)


def test_kv_of_another_attention_is_not_taken(make_pair: MakePair, prompt: Prompt) -> None:
    pair = make_pair({"attention": "full"}, attention="top_pages:2")
    pair.decode.add("r", prompt(100), max_tokens=4, **GREEDY)
    pair.run()
    assert "done" not in pair.ends
    assert pair.decode.engine.stats().kv_imported_tokens == 0
    assert len(pair.decode.tokens("r")) == 4


def test_nothing_hidden_is_full_attention(make_driver: MakeDriver, prompt: Prompt) -> None:
    expected = run_all(make_driver(), prompt)
    for attention in ("sliding_window:190", "sink_window:190+8", "top_pages:12"):
        assert run_all(make_driver(attention=attention), prompt) == expected


def test_an_engine_says_that_it_approximates(
    make_driver: MakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "inference_pio"):
        make_driver()
        assert not caplog.records
        make_driver(attention="top_pages:2")
    assert "attention is top_pages:2: answers are approximations" in caplog.text


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"kind": "sliding_window"}, "'sliding_window' needs 'window'"),
        ({"kind": "sink_window", "window": 9}, "'sink_window' needs 'sinks'"),
        ({"kind": "top_pages", "pages": 2, "window": 9}, "'top_pages' has no 'window'"),
        ({"window": 9}, "'full' has no 'window'; 'sliding_window' and 'sink_window'"),
        ({"kind": "top_pages", "pages": 0}, "greater than or equal to 1"),
        ("sink_window:9", "is none of full, sliding_window:WINDOW, sink_window:WINDOW"),
        ("window:9", "is none of full"),
        ("sliding_window:x", "valid integer"),
        ({"kind": "sliding_window", "windows": 9}, "did you mean 'window'"),
    ],
)
def test_wrong_attention_is_refused(written: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig.model_validate({"attention": written})


@pytest.mark.parametrize("label", ["full", *KINDS])
def test_a_label_stands_for_its_attention(label: str) -> None:
    found = EngineConfig.model_validate({"attention": label}).attention
    assert found.label == label
    assert AttentionConfig.model_validate(found.model_dump()) == found


def test_bounds_are_counted_as_the_memory_they_take(make_driver: MakeDriver) -> None:
    model = make_driver(attention="top_pages:2").engine.loaded.model
    cache = model.new_cache(6, 16)
    size = KVCache.bytes_per_block(model.config, 16, model.dtype, pattern=model.pattern)
    bounds = sum(layer.nbytes for layer in cache.bounds)
    assert cache.blocks_LN2KSD.nbytes + bounds == 6 * size
