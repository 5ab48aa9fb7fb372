"""Requests that another engine began: the unbroken output is the first part and what follows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.workers.types import (
    FinishReason,
    RequestError,
    Resumption,
    ThoughtEnd,
    TokenKind,
)

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
GREEDY = PLAIN | {"temperature": 0.0}
SEEDED = PLAIN | {"temperature": 1.0, "seed": 5}
"""The random model repeats itself where it is greedy."""


def told(driver: Any, name: str, index: int) -> dict[str, Any]:
    """All that a reader learns of a choice."""
    last = driver.last(name, index)
    return {
        "tokens": driver.tokens(name, index),
        "kinds": driver.kinds(name, index),
        "tops": [[token for token, _ in e.top] for e in driver.logprobs(name, index)],
        "finish": last.finish_reason,
        "stop": last.stop_reason,
        "thought": last.thought_end,
        "completion": last.usage.completion_tokens,
        "reasoning": last.usage.reasoning_tokens,
        "prompt": last.usage.prompt_tokens,
    }


def joined(first: dict[str, Any], cut: int, second: dict[str, Any]) -> dict[str, Any]:
    """What the reader of a broken stream has in the end."""
    parts = ("tokens", "kinds", "tops")
    return second | {key: first[key][:cut] + second[key] for key in parts}


class Broken:
    """Runs requests unbroken on one engine, and from a cut on another of the same settings."""

    def __init__(self, make_driver: MakeDriver, **options: Any) -> None:
        self.whole = make_driver(**options)
        self.rest = make_driver(**options)
        self._names = map(str, itertools.count())

    def unbroken(self, prompt: list[int], **params: Any) -> str:
        """The name of a request that has run on the first engine."""
        name = next(self._names)
        self.whole.add(name, prompt, **params)
        self.whole.run()
        return name

    def check(
        self, prompt: list[int], cuts: dict[int, float], logprob_error: float = 1e-3, **params: Any
    ) -> dict[str, Any]:
        """The unbroken output, after comparing it with what ``cuts`` (fractions) give."""
        name = self.unbroken(prompt, **params)
        lengths = {i: round(cut * len(self.whole.tokens(name, i))) for i, cut in cuts.items()}
        resume = tuple(
            Resumption(index, tuple(self.whole.tokens(name, index)[:length]))
            for index, length in lengths.items()
        )
        self.rest.add(name, prompt, resume=resume, **params)
        self.rest.run()
        assert {key[1] for key in self.rest.chunks if key[0] == name} == set(cuts)
        for index, length in lengths.items():
            first, second = told(self.whole, name, index), told(self.rest, name, index)
            assert joined(first, length, second) == first
            before = self.whole.logprobs(name, index)[length:]
            after = self.rest.logprobs(name, index)
            for a, b in zip(before, after, strict=True):
                assert abs(a.logprob - b.logprob) <= logprob_error
        return told(self.whole, name, 0)


@pytest.fixture(scope="module")
def broken(make_driver: MakeDriver) -> Broken:
    return Broken(make_driver, num_blocks=400)


@pytest.fixture(scope="module")
def thinker(make_driver: MakeDriver, embedded_dir: Any) -> Broken:
    """The embedded model in float32, which thinks, answers and stops by itself."""
    return Broken(make_driver, folder=embedded_dir, num_blocks=400, dtype="float32")


def question(broken: Broken, text: str, *, thinking: bool) -> list[int]:
    template = broken.whole.engine.loaded.text.template
    messages = [{"role": "user", "content": text}]
    found: list[int] = template.render(messages, enable_thinking=thinking)
    return found


SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_k": st.sampled_from([0, 20]),
        "presence_penalty": st.sampled_from([0.0, 0.8]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logprobs": st.sampled_from([None, 0, 3]),
        "max_tokens": st.integers(1, 40),
        "seed": st.sampled_from([None, 7]),
        "n": st.integers(1, 3),
    }
)


@settings(max_examples=60, deadline=None)
@given(params=SAMPLING, length=st.integers(1, 50), data=st.data())
def test_any_cut_gives_the_unbroken_output(
    broken: Broken, prompt: Prompt, params: dict[str, Any], length: int, data: st.DataObject
) -> None:
    indices = st.lists(st.integers(0, params["n"] - 1), min_size=1, unique=True)
    cuts = {index: data.draw(st.floats(0, 1)) for index in data.draw(indices)}
    broken.check(prompt(length, seed=length), cuts, **PLAIN, **params)


@settings(max_examples=25, deadline=None)
@given(
    cut=st.floats(0, 1),
    thinking=st.booleans(),
    budget=st.sampled_from([None, 0, 1, 5, 12]),
    temperature=st.sampled_from([0.0, 0.9]),
    numbers=st.tuples(st.integers(0, 999), st.integers(0, 99), st.integers(0, 999)),
    stop=st.sampled_from([(), ("-",), ("4", "28"), ("\n\n",)]),
    stop_in_thought=st.booleans(),
    min_tokens=st.sampled_from([0, 6]),
)
def test_any_cut_of_a_thought_and_its_answer(
    thinker: Broken,
    cut: float,
    thinking: bool,
    budget: int | None,
    temperature: float,
    numbers: tuple[int, int, int],
    stop: tuple[str, ...],
    stop_in_thought: bool,
    min_tokens: int,
) -> None:
    a, b, c = numbers
    thinker.check(
        question(thinker, f"What is {a} + {b} - {c}?", thinking=thinking),
        {0: cut},
        thinking_budget=budget,
        temperature=temperature,
        seed=3,
        stop=stop,
        stop_in_thought=stop_in_thought,
        min_tokens=min_tokens,
        max_tokens=150,
    )


# --- forced text, loops and stops across the cut --------------------------------------------------


@pytest.mark.parametrize("budget", [0, 6])
def test_every_cut_around_a_forced_text(thinker: Broken, budget: int) -> None:
    prompt = question(thinker, "What is 417 + 58 - 903?", thinking=True)
    params = {"thinking_budget": budget, "temperature": 0.0, "logprobs": 2, "max_tokens": 120}
    whole = thinker.check(prompt, {0: 0.0}, **params)
    assert whole["thought"] is ThoughtEnd.BUDGET
    close = whole["kinds"].index(TokenKind.TAG, 1)
    length = len(whole["tokens"])
    for cut in {*range(0, length, 9), *range(budget + 4), *range(close - 1, length + 1)}:
        thinker.check(prompt, {0: cut / length}, **params)


def test_the_rest_of_a_forced_text_comes_before_any_forward(thinker: Broken) -> None:
    prompt = question(thinker, "What is 417 + 58 - 903?", thinking=True)
    stop_text = thinker.whole.engine.loaded.text.phase_tokens.stop_text_ids
    params = {"thinking_budget": 6, "temperature": 0.0, "max_tokens": 120}
    name = thinker.unbroken(prompt, **params)
    tokens = thinker.whole.tokens(name)
    begin = next(i for i in range(120) if tuple(tokens[i : i + len(stop_text)]) == stop_text)
    cut = begin + 2
    steps = thinker.rest.engine.stats().steps
    thinker.rest.add(name, prompt, resume=(Resumption(0, tuple(tokens[:cut])),), **params)
    (chunk,) = thinker.rest.engine.abort_all().chunks[:1]
    assert thinker.rest.engine.stats().steps == steps
    assert chunk.token_ids == tuple(stop_text[2:])
    assert chunk.first == cut


def test_a_loop_is_caught_where_the_unbroken_run_catches_it(
    make_driver: MakeDriver, make_text_checkpoint: Callable[..., Any], prompt: Prompt
) -> None:
    """The guard counts copies on both sides of the cut."""
    guard = {"min_repeats": 4, "min_tokens": 8, "max_period": 4}
    broken = Broken(make_driver, num_blocks=100, loop_guard=guard)
    engine = broken.whole.engine
    ids = [*prompt(8), engine.loaded.text.phase_tokens.think_open]
    # One token is all that may come: the thought is a loop from its first token on.
    params = {"allowed_token_ids": (65,), "temperature": 0.0, "max_tokens": 120}
    whole = broken.check(ids, {0: 0.0}, **params)
    assert whole["thought"] is ThoughtEnd.LOOP
    for cut in range(1, 12):
        broken.check(ids, {0: cut / len(whole["tokens"])}, **params)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_the_cut(broken: Broken, prompt: Prompt, include: bool) -> None:
    ids = prompt(12, seed=3)
    decode = broken.whole.engine.loaded.tokenizer.decode
    tokens = broken.whole.tokens(broken.unbroken(ids, max_tokens=20, **SEEDED))
    before, stop = decode(tokens[:9]), decode(tokens[9:13])
    assert stop not in before + decode(tokens[9:12]), "choose another seed: it stops early"
    params = {"stop": (stop,), "include_stop_str_in_output": include, "max_tokens": 20} | SEEDED
    whole = broken.check(ids, {0: 0.0}, **params)
    assert (whole["finish"], whole["stop"]) == (FinishReason.STOP, stop)
    for cut in range(1, len(whole["tokens"]) + 1):
        broken.check(ids, {0: cut / len(whole["tokens"])}, **params)


@pytest.mark.parametrize("min_tokens", [0, 10])
def test_bans_and_minimum_across_the_cut(broken: Broken, prompt: Prompt, min_tokens: int) -> None:
    ids = prompt(20, seed=5)
    a, b, c, d = broken.whole.tokens(broken.unbroken(ids, max_tokens=12, **SEEDED))[2:6]
    params = {
        "bad_words": ((a, b), (b, c, d)),
        "stop_token_ids": (d,),
        "min_tokens": min_tokens,
        "max_tokens": 20,
    } | SEEDED
    whole = broken.check(ids, {0: 0.0}, **params)
    for cut in range(1, len(whole["tokens"]) + 1):
        broken.check(ids, {0: cut / len(whole["tokens"])}, **params)


# --- what is complete, and what cannot be gone on with --------------------------------------------


@pytest.mark.parametrize(
    ("params", "finish"),
    [
        ({"max_tokens": 6}, FinishReason.LENGTH),
        ({"max_tokens": 20, "stop_token_ids": True}, FinishReason.STOP),
        ({"max_tokens": 20, "stop": True}, FinishReason.STOP),
    ],
)
def test_a_complete_choice_ends_at_once_without_a_step(
    broken: Broken, prompt: Prompt, params: dict[str, Any], finish: FinishReason
) -> None:
    ids = prompt(9, seed=4)
    name = broken.unbroken(ids, max_tokens=6, **SEEDED)
    tokens = tuple(broken.whole.tokens(name))
    params = SEEDED | params
    if params.get("stop_token_ids"):
        params["stop_token_ids"] = (tokens[-1],)
        assert tokens[-1] not in tokens[:-1], "choose another seed: it stops early"
    if params.get("stop"):
        params["stop"] = (broken.whole.engine.loaded.tokenizer.decode(tokens[-2:]),)
    steps = broken.rest.engine.stats().steps
    broken.rest.add(name, ids, resume=(Resumption(0, tokens),), **params)
    broken.rest.run()
    chunk = broken.rest.chunks[name, 0][0]
    assert (chunk.token_ids, chunk.first, chunk.finish_reason) == ((), 6, finish)
    assert chunk.usage.completion_tokens == 6
    assert broken.rest.engine.stats().steps == steps
    assert not broken.rest.engine.is_open(name)


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ((Resumption(0, (5,)), Resumption(0, ())), r"choices \[0, 0\] are resumed: one of them"),
        ((Resumption(2, (5,)),), "the resumed choice 2 is none of the request's 2"),
        ((Resumption(-1, (5,)),), "the resumed choice -1 is none"),
        ((Resumption(1, (5,) * 9),), "choice 1 has 9 tokens; 8 are the most it may have"),
        ((Resumption(1, (5, 497)),), "the resumed choice 1 holds id 497"),
    ],
)
def test_a_resumption_that_makes_no_sense_is_refused(
    broken: Broken, prompt: Prompt, resume: tuple[Resumption, ...], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        broken.rest.add("r", prompt(5), resume=resume, n=2, max_tokens=8)
    assert caught.value.param == "resume"
    assert not broken.rest.engine.has_work


def test_tokens_that_are_no_output_of_this_engine_are_refused(
    thinker: Broken, prompt: Prompt
) -> None:
    ids = question(thinker, "What is 1 + 1?", thinking=True)
    rest = thinker.rest
    stop = prompt(1)[0]
    for tokens, params, message in (
        ((5, stop, 6), {"stop_token_ids": (stop,)}, "3 tokens, but it ends after 2"),
        ((5, 6, 7, 8), {"thinking_budget": 0}, "id 5 at 0, where another one is forced"),
    ):
        if "thinking_budget" in params:
            ids = [*ids, thinker.rest.engine.loaded.text.phase_tokens.think_open]
        with pytest.raises(RequestError, match=message) as caught:
            rest.add("r", ids, resume=(Resumption(0, tokens),), max_tokens=20, **params)
        assert caught.value.code == "resume_mismatch"
    assert not rest.engine.has_work
    rest.engine.check_integrity()


# --- several choices ------------------------------------------------------------------------------


def test_only_the_named_choices_run(broken: Broken, prompt: Prompt) -> None:
    params = PLAIN | {"n": 4, "temperature": 1.0, "seed": 11, "max_tokens": 12}
    broken.check(prompt(30, seed=8), {3: 0.5, 1: 0.0, 2: 0.0}, **params)
    broken.check(prompt(30, seed=8), {2: 0.3}, **params)


def test_choices_without_output_share_their_prompt(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(prefix_caching=False, max_batched_tokens=200)
    fresh = (Resumption(1, ()), Resumption(3, ()))
    driver.add("r", prompt(60), resume=fresh, n=4, max_tokens=5, **GREEDY)
    driver.step()
    blocks = {tuple(s.block_table[:3]) for s in driver.engine._scheduler.running}
    assert len(blocks) == 1
    driver.run()
    assert set(driver.chunks) == {("r", 1), ("r", 3)}


def test_an_abort_ends_every_resumed_choice(broken: Broken, prompt: Prompt) -> None:
    rest = broken.rest
    resume = (Resumption(0, (5, 6)), Resumption(2, ()), Resumption(1, ()))
    rest.add("aborted", prompt(20), resume=resume, n=3, max_tokens=9, **GREEDY)
    rest.engine.abort("aborted")
    rest.run()
    for index, first in ((0, 2), (1, 0), (2, 0)):
        (chunk,) = rest.chunks.pop(("aborted", index))
        assert (chunk.first, chunk.finish_reason) == (first, FinishReason.ABORT)


def test_a_request_that_no_longer_fits_as_a_whole_is_resumed_in_parts(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    """Three choices at a time are too many for this engine, but only one is left."""
    driver = make_driver(num_blocks=10, max_num_seqs=2)
    resume = (Resumption(2, (7, 8)),)
    driver.add("r", prompt(40), resume=resume, n=3, max_tokens=60, **GREEDY)
    driver.run()
    assert len(driver.tokens("r", 2)) == 58


# --- log-probabilities of the prompt --------------------------------------------------------------


def test_prompt_logprobs_are_told_once(broken: Broken, prompt: Prompt) -> None:
    ids = prompt(25, seed=6)
    params = {"prompt_logprobs": 2, "n": 2, "max_tokens": 8} | GREEDY
    whole, rest = broken.whole, broken.rest
    name = broken.unbroken(ids, **params)
    resume = (Resumption(0, tuple(whole.tokens(name)[:3])), Resumption(1, ()))
    rest.add(name, ids, resume=resume, **params)
    rest.run()
    assert all(chunk.prompt_logprobs is None for chunk in rest.chunks[name, 0])
    told = rest.chunks[name, 1][0].prompt_logprobs
    expected = whole.chunks[name, 1][0].prompt_logprobs
    assert [None if e is None else e.token_id for e in told] == [None, *ids[1:]]
    for one, other in zip(told[1:], expected[1:], strict=True):
        assert abs(one.logprob - other.logprob) < 1e-3


def test_a_resumed_choice_uses_the_prefix_cache_for_its_output_too(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    driver = make_driver()
    ids = prompt(20)
    driver.add("first", ids, max_tokens=40, **GREEDY)
    driver.run()
    tokens = tuple(driver.tokens("first"))
    hits = driver.engine.stats().prefix_hit_tokens
    driver.add("again", ids, resume=(Resumption(0, tokens[:30]),), max_tokens=40, **GREEDY)
    driver.run()
    assert driver.engine.stats().prefix_hit_tokens - hits == 48
    assert driver.last("again").usage.cached_tokens == 20, "of the prompt, which has no more"
    assert tokens[30:] == tuple(driver.tokens("again"))
