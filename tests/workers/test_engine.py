"""One engine, step by step: refusals, ends, faults, seeds, thoughts and stops."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.workers.text.assembler import OutputAssembler, assemble
from inference_pio.workers.types import FinishReason, RequestError, ThoughtEnd, TokenKind

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
GREEDY = PLAIN | {"temperature": 0.0}
QUESTION = [{"role": "user", "content": "What is 417 + 58 - 903?"}]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "params", "message"),
    [
        (
            100,
            {},
            "limit is 100 tokens; the prompt has 100 and at least 1 are to be generated: 101",
        ),
        (90, {"max_tokens": 11}, "the prompt has 90 and 11 are to be generated: 101 in all"),
        (5000, {"max_tokens": 1}, "the prompt has 5000 and 1 are to be generated: 5001 in all"),
    ],
)
def test_the_context_limit_is_told_with_its_numbers(
    make_driver: MakeDriver, prompt: Prompt, length: int, params: dict[str, int], message: str
) -> None:
    driver = make_driver(max_model_len=100)
    with pytest.raises(RequestError, match=message) as caught:
        driver.add("r", prompt(length), **params)
    assert caught.value.code == "context_length_exceeded"
    assert not driver.engine.has_work


@pytest.mark.parametrize("length", [1, 98, 99])
def test_the_context_limit_ends_an_open_request(
    make_driver: MakeDriver, prompt: Prompt, length: int
) -> None:
    driver = make_driver(max_model_len=100)
    driver.add("open", prompt(length), **GREEDY)
    driver.add("named", prompt(length), max_tokens=100 - length, **GREEDY)
    driver.run()
    for name in ("open", "named"):
        assert driver.end(name) is FinishReason.LENGTH
        assert len(driver.tokens(name)) == 100 - length


def test_the_models_own_limit_is_the_default(
    make_driver: MakeDriver, make_text_checkpoint: Callable[..., Path], prompt: Prompt
) -> None:
    driver = make_driver(make_text_checkpoint(max_position_embeddings=70), max_num_seqs=2)
    with pytest.raises(RequestError, match="the context limit is 70 tokens"):
        driver.add("r", prompt(70))
    driver.add("r", prompt(60), **GREEDY)
    driver.run()
    assert len(driver.tokens("r")) == 10


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 497], {}, "the prompt holds id 497; the model's tokens are 0 to 496"),
        ([1, -1], {}, "the prompt holds id -1"),
        ([1], {"logit_bias": {500: 1.0}}, "500"),
        ([1], {"stop_token_ids": (508,)}, "508"),
        ([1], {"allowed_token_ids": (497,)}, "497"),
        ([1], {"bad_words": ((3, 600),)}, "600"),
        ([1], {"n": 17}, "n is 17; this engine runs at most 16"),
        ([1], {"n": 2, "max_tokens": 90}, "for each of 2 choices needs 12 KV blocks .* has 10"),
    ],
)
def test_refusals_touch_nothing(
    make_driver: MakeDriver, ids: list[int], params: dict[str, Any], message: str
) -> None:
    driver = make_driver(num_blocks=10)
    before = driver.engine.stats()
    with pytest.raises(RequestError, match=message):
        driver.add("r", ids, **params)
    assert driver.engine.stats() == before
    assert not driver.engine.has_work


def test_an_id_in_use_is_refused_and_the_first_request_goes_on(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    driver = make_driver()
    driver.add("r", prompt(5), max_tokens=4, **GREEDY)
    with pytest.raises(ValueError, match="a request of that id is in the engine"):
        driver.add("r", prompt(6), max_tokens=4, **GREEDY)
    driver.run()
    assert driver.last("r").usage.prompt_tokens == 5
    assert len(driver.tokens("r")) == 4


# --- seeds ----------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_in_any_batch(make_driver: MakeDriver, prompt: Prompt) -> None:
    def run(order: Sequence[int], **options: Any) -> dict[int, list[list[int]]]:
        driver = make_driver(**options)
        for number in order:
            driver.add(
                str(number),
                prompt(10 + 7 * number),
                seed=number % 3,
                n=1 + number % 2,
                temperature=0.8 + number / 10,
                top_k=(0, 20, 5)[number % 3],
                top_p=0.9 if number % 2 else 1.0,
                presence_penalty=0.5 if number == 3 else 0.0,
                max_tokens=12,
                **PLAIN,
            )
        driver.run()
        return {
            number: [driver.tokens(str(number), index) for index in range(1 + number % 2)]
            for number in order
        }

    numbers = list(range(6))
    together = run(numbers)
    assert {number: run([number])[number] for number in numbers} == together
    assert run(numbers[::-1], max_batched_tokens=17, max_num_seqs=3) == together
    assert run(numbers, num_blocks=8, default_reservation=1) == together
    assert together[1][0] != together[1][1]


def test_requests_without_seed_differ_and_come_again_with_the_engines_seed(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    def run(seed: int) -> list[list[int]]:
        driver = make_driver(seed=seed)
        for name in "ab":
            driver.add(name, prompt(9), temperature=1.0, top_k=0, max_tokens=12, **PLAIN)
        driver.run()
        return [driver.tokens(name) for name in "ab"]

    first = run(1)
    assert first[0] != first[1]
    assert run(1) == first
    assert run(2) != first


# --- faults ---------------------------------------------------------------------------------------

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
    plain, raised = sampler.sample, []

    def sample(logits: Tensor, rows: Sequence[Any]) -> Any:
        if any(row.num_logprobs == 7 for row in rows):
            raised.append(len(rows))
            raise ZeroDivisionError("injected")
        return plain(logits, rows)

    monkeypatch.setattr(sampler, "sample", sample)
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


# --- aborts and deadlines -------------------------------------------------------------------------


def test_abort_in_every_state(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(max_num_seqs=4)
    driver.add("running", prompt(10), n=2, max_tokens=50, **GREEDY)
    for _ in range(3):
        driver.step()
    driver.add("prefilling", prompt(200), n=2, max_tokens=50, **GREEDY)
    driver.step()
    driver.add("waiting", prompt(10), n=3, max_tokens=50, **GREEDY)
    driver.step()
    for name in ("running", "prefilling", "waiting", "unknown", "running"):
        driver.engine.abort(name)
        driver.engine.check_integrity()
    driver.run()
    assert {key for key in driver.chunks if key[0] != "running"} == {
        ("prefilling", 0),
        ("prefilling", 1),
        ("waiting", 0),
        ("waiting", 1),
        ("waiting", 2),
    }
    for key, chunks in driver.chunks.items():
        assert chunks[-1].finish_reason is FinishReason.ABORT, key
        assert sum(len(chunk.token_ids) for chunk in chunks) == (5 if key[0] == "running" else 0)
    driver.engine.abort("running")
    assert not driver.engine.has_work


def test_one_choice_may_end_before_its_siblings_are_aborted(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    driver = make_driver()
    driver.add("r", prompt(10), n=6, temperature=2.0, top_k=0, seed=1, max_tokens=300,
               stop_token_ids=tuple(range(0, 497, 40)), **PLAIN)  # fmt: skip
    while not any(chunks[-1].finish_reason for chunks in driver.chunks.values()):
        driver.step()
    driver.engine.abort("r")
    driver.run()
    ends = [driver.end("r", index) for index in range(6)]
    assert set(ends) == {FinishReason.STOP, FinishReason.ABORT}


def test_a_deadline_ends_a_request_wherever_it_is(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(max_num_seqs=2, max_model_len=2000, num_blocks=300)
    driver.add("running", prompt(10), n=2, deadline_s=0.05, max_tokens=1900, **GREEDY)
    driver.add("waiting", prompt(10), n=2, deadline_s=0.05, max_tokens=1900, **GREEDY)
    driver.step()
    time.sleep(0.06)
    driver.run()
    assert len(driver.chunks) == 4
    for (name, _), chunks in driver.chunks.items():
        assert chunks[-1].finish_reason is FinishReason.ERROR
        assert chunks[-1].error.code == "deadline_exceeded"
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        assert f"0.05 s passed after {tokens} tokens" in chunks[-1].error.message
        assert tokens == (1 if name == "running" else 0)


# --- thoughts, with the embedded model ------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(make_driver: MakeDriver, embedded_dir: Path) -> Any:
    """The embedded model in float32, so that no text depends on the batch."""
    return make_driver(embedded_dir, dtype="float32", num_blocks=300)


def render(driver: Any, **options: Any) -> list[int]:
    ids: list[int] = driver.engine.loaded.text.template.render(QUESTION, **options)
    return ids


def text_of(driver: Any, name: str, index: int = 0, **options: Any) -> Any:
    assembler = OutputAssembler(driver.engine.loaded.tokenizer, **options)
    return assemble(assembler, driver.chunks[name, index])


def test_a_thought_and_its_answer(embedded: Any) -> None:
    embedded.add("think", render(embedded), temperature=0.0)
    embedded.add("plain", render(embedded, enable_thinking=False), temperature=0.0, n=2)
    embedded.run()
    kinds = embedded.kinds("think")
    thought = kinds.count(TokenKind.THOUGHT)
    tag_places = [place for place, kind in enumerate(kinds) if kind is TokenKind.TAG]
    assert tag_places == [0, thought + 1]
    assert kinds[-1] is TokenKind.STOP
    last = embedded.last("think")
    assert last.usage.reasoning_tokens == thought > 20
    assert last.thought_end is ThoughtEnd.NATURAL
    assert last.finish_reason is FinishReason.STOP
    output = text_of(embedded, "think")
    assert output.reasoning.startswith("a+0417\n")
    assert output.content == "-428"
    for index in range(2):
        assert set(embedded.kinds("plain", index)) == {TokenKind.CONTENT, TokenKind.STOP}
        assert text_of(embedded, "plain", index).reasoning is None


@pytest.mark.parametrize("budget", [1, 7, 20])
def test_a_spent_budget_forces_the_stop_text(embedded: Any, budget: int) -> None:
    name = f"budget {budget}"
    options = {"temperature": 0.0, "max_tokens": 150, "logprobs": 0, "ignore_eos": True}
    ends_before = embedded.engine.stats().budget_ends
    embedded.add(name, render(embedded), thinking_budget=budget, **options)
    embedded.add(f"free {budget}", render(embedded), **options)
    embedded.run()
    tokens, free = embedded.tokens(name), embedded.tokens(f"free {budget}")
    forced = list(embedded.engine.loaded.text.phase_tokens.stop_text_ids)
    start = 1 + budget
    assert tokens[:start] == free[:start]
    assert tokens[start : start + len(forced)] == forced
    entries = embedded.logprobs(name)
    assert [entry.token_id for entry in entries] == tokens
    assert all(entry.top == () for entry in entries)
    assert all(entry.logprob == 0.0 for entry in entries[start : start + len(forced)])
    last = embedded.last(name)
    assert last.thought_end is ThoughtEnd.BUDGET
    assert embedded.engine.stats().budget_ends == ends_before + 1
    kinds = embedded.kinds(name)
    assert kinds.count(TokenKind.THOUGHT) == last.usage.reasoning_tokens
    assert text_of(embedded, name).reasoning.endswith("based on the thinking directly now.")
    # What follows is what the model says behind that text: the forced tokens are in its cache.
    behind = start + len(forced)
    continued = f"continued {budget}"
    embedded.add(continued, [*render(embedded), *tokens[:behind]], **(options | {"max_tokens": 20}))
    embedded.run()
    assert embedded.tokens(continued) == tokens[behind : behind + 20]


def test_budget_zero_closes_a_thought_as_it_opens(embedded: Any) -> None:
    tags = embedded.engine.loaded.tokenizer.tags
    bare = list(embedded.engine.loaded.text.phase_tokens.bare_stop_ids)
    embedded.add("zero", render(embedded), thinking_budget=0, temperature=0.0, max_tokens=20)
    open_thought = [*render(embedded), tags.think_open]
    embedded.add("open", open_thought, thinking_budget=0, temperature=0.0, max_tokens=20)
    embedded.run()
    assert embedded.tokens("zero")[: 1 + len(bare)] == [tags.think_open, *bare]
    assert embedded.tokens("open")[: len(bare)] == bare
    assert embedded.tokens("open") == embedded.tokens("zero")[1:] + embedded.tokens("open")[19:]
    for name in ("zero", "open"):
        assert embedded.last(name).usage.reasoning_tokens == 0
        assert text_of(embedded, name).reasoning is None


@pytest.mark.parametrize("max_tokens", [21, 22, 23, 60])
def test_forced_text_respects_max_tokens(embedded: Any, max_tokens: int) -> None:
    name = f"forced {max_tokens}"
    embedded.add(name, render(embedded), thinking_budget=20, temperature=0.0, max_tokens=max_tokens)
    embedded.run()
    assert len(embedded.tokens(name)) == max_tokens
    assert embedded.end(name) is FinishReason.LENGTH


def test_the_loop_guard_ends_a_thought_that_repeats_itself(embedded: Any) -> None:
    token = embedded.engine.loaded.tokenizer.encode("a")[0]
    before = embedded.engine.stats().loops_cut
    prompt = [*render(embedded), embedded.engine.loaded.tokenizer.tags.think_open]
    options = {"logit_bias": {token: 100.0}, "temperature": 0.0, "max_tokens": 300}
    embedded.add("guarded", prompt, **options)
    embedded.add("unguarded", prompt, loop_guard=False, **options)
    embedded.run()
    guard = embedded.engine.config.loop_guard
    forced = list(embedded.engine.loaded.text.phase_tokens.stop_text_ids)
    tokens = embedded.tokens("guarded")
    assert tokens[: guard.min_tokens] == [token] * guard.min_tokens
    assert tokens[guard.min_tokens :][: len(forced)] == forced
    assert embedded.last("guarded").thought_end is ThoughtEnd.LOOP
    assert embedded.tokens("unguarded") == [token] * 300
    assert embedded.last("unguarded").thought_end is None
    assert embedded.engine.stats().loops_cut == before + 1


def test_preempted_thoughts_go_on_as_if_nothing_had_been(
    make_driver: MakeDriver, embedded: Any, embedded_dir: Path
) -> None:
    driver = make_driver(
        embedded_dir, dtype="float32", num_blocks=12, default_reservation=1, max_model_len=160
    )
    cases: dict[str, dict[str, Any]] = {
        "p0": {"temperature": 0.0},
        "p1": {"temperature": 0.0, "thinking_budget": 25},
        "p2": {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.1, "stop": ("5",)},
    }
    for one in (driver, embedded):
        for name, params in cases.items():
            params = params if one is driver else params | {"max_tokens": 160 - len(render(one))}
            one.add(name, render(one), **params)
        one.run()
    assert driver.engine.stats().preemptions > 0
    for name in cases:
        assert driver.tokens(name) == embedded.tokens(name)
        assert driver.kinds(name) == embedded.kinds(name)
        assert driver.last(name).stop_reason == embedded.last(name).stop_reason
        assert driver.last(name).usage.reasoning_tokens == (
            embedded.last(name).usage.reasoning_tokens
        )


# --- stops ----------------------------------------------------------------------------------------


def test_eos_stop_ids_and_ignore_eos(embedded: Any) -> None:
    prompt = render(embedded, enable_thinking=False)
    embedded.add("eos", prompt, temperature=0.0)
    embedded.run()
    tokens = embedded.tokens("eos")
    assert tokens[-1] in embedded.engine.loaded.text.eos
    assert embedded.last("eos").stop_reason is None
    embedded.add("id", prompt, temperature=0.0, stop_token_ids=(tokens[1],))
    embedded.add("ignored", prompt, temperature=0.0, ignore_eos=True, max_tokens=30)
    embedded.add("longer", prompt, temperature=0.0, min_tokens=20, max_tokens=30)
    embedded.run()
    assert embedded.tokens("id") == tokens[:2]
    assert embedded.last("id").stop_reason == tokens[1]
    assert embedded.kinds("id")[-1] is TokenKind.STOP
    assert embedded.tokens("ignored")[: len(tokens)] == tokens
    assert len(embedded.tokens("ignored")) == 30
    assert TokenKind.STOP not in embedded.kinds("ignored")
    assert TokenKind.STOP not in embedded.kinds("longer")[:20]
    assert embedded.tokens("longer")[: len(tokens) - 1] == tokens[:-1]


def expected_stop(
    pieces: Sequence[str], stops: Sequence[str], min_tokens: int
) -> tuple[int, str, str] | None:
    """Brute force: tokens until the stop, the text before it and the stop itself."""
    text = ""
    for number, piece in enumerate(pieces, 1):
        for end in range(len(text) + 1, len(text) + len(piece) + 1):
            whole = (text + piece)[:end]
            found = [stop for stop in stops if whole.endswith(stop)]
            if found and number > min_tokens:
                longest = max(found, key=len)
                return number, whole[: -len(longest)], longest
        text += piece
    return None


@pytest.mark.parametrize("seed", range(8))
def test_stop_strings_end_a_text_where_brute_force_says(embedded: Any, seed: int) -> None:
    """Stops of any length out of the text itself, across token borders, with ``min_tokens``."""
    rng = random.Random(seed)
    tokenizer = embedded.engine.loaded.tokenizer
    letters = [i for i in range(488) if tokenizer.decode([i]).isascii()]
    pieces_of = {token: tokenizer.decode([token]) for token in letters}
    params = {
        "allowed_token_ids": tuple(letters),
        "temperature": 5.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": seed,
        "max_tokens": 60,
        "ignore_eos": True,
        "n": 2,
    }
    prompt = render(embedded, enable_thinking=False)
    embedded.add(f"whole {seed}", prompt, **params)
    embedded.run()
    wholes = [embedded.tokens(f"whole {seed}", index) for index in range(2)]
    assert wholes[0] != wholes[1]
    text = "".join(pieces_of[token] for token in wholes[0])
    cases = {}
    for case in range(8):
        starts = [rng.randrange(len(text) - 12) for _ in range(rng.randint(1, 3))]
        stops = tuple(text[start : start + rng.choice([1, 2, 3, 12])] for start in starts)
        least = rng.choice([0, 1, 10, 30, 60])
        include = rng.random() < 0.3
        name = f"stop {seed} {case}"
        cases[name] = (stops, least, include)
        embedded.add(
            name,
            prompt,
            **params,
            stop=stops,
            min_tokens=least,
            include_stop_str_in_output=include,
        )
    embedded.run()
    for (name, (stops, least, include)), index in itertools.product(cases.items(), range(2)):
        whole = wholes[index]
        pieces = [pieces_of[token] for token in whole]
        expected = expected_stop(pieces, stops, least)
        options = {"stop": stops, "min_tokens": least, "include_stop": include}
        output = text_of(embedded, name, index, parse=False, **options)
        if expected is None:
            assert embedded.end(name, index) is FinishReason.LENGTH
            assert output.content == "".join(pieces)
            continue
        count, before, stop = expected
        assert embedded.tokens(name, index) == whole[:count]
        assert embedded.end(name, index) is FinishReason.STOP
        assert embedded.last(name, index).stop_reason == stop
        assert output.content == before + (stop if include else "")


def test_stop_strings_are_looked_for_in_the_answer_unless_told(embedded: Any) -> None:
    """The thought is full of ``+``; the answer has none."""
    params = {"temperature": 0.0, "stop": ("0475",)}
    embedded.add("answer", render(embedded), **params)
    embedded.add("everywhere", render(embedded), stop_in_thought=True, **params)
    embedded.run()
    assert text_of(embedded, "answer", stop=("0475",)).content == "-428"
    assert embedded.last("answer").stop_reason is None
    assert embedded.last("everywhere").stop_reason == "0475"
    cut = text_of(embedded, "everywhere", stop=("0475",), stop_in_thought=True)
    assert cut.reasoning.endswith(">+")
    assert cut.content == ""


# --- books ----------------------------------------------------------------------------


def test_stats_add_up(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver()
    driver.add("a", prompt(40), max_tokens=5, n=2, **GREEDY)
    assert driver.engine.stats().waiting == 1
    driver.step()
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting, stats.steps) == (2, 0, 1)
    assert stats.kv_blocks_used == 3
    driver.add("b", prompt(40), max_tokens=3, **GREEDY)
    driver.run()
    stats = driver.engine.stats()
    assert stats.prompt_tokens == 80
    assert stats.generated_tokens == 13
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (80, 32)
    assert stats.kv_blocks_cached == 2
    assert stats.requests_finished == {"length": 3}


# --- anything at all ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """One request of a random run."""

    length: int
    n: int
    max_tokens: int | None
    priority: int
    start: int
    abort_at: int | None


PLANS = st.lists(
    st.builds(
        Plan,
        length=st.integers(1, 60),
        n=st.integers(1, 3),
        max_tokens=st.none() | st.integers(1, 30),
        priority=st.integers(0, 2),
        start=st.integers(0, 12),
        abort_at=st.none() | st.integers(0, 25),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def alone(make_driver: MakeDriver, prompt: Prompt) -> Callable[[int], list[int]]:
    """The greedy continuation of a prompt to the context limit, computed by itself once."""
    driver = make_driver(max_model_len=80)

    def run(length: int) -> list[int]:
        name = str(length)
        if (name, 0) not in driver.chunks:
            driver.add(name, prompt(length), **GREEDY)
            driver.run()
        tokens: list[int] = driver.tokens(name)
        return tokens

    return run


@settings(max_examples=20, deadline=None)
@given(plans=PLANS, budget=st.sampled_from([4, 11, 64]), blocks=st.integers(12, 20))
def test_any_mix_of_arrivals_and_aborts_in_a_small_pool(
    make_driver: MakeDriver,
    prompt: Prompt,
    alone: Callable[[int], list[int]],
    plans: list[Plan],
    budget: int,
    blocks: int,
) -> None:
    driver = make_driver(
        num_blocks=blocks,
        block_size=8,
        max_model_len=80,
        max_num_seqs=4,
        max_batched_tokens=budget,
        default_reservation=2,
    )
    accepted: dict[str, Plan] = {}
    step = 0
    while step <= 12 or driver.engine.has_work:
        for number, plan in enumerate(plans):
            if plan.start == step:
                params = {"n": plan.n, "max_tokens": plan.max_tokens, **GREEDY}
                # Refusals have their own tests; here a request too large just never comes.
                with contextlib.suppress(RequestError):
                    driver.add(str(number), prompt(plan.length), priority=plan.priority, **params)
                    accepted[str(number)] = plan
            if plan.abort_at == step:
                driver.engine.abort(str(number))
        driver.step()
        step += 1
        assert step < 3000, "no progress"
    driver.run()
    assert set(driver.chunks) == {(k, i) for k, plan in accepted.items() for i in range(plan.n)}
    for name, plan in accepted.items():
        expected = alone(plan.length)[: plan.max_tokens]
        for index in range(plan.n):
            tokens = driver.tokens(name, index)
            if driver.end(name, index) is FinishReason.LENGTH:
                assert tokens == expected
            else:
                assert driver.end(name, index) is FinishReason.ABORT
                assert plan.abort_at is not None
                assert tokens == expected[: len(tokens)]


def test_such_a_small_pool_does_preempt(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(
        num_blocks=12, block_size=8, max_model_len=80, max_num_seqs=4, default_reservation=2
    )
    for name in "abc":
        driver.add(name, prompt(20), **GREEDY)
    driver.run()
    assert driver.engine.stats().preemptions > 0
    assert torch.get_num_threads() == 1
