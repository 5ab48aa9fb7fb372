"""Steps that are launched before the one before them is read give what synchronous ones give."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine
from inference_pio.workers.executor import LocalExecutor
from inference_pio.workers.model.cache import KVCache
from inference_pio.workers.model.config import ModelConfig
from inference_pio.workers.parallel.grid import build_executor
from inference_pio.workers.sampling.state import SamplingState
from inference_pio.workers.types import FinishReason, PhaseSampling, PrefillRequest, RequestError

from .conftest import Driver
from .late_executor import LateExecutor

Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
GREEDY = PLAIN | {"temperature": 0.0}
BLOCK = 8
GUARD = {"min_repeats": 4, "min_tokens": 8, "max_period": 4}
POISON = 400

MakePair = Callable[..., tuple[Driver, Driver, LateExecutor]]


@pytest.fixture(scope="module")
def make(make_text_checkpoint: Callable[..., Path]) -> Iterator[MakePair]:
    """A synchronous engine and one on a late device, of the same model and configuration."""
    folder = make_text_checkpoint()
    block_bytes = KVCache.bytes_per_block(ModelConfig.from_folder(folder), BLOCK, torch.float32)
    made: list[LateExecutor] = []

    def pair(*, num_blocks: int = 100, **options: Any) -> tuple[Driver, Driver, LateExecutor]:
        while made:
            made.pop().device.close()
        defaults: dict[str, Any] = {"max_num_seqs": 4, "max_batched_tokens": 64}
        config = EngineConfig(
            model=str(folder),
            kv_cache_bytes=num_blocks * block_bytes,
            block_size=BLOCK,
            loop_guard=GUARD,
            **(defaults | options),
        )
        loaded, inner = build_executor(config)
        assert isinstance(inner, LocalExecutor)
        late = LateExecutor(inner)
        made.append(late)
        return Driver(Engine(config)), Driver(Engine(config, built=(loaded, late))), late

    yield pair
    while made:
        made.pop().device.close()


def outcome(driver: Driver, name: str, index: int) -> dict[str, Any]:
    """All of a choice but the timing of its chunks and what it found in the prefix cache."""
    last = driver.last(name, index)
    return {
        "tokens": driver.tokens(name, index),
        "kinds": driver.kinds(name, index),
        "end": (last.finish_reason, last.stop_reason, last.thought_end),
        "usage": dataclasses.replace(last.usage, cached_tokens=0),
        "logprobs": [(e.token_id, len(e.top)) for e in driver.logprobs(name, index)],
    }


# --- any mix of requests --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """One request of a random run."""

    length: int
    thinks: bool
    params: dict[str, Any]
    priority: int
    start: int
    abort_at: int | None


def _params(**given: Any) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    """Others seldom: one request that has to be waited for is enough to hold up all."""
    return st.sampled_from([usual] * 8 + list(others))


PARAMS = st.builds(
    _params,
    n=mostly(1, 2, 3),
    max_tokens=st.none() | st.integers(1, 30),
    seed=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5, 20]),
    stop_token_ids=st.sampled_from([None, tuple(range(0, 497, 25))]),
    stop=st.sampled_from([None, ("e",)]),
    min_tokens=st.sampled_from([0, 0, 4]),
    bad_words=mostly(None, ((7, 9), (3,)), ((3,),)),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    logprobs=st.sampled_from([None, 2]),
    prompt_logprobs=mostly(None, 1),
    thinking_budget=st.sampled_from([None, 0, 1, 5]),
    loop_guard=st.booleans(),
    thinking=st.sampled_from([None, PhaseSampling(temperature=1.0)]),
    answer=st.sampled_from(
        [
            None,
            PhaseSampling(temperature=0.3, top_k=3),
            PhaseSampling(repetition_penalty=1.3),
        ]
    ),
)
PLANS = st.lists(
    st.builds(
        Plan,
        length=st.integers(1, 40),
        thinks=st.booleans(),
        params=PARAMS,
        priority=st.integers(0, 2),
        start=st.integers(0, 10),
        abort_at=mostly(None, 3, 9, 20),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(
    plans=PLANS,
    blocks=st.sampled_from([18, 100]),
    budget=st.sampled_from([5, 64]),
)
def test_any_mix_of_requests_gives_what_it_gives_synchronously(
    make: MakePair,
    prompt: Prompt,
    plans: list[Plan],
    blocks: int,
    budget: int,
) -> None:
    """Stops, lengths, aborts, preemption, budgets, loops, forks, seeds, edits: all at once."""
    plain, late, _ = make(
        num_blocks=blocks, max_model_len=80, max_batched_tokens=budget, default_reservation=2
    )
    tags = plain.engine.loaded.text.phase_tokens
    assert tags.think_open is not None
    assert tags.think_close is not None
    accepted: dict[str, Plan] = {}
    for driver in (plain, late):
        step = 0
        while step <= 10 or driver.engine.has_work:
            for number, plan in enumerate(plans):
                name, ids, params = str(number), prompt(plan.length), dict(plan.params)
                if plan.thinks:
                    # Few tokens may come, so that thoughts end, and run in circles.
                    ids.append(tags.think_open)
                    params["allowed_token_ids"] = (tags.think_close, 65, 66, 67, 68)
                if plan.start == step:
                    with contextlib.suppress(RequestError):
                        driver.add(name, ids, priority=plan.priority, ignore_eos=True, **params)
                        accepted[name] = plan
                if plan.abort_at == step:
                    driver.engine.abort(name)
            driver.step()
            step += 1
            assert step < 3000, "no progress"
        driver.run()
    assert set(late.chunks) == set(plain.chunks)
    for name, index in late.chunks:
        if FinishReason.ABORT in (late.end(name, index), plain.end(name, index)):
            assert accepted[name].abort_at is not None
            pairs = zip(late.tokens(name, index), plain.tokens(name, index), strict=False)
            assert all(one == other for one, other in pairs)
        else:
            assert outcome(late, name, index) == outcome(plain, name, index)


# --- the order of events --------------------------------------------------------------------------


def test_a_step_is_launched_before_the_one_before_it_is_read(
    make: MakePair, prompt: Prompt
) -> None:
    _, late, executor = make()
    for number in range(3):
        late.add(str(number), prompt(5 + number), max_tokens=6, temperature=0.9, seed=1, **PLAIN)
    late.run()
    expected = ["launch 1"]
    for number in range(1, 6):
        expected += [f"launch {number + 1}", f"read {number}"]
    assert executor.device.events == [*expected, "read 6"]


def test_tokens_are_told_and_arrivals_admitted_while_the_device_computes(
    make: MakePair, prompt: Prompt
) -> None:
    _, late, executor = make()
    device = executor.device
    device.is_held = True
    late.add("first", prompt(9), max_tokens=4, **GREEDY)
    assert not late.step(), "the prompt is under way"
    for count in (1, 2):
        device.release()
        # One more step is queued, and no more were computed than were let through.
        (chunk,) = late.step()
        assert len(chunk.token_ids) == 1
        assert device.num_launched == count + 1
    late.add("second", prompt(5), max_tokens=2, **GREEDY)
    device.release()
    late.step()
    admitted = {s.request_id for s in late.engine._scheduler.running}
    assert admitted == {"first", "second"}, "while step 4 is held"
    assert not late.engine._scheduler.waiting
    device.is_held = False
    for _ in range(9):
        device.release()
    late.run()
    assert [len(late.tokens(name)) for name in ("first", "second")] == [4, 2]


def test_what_depends_on_the_token_is_launched_behind_it(make: MakePair, prompt: Prompt) -> None:
    _, late, executor = make()
    late.add("r", prompt(9), max_tokens=4, bad_words=((7, 9),), **GREEDY)
    late.run()
    expected = [f"{what} {number}" for number in range(1, 5) for what in ("launch", "read")]
    assert executor.device.events == expected


def test_a_long_prompt_is_not_queued_as_a_whole(make: MakePair, prompt: Prompt) -> None:
    _, late, executor = make(max_batched_tokens=8, max_model_len=200)
    executor.device.is_held = True
    late.add("r", prompt(64), max_tokens=1, **GREEDY)
    for count in range(1, 8):
        late.step()
        assert executor.device.num_launched == count
        assert executor.device.num_computed == count - 1
        executor.device.release()
    executor.device.release()
    late.run()
    assert executor.device.num_launched == 8


PENALTIES = [
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.4, "repetition_penalty": 1.3},
    {
        "presence_penalty": 0.3,
        "thinking": PhaseSampling(repetition_penalty=0.7),
        "answer": PhaseSampling(repetition_penalty=1.6),
    },
]


@pytest.mark.parametrize("params", [*PENALTIES, {"logprobs": 3}, PENALTIES[1] | {"logprobs": 0}])
def test_the_device_counts_a_token_that_the_host_has_not_read(
    make: MakePair, prompt: Prompt, params: dict[str, Any]
) -> None:
    """Few tokens may come, so that each is new once and comes again and again behind that."""
    plain, late, executor = make()
    tags = plain.engine.loaded.text.phase_tokens
    drawn = PLAIN | {"temperature": 0.8, "seed": 3, "allowed_token_ids": tuple(range(60, 66))}
    for driver in (plain, late):
        driver.add("answers", prompt(9), max_tokens=20, **drawn, **params)
        driver.add("thinks", [*prompt(7), tags.think_open], max_tokens=20, **drawn, **params)
        driver.add("other", prompt(5), max_tokens=9, **GREEDY)
        driver.run()
    for name in ("answers", "thinks", "other"):
        assert outcome(late, name, 0) == outcome(plain, name, 0)
    if "logprobs" in params:
        assert len(late.logprobs("answers")) == 20
        assert late.logprobs("answers") == plain.logprobs("answers")
    events = executor.device.events
    assert events[:4] == ["launch 1", "launch 2", "read 1", "launch 3"]
    assert [event.split()[0] for event in events].count("launch") <= 21


def test_a_repetition_penalty_of_a_phase_does_not_count_tags(
    make: MakePair, prompt: Prompt
) -> None:
    """What was computed behind one is thrown away."""
    plain, late, _ = make()
    tags = plain.engine.loaded.text.phase_tokens
    assert tags.tool_open is not None
    assert tags.tool_close is not None
    allowed = (tags.tool_open, tags.tool_close, 65, 66)
    params = PLAIN | {"answer": PhaseSampling(repetition_penalty=3.0), "allowed_token_ids": allowed}
    for driver in (plain, late):
        for seed in range(3):
            ids = prompt(9 + seed)
            driver.add(str(seed), ids, max_tokens=30, temperature=2.0, seed=seed, **params)
        driver.run()
    for seed in range(3):
        assert tags.tool_open in late.tokens(str(seed))
        assert outcome(late, str(seed), 0) == outcome(plain, str(seed), 0)


# --- ends and their blocks ------------------------------------------------------------------------


def test_a_token_too_many_is_dropped_and_leaves_no_prefix(make: MakePair, prompt: Prompt) -> None:
    """The step behind an end fills the block that the ended sequence was in."""
    plain, late, executor = make()
    ids = prompt(2 * BLOCK - 1)
    for driver in (plain, late):
        driver.add("r", ids, max_tokens=9, **GREEDY)
        driver.run()
    stop = plain.tokens("r")[0]
    executor.device.events.clear()
    late.add("stopped", ids, max_tokens=9, stop_token_ids=(stop,), **GREEDY)
    late.run()
    assert late.tokens("stopped") == [stop]
    assert [event.split()[0] for event in executor.device.events][:2] == ["launch", "launch"]
    # Its last token was computed, but nobody counted on it: the next prompt finds the first run's.
    late.engine.check_integrity()
    late.add("again", [*ids, stop, *prompt(9)], max_tokens=4, **GREEDY)
    plain.add("again", [*ids, stop, *prompt(9)], max_tokens=4, **GREEDY)
    late.run()
    plain.run()
    assert late.tokens("again") == plain.tokens("again")
    assert late.last("again").usage.cached_tokens == plain.last("again").usage.cached_tokens


@pytest.mark.parametrize("attention", ["sliding_window:20", "sink_window:12+4"])
def test_what_a_window_gives_back_goes_to_others_while_a_step_is_under_way(
    make: MakePair, prompt: Prompt, attention: str
) -> None:
    plain, late, executor = make(
        attention=attention, num_blocks=16, max_model_len=300, max_batched_tokens=16
    )
    for driver in (plain, late):
        for number in range(4):
            driver.add(str(number), prompt(90 + number, number), max_tokens=40, **GREEDY)
        driver.run()
    events = executor.device.events
    assert sum(a[0] == b[0] == "l" for a, b in pairwise(events)) >= 1, "steps behind steps"
    for number in range(4):
        assert outcome(late, str(number), 0) == outcome(plain, str(number), 0)


def test_the_last_token_of_a_length_is_known_to_be_one(make: MakePair, prompt: Prompt) -> None:
    _, late, executor = make()
    late.add("short", prompt(9), max_tokens=2, **GREEDY)
    late.add("long", prompt(5), max_tokens=5, **GREEDY)
    rows: list[int] = []
    plain = executor.inner.forward

    def forward(inputs: Any) -> Tensor:
        rows.append(len(inputs.sample_rows))
        return plain(inputs)

    executor.inner.forward = forward  # type: ignore[method-assign]
    late.run()
    assert rows == [2, 2, 1, 1, 1]


def test_an_abort_while_a_step_is_under_way(make: MakePair, prompt: Prompt) -> None:
    plain, late, _ = make(num_blocks=12)
    for driver in (plain, late):
        driver.add("other", prompt(9), max_tokens=30, **GREEDY)
    late.add("r", prompt(20), max_tokens=30, **GREEDY)
    for _ in range(3):
        late.step()
    late.engine.abort("r")
    # Its blocks go to the next one at once, while the device still writes to them.
    late.add("next", prompt(21), max_tokens=30, **GREEDY)
    plain.add("next", prompt(21), max_tokens=30, **GREEDY)
    late.run()
    plain.run()
    assert late.end("r") is FinishReason.ABORT
    assert len(late.tokens("r")) == 2
    for name in ("other", "next"):
        assert late.tokens(name) == plain.tokens(name)


def test_an_abort_of_choices_about_to_part(make: MakePair, prompt: Prompt) -> None:
    """The tokens of the others stand behind theirs."""
    plain, late, executor = make()
    for driver in (plain, late):
        driver.add("parting", prompt(9), n=3, max_tokens=9, **GREEDY)
        driver.add("other", prompt(11), max_tokens=9, **GREEDY)
        driver.step()
        driver.engine.abort("parting")
        driver.run()
    assert executor.device.events[:3] == ["launch 1", "launch 2", "read 1"]
    assert late.tokens("other") == plain.tokens("other")


def test_the_end_of_all_while_a_step_is_under_way(make: MakePair, prompt: Prompt) -> None:
    _, late, _ = make()
    late.add("r", prompt(20), max_tokens=30, **GREEDY)
    late.step()
    output = late.engine.fail_all("a test")
    assert [chunk.error.code for chunk in output.chunks if chunk.error] == ["engine_dead"]
    assert not late.engine.is_prefilling("r", 0)
    assert late.engine._under_way is None


def test_a_prefill_for_another_engine_is_sent_as_it_is_computed(
    make: MakePair, prompt: Prompt
) -> None:
    """Its blocks are read before another step is launched, which would hold them up."""
    plain, late, executor = make(max_batched_tokens=16)
    sent: list[list[bytes]] = []
    for driver in (plain, late):
        driver.add("other", prompt(9), max_tokens=12, **GREEDY)
        request = PrefillRequest("p", 1, 2, tuple(prompt(40)), 0, "", 30.0, 0)
        driver.engine.add_prefill(request)
        tickets: list[bytes] = []
        while driver.engine.has_work:
            driver.step()
            tickets += [bytes(ticket.buffer) for ticket in driver.output.tickets]
        sent.append(tickets)
    assert sent[0] == sent[1]
    events = executor.device.events
    places = [place for place, event in enumerate(events) if event == "read blocks"]
    assert len(places) == len(sent[1]) == 3
    for place in places:
        before = [event.split()[0] for event in events[:place] if event != "read blocks"]
        assert before.count("launch") == before.count("read"), "another step is in the way"
    assert late.tokens("other") == plain.tokens("other")


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["at the launch", "on the device"])
@pytest.mark.parametrize("place", [3, 38])
def test_a_step_that_raises_fails_its_request_alone(
    make: MakePair, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, when: str, place: int
) -> None:
    """``place`` 38 lies in the prompt's last chunk, which is launched behind the ones before."""
    plain, late, executor = make(max_batched_tokens=16)
    raised: list[str] = []
    target = executor if when == "at the launch" else executor.inner
    inner = target.forward

    def forward(inputs: Any) -> Tensor:
        if POISON in inputs.token_ids:
            raised.append(when)
            raise RuntimeError("injected")
        return inner(inputs)

    monkeypatch.setattr(target, "forward", forward)
    allowed = tuple(range(300))
    for driver in (plain, late):
        for number in range(3):
            ids = [token % 300 for token in prompt(9 + 6 * number)]
            driver.add(f"n{number}", ids, max_tokens=12, allowed_token_ids=allowed, seed=2, **PLAIN)
        for _ in range(3):
            driver.step()
        if driver is late:
            bad = [token % 300 for token in prompt(40)]
            bad[place] = POISON
            driver.add("bad", bad, max_tokens=5, **GREEDY)
        driver.run()
    assert raised
    assert late.end("bad") is FinishReason.ERROR
    for number in range(3):
        assert outcome(late, f"n{number}", 0) == outcome(plain, f"n{number}", 0)


def test_nan_fails_its_request_though_the_next_step_was_launched(
    make: MakePair, prompt: Prompt
) -> None:
    plain, late, executor = make()
    model = executor.inner.model
    assert isinstance(model.embedding, Tensor)
    raised = []
    inner = executor.inner.forward

    def forward(inputs: Any) -> Tensor:
        try:
            return inner(inputs)
        except Exception as error:
            raised.append(error)
            raise

    executor.inner.forward = forward  # type: ignore[method-assign]
    model.embedding = model.embedding.clone()
    model.embedding[POISON] = float("nan")
    for driver in (plain, late):
        driver.add("n", prompt(9), max_tokens=12, allowed_token_ids=tuple(range(300)), **GREEDY)
    bad = [token % 300 for token in prompt(30)]
    late.add("bad", [*bad, POISON], max_tokens=5, **GREEDY)
    late.run()
    plain.run()
    assert late.end("bad") is FinishReason.ERROR
    assert not late.tokens("bad")
    assert outcome(late, "n", 0) == outcome(plain, "n", 0)
    assert executor.device.events[:2] == ["launch 1", "launch 2"]
    assert not raised, "on a GPU an id that is none ends everything"


@pytest.mark.parametrize("method", ["row", "row_behind"])
def test_a_choice_that_raises_fails_alone(
    make: MakePair, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    plain, late, _ = make()
    for driver in (plain, late):
        driver.add("n", prompt(9), max_tokens=8, **GREEDY)
    late.add("bad", prompt(9), max_tokens=7, **GREEDY)
    late.step()
    inner = getattr(SamplingState, method)
    bad = late.engine._requests._choices[late.engine._scheduler.running[1]]
    assert bad.request.request_id == "bad"

    def broken(state: SamplingState, *operands: Any) -> Any:
        if state is bad._sampling:
            raise ZeroDivisionError("injected")
        return inner(state, *operands)

    monkeypatch.setattr(SamplingState, method, broken)
    late.run()
    plain.run()
    assert late.end("bad") is FinishReason.ERROR
    assert outcome(late, "n", 0) == outcome(plain, "n", 0)
