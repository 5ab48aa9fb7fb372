"""What goes wrong in a step: it ends the request that it belongs to, and harms no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from inference_pio.workers.types import FinishReason

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
GREEDY = PLAIN | {"temperature": 0.0}

POISON = 400
ALLOWED = tuple(range(300))


def add_neighbours(driver: Any, prompt: Prompt) -> None:
    for number in range(4):
        ids = [token % 300 for token in prompt(9 + 20 * number)]
        driver.add(f"n{number}", ids, max_tokens=15, allowed_token_ids=ALLOWED, n=2, **GREEDY)


@pytest.fixture(scope="module")
def clean(make_driver: MakeDriver, prompt: Prompt) -> dict[tuple[str, int], list[int]]:
    """What the neighbours say when nothing goes wrong."""
    driver = make_driver()
    add_neighbours(driver, prompt)
    driver.run()
    return {key: driver.tokens(*key) for key in driver.chunks}


def assert_neighbours_unharmed(driver: Any, clean: dict[tuple[str, int], list[int]]) -> None:
    for key, tokens in clean.items():
        assert driver.end(*key) is FinishReason.LENGTH
        assert driver.tokens(*key) == tokens


def raise_on_poison(driver: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every forward of the poison raises; returns the sizes of the batches in which it did."""
    raised: list[int] = []
    plain = driver.engine.loaded.model.forward

    def forward(token_ids: Tensor, context: Any, cache: Any) -> Tensor:
        hidden = plain(token_ids, context, cache)
        if bool((token_ids == POISON).any()):
            raised.append(context.num_sequences)
            raise RuntimeError("injected")
        return hidden

    monkeypatch.setattr(driver.engine.loaded.model, "forward", forward)
    return raised


@pytest.mark.parametrize("place", [0, 30, 100])
def test_a_forward_that_raises_fails_its_request_alone(
    make_driver: MakeDriver,
    prompt: Prompt,
    clean: dict[tuple[str, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    place: int,
) -> None:
    driver = make_driver()
    raised = raise_on_poison(driver, monkeypatch)
    bad = [token % 300 for token in prompt(101, 1)]
    bad[place] = POISON
    driver.add("bad", bad, max_tokens=5, n=3)
    add_neighbours(driver, prompt)
    driver.run()
    assert raised[-1] == 1, "the poison was never computed alone"
    for index in range(3):
        (chunk,) = driver.chunks["bad", index]
        assert chunk.finish_reason is FinishReason.ERROR
        assert chunk.error.code == "internal_error"
        assert "RuntimeError" in chunk.error.message
    assert_neighbours_unharmed(driver, clean)
    assert driver.engine.stats().requests_finished["error"] == 1


def test_a_decode_step_that_raises_keeps_what_was_told(
    make_driver: MakeDriver,
    prompt: Prompt,
    clean: dict[tuple[str, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = make_driver()
    raised = raise_on_poison(driver, monkeypatch)
    add_neighbours(driver, prompt)
    for _ in range(5):
        driver.step()
    driver.add("bad", [1, 2, 3], allowed_token_ids=(POISON,), max_tokens=5, **GREEDY)
    driver.run()
    assert raised
    assert max(raised) > 1
    told, end = driver.chunks["bad", 0]
    assert (told.token_ids, end.first, end.token_ids) == ((POISON,), 1, ())
    assert end.finish_reason is FinishReason.ERROR
    assert_neighbours_unharmed(driver, clean)


def test_nan_logits_fail_their_request_alone_and_leave_no_prefix(
    make_driver: MakeDriver, prompt: Prompt, clean: dict[tuple[str, int], list[int]]
) -> None:
    driver = make_driver()
    model = driver.engine.loaded.model
    sound = model.embedding
    model.embedding = sound.clone()
    model.embedding[POISON] = float("nan")
    bad = [token % 300 for token in prompt(150, 1)]
    bad[3] = POISON
    driver.add("bad", bad, max_tokens=5, n=2, **GREEDY)
    add_neighbours(driver, prompt)
    driver.run()
    for index in range(2):
        assert driver.end("bad", index) is FinishReason.ERROR
        assert not driver.tokens("bad", index)
    assert_neighbours_unharmed(driver, clean)
    # The same prompt again, when the fault is gone: nothing of what NaN reached is used.
    model.embedding = sound
    driver.add("again", bad, max_tokens=5, **GREEDY)
    driver.run()
    assert driver.last("again").usage.cached_tokens == 0
    untouched = make_driver()
    untouched.add("again", bad, max_tokens=5, **GREEDY)
    untouched.run()
    assert driver.tokens("again") == untouched.tokens("again")


def test_sampling_that_raises_fails_its_request_alone(
    make_driver: MakeDriver,
    prompt: Prompt,
    clean: dict[tuple[str, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = make_driver()
    sampler = driver.engine._runner.sampler
    plain, raised = sampler.launch, []

    def launch(logits: Tensor, rows: Sequence[Any], *unread: Any) -> Any:
        if any(row.num_logprobs == 7 for row in rows):
            raised.append(len(rows))
            raise ZeroDivisionError("injected")
        return plain(logits, rows, *unread)

    monkeypatch.setattr(sampler, "launch", launch)
    driver.add("bad", prompt(20), logprobs=7, prompt_logprobs=1, max_tokens=5)
    add_neighbours(driver, prompt)
    driver.run()
    assert raised
    assert driver.end("bad") is FinishReason.ERROR
    assert_neighbours_unharmed(driver, clean)


@pytest.mark.parametrize("method", ["row", "take"])
def test_a_choice_that_raises_fails_alone(
    make_driver: MakeDriver,
    prompt: Prompt,
    clean: dict[tuple[str, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    driver = make_driver()
    driver.add("bad", prompt(20), max_tokens=5, **GREEDY)
    (choice,) = driver.engine._requests._choices.values()
    raised = []

    def broken(*_: Any) -> Any:
        raised.append(method)
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(choice, method, broken)
    add_neighbours(driver, prompt)
    driver.run()
    assert raised == [method]
    assert driver.end("bad") is FinishReason.ERROR
    assert_neighbours_unharmed(driver, clean)


def test_a_request_that_leaves_no_token_fails_alone(
    make_driver: MakeDriver, prompt: Prompt, clean: dict[tuple[str, int], list[int]]
) -> None:
    driver = make_driver()
    only_stop = {"allowed_token_ids": (490,), "min_tokens": 2}
    driver.add("bad", prompt(20), max_tokens=5, **only_stop)
    add_neighbours(driver, prompt)
    driver.run()
    assert driver.end("bad") is FinishReason.ERROR
    assert_neighbours_unharmed(driver, clean)


def test_fail_all_tells_every_choice_and_touches_no_books(
    make_driver: MakeDriver, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make_driver(max_num_seqs=3)
    driver.add("forked", prompt(5), n=2, max_tokens=9, **GREEDY)
    driver.step()
    driver.add("unforked", prompt(6), n=3, max_tokens=9, **GREEDY)
    broken = dataclasses.replace(driver.engine.loaded)  # anything without a ``finish``
    monkeypatch.setattr(driver.engine, "_scheduler", broken)
    chunks = driver.engine.fail_all("broken").chunks
    ends = {(chunk.request_id, chunk.index): chunk for chunk in chunks}
    assert sorted(ends) == [
        ("forked", 0),
        ("forked", 1),
        ("unforked", 0),
        ("unforked", 1),
        ("unforked", 2),
    ]
    assert {chunk.error.code for chunk in chunks} == {"engine_dead"}
    assert ends["forked", 1].first == 1
