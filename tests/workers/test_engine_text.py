"""Where a text ends: thoughts, their budgets, forced text and stops, with the embedded model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from inference_pio.workers.text.assembler import OutputAssembler, assemble
from inference_pio.workers.types import FinishReason, ThoughtEnd, TokenKind

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
GREEDY = PLAIN | {"temperature": 0.0}
QUESTION = [{"role": "user", "content": "What is 417 + 58 - 903?"}]


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
