"""The engine without a server: results in order, streams, conversations and tools."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inference_pio import LLM, EngineConfig, RequestError, SamplingParams
from inference_pio.embedded import tasks
from inference_pio.workers.async_engine import EngineDeadError
from inference_pio.workers.text.assembler import OutputDelta
from inference_pio.workers.types import FinishReason

Prompt = Callable[..., list[int]]

WAIT_S = 60.0
GREEDY = {"temperature": 0.0, "ignore_eos": True, "loop_guard": False}
QUESTION = [{"role": "user", "content": "What is 417 + 58 - 903?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The embedded model in float32, so that no text depends on the batch."""
    with LLM("embedded", dtype="float32", block_size=16, kv_cache_bytes=16 << 20) as llm:
        yield llm


@pytest.fixture
def narrow(make_text_checkpoint: Callable[..., Path]) -> Iterator[LLM]:
    """A tiny random model with one place in the batch and two in the queue."""
    with LLM(
        str(make_text_checkpoint()),
        max_waiting=2,
        max_num_seqs=1,
        max_model_len=2000,
        kv_cache_bytes=4 << 20,
    ) as llm:
        yield llm


def wait_until_quiet(llm: LLM) -> None:
    """A turn of the loop behind everything handed over so far, and then nothing held."""
    for _ in range(2):
        asyncio.run(llm._loop.health(WAIT_S))
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    llm.engine.check_integrity()
    assert not llm._mailboxes


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    rng = random.Random(0)
    numbers = [rng.randint(100, 999) for _ in range(12)]
    prompts = [
        f"<|im_start|>user\nWhat is {n} + 58 - 103?<|im_end|>\n<|im_start|>assistant\n"
        for n in numbers
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0))
    answers = [output.choices[0].content for output in outputs]
    right = [str(n + 58 - 103) for n in numbers]
    assert sum(a == b for a, b in zip(answers, right, strict=True)) >= 10
    wait_until_quiet(llm)


def test_text_and_ids_and_one_or_many(llm: LLM) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.engine.loaded.tokenizer.encode(text, parse_special=True)
    params = SamplingParams(max_tokens=5, **GREEDY)
    outputs = [
        *llm.generate(text, params),
        *llm.generate(ids, params),
        *llm.generate([text, ids], params),
        *llm.generate([text, ids], [params, params]),
    ]
    assert len(outputs) == 6
    assert len({output.choices[0].token_ids for output in outputs}) == 1
    assert {output.prompt_token_ids for output in outputs} == {tuple(ids)}
    assert llm.generate([]) == []
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling params"):
        llm.generate([text, ids], [params])


def test_the_parts_of_a_choice(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, n=2, logprobs=3, prompt_logprobs=1)
    output = llm.chat(QUESTION, params)
    assert [choice.index for choice in output.choices] == [0, 1]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for choice in output.choices:
        assert choice.content == "-428"
        assert choice.reasoning is not None
        assert "0475" in choice.reasoning
        assert choice.text == f"<think>\n{choice.reasoning}\n</think>\n\n-428"
        assert choice.tool_calls == ()
        assert choice.finish_reason is FinishReason.STOP
        assert choice.logprobs is not None
        assert [entry.token_id for entry in choice.logprobs] == list(choice.token_ids)
        assert choice.usage.completion_tokens == len(choice.token_ids)
    plain = llm.chat(QUESTION, SamplingParams(temperature=0.0), enable_thinking=False).choices[0]
    assert plain.reasoning is None
    assert plain.content == plain.text != ""
    assert plain.logprobs is None


def test_the_embedded_model_calls_its_calculator(llm: LLM) -> None:
    tool = tasks.calculator_tool(random.Random(0))
    question = [{"role": "user", "content": "Use the calculator: 417 * 58"}]
    output = llm.chat(question, SamplingParams(temperature=0.0), tools=[tool])
    choice = output.choices[0]
    (call,) = choice.tool_calls
    assert call.name == "calculator"
    assert json.loads(call.arguments) == {"expression": "417 * 58"}
    assert choice.content == ""
    assert choice.finish_reason is FinishReason.STOP
    assert "<tool_call>" in choice.text
    # Told no tools, the same tokens are text.
    again = llm.generate([output.prompt_token_ids], SamplingParams(temperature=0.0))[0].choices[0]
    assert again.token_ids == choice.token_ids
    assert again.tool_calls == ()
    assert "<tool_call>" in again.content


def test_more_prompts_than_may_wait(narrow: LLM, prompt: Prompt) -> None:
    prompts = [prompt(4 + number) for number in range(12)]
    outputs = narrow.generate(prompts, SamplingParams(max_tokens=3, **GREEDY))
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert all(len(output.choices[0].token_ids) == 3 for output in outputs)
    wait_until_quiet(narrow)


def test_a_queue_full_of_others_is_waited_for(
    narrow: LLM, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller with nothing in the engine has no chunk to wait for, only a place."""
    model, entered, go = narrow.engine.loaded.model, threading.Event(), threading.Event()
    plain, results = model.forward, []

    def forward(*args: Any) -> Any:
        entered.set()
        assert go.wait(WAIT_S)
        return plain(*args)

    monkeypatch.setattr(model, "forward", forward)
    params = SamplingParams(max_tokens=3, **GREEDY)
    callers = [
        threading.Thread(
            target=lambda: results.append(narrow.generate([prompt(5)] * 3, params)), daemon=True
        )
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    assert entered.wait(WAIT_S)
    while narrow.engine.num_waiting + len(narrow._loop._arrivals) < 2:
        callers[0].join(0.001)
    go.set()
    for caller in callers:
        caller.join(WAIT_S)
        assert not caller.is_alive()
    assert [len(result) for result in results] == [3, 3, 3]
    wait_until_quiet(narrow)


def test_one_bad_prompt_of_a_call_refuses_the_call_at_once(narrow: LLM, prompt: Prompt) -> None:
    with pytest.raises(RequestError, match="the context limit is 2000 tokens"):
        narrow.generate([prompt(5), prompt(3000)])
    assert narrow.engine.stats().prompt_tokens == 0


def test_a_request_that_fails_raises_and_aborts_the_others(
    narrow: LLM, prompt: Prompt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = narrow.engine.loaded.model
    plain = model.forward
    raised = []

    def forward(token_ids: Any, *args: Any) -> Any:
        if len(token_ids) == 7:
            raised.append(7)
            raise RuntimeError("injected")
        return plain(token_ids, *args)

    monkeypatch.setattr(model, "forward", forward)
    params = SamplingParams(max_tokens=1500, **GREEDY)
    with (
        caplog.at_level(logging.CRITICAL, "inference_pio"),
        pytest.raises(RequestError, match="failed on this request: RuntimeError"),
    ):
        narrow.generate([prompt(7), prompt(8)], params)
    assert raised == [7]
    wait_until_quiet(narrow)


def join(deltas: list[OutputDelta]) -> tuple[str, str]:
    return "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas)


def test_a_stream_joined_is_the_whole_answer(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=3, n=2, logprobs=0)
    whole = llm.chat(QUESTION, params)

    async def read() -> tuple[list[list[OutputDelta]], list[Any]]:
        deltas: list[list[OutputDelta]] = [[], []]
        ends: list[Any] = [None, None]
        async for part in llm.stream(QUESTION, params):
            assert ends[part.index] is None
            deltas[part.index].append(part.delta)
            ends[part.index] = part.finish_reason
        return deltas, ends

    deltas, ends = asyncio.run(read())
    for index, choice in enumerate(whole.choices):
        assert len(deltas[index]) > 20
        assert join(deltas[index]) == (choice.content, choice.reasoning)
        assert ends[index] is choice.finish_reason
        entries = [entry for delta in deltas[index] for entry in delta.logprobs]
        assert [entry.token_id for entry in entries] == list(choice.token_ids[:-1])  # not the stop
    wait_until_quiet(llm)


@pytest.mark.parametrize("after", [0, 3])
def test_leaving_a_stream_early_aborts_its_request(narrow: LLM, prompt: Prompt, after: int) -> None:
    async def leave() -> None:
        stream = narrow.stream(prompt(5), SamplingParams(max_tokens=1900, **GREEDY))
        count = 0
        async for _ in stream:
            count += 1
            if count > after:
                break
        await stream.aclose()

    asyncio.run(leave())
    wait_until_quiet(narrow)
    assert narrow.engine.stats().requests_finished == {"abort": 1}
    assert narrow.engine.stats().generated_tokens < 1900


def test_a_cancelled_reader_aborts_its_request(narrow: LLM, prompt: Prompt) -> None:
    async def read() -> None:
        async for _ in narrow.stream(prompt(5), SamplingParams(max_tokens=1900, **GREEDY)):
            pass

    async def cancel() -> None:
        task = asyncio.ensure_future(read())
        while not narrow.engine.stats().generated_tokens:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    wait_until_quiet(narrow)
    assert narrow.engine.stats().requests_finished == {"abort": 1}


def test_a_loop_that_closes_under_its_reader_harms_nobody(narrow: LLM, prompt: Prompt) -> None:
    stream = narrow.stream(prompt(5), SamplingParams(max_tokens=1900, **GREEDY))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(stream))
    loop.close()
    (output,) = narrow.generate([prompt(6)], SamplingParams(max_tokens=3, **GREEDY))
    assert len(output.choices[0].token_ids) == 3
    wait_until_quiet(narrow)
    assert narrow.engine.stats().requests_finished == {"abort": 1, "length": 1}
    del stream
    gc.collect()


def test_a_stream_of_a_bad_request_raises_at_its_first_turn(narrow: LLM, prompt: Prompt) -> None:
    async def read() -> None:
        async for _ in narrow.stream(prompt(3000)):
            pytest.fail("nothing can come")

    with pytest.raises(RequestError, match="the context limit"):
        asyncio.run(read())
    wait_until_quiet(narrow)


def test_stop_strings_and_min_tokens_cut_text_where_the_engine_stopped(llm: LLM) -> None:
    params = {"temperature": 0.0, "stop": ("4",)}
    early = llm.chat(QUESTION, SamplingParams(**params)).choices[0]
    assert (early.content, early.stop_reason) == ("-", "4")
    late = llm.chat(QUESTION, SamplingParams(**params, min_tokens=200, max_tokens=260)).choices[0]
    assert len(late.token_ids) >= 200
    assert late.content.startswith("-428")


def test_an_engine_config_is_taken_whole(make_text_checkpoint: Callable[..., Path]) -> None:
    config = EngineConfig(model=str(make_text_checkpoint()), kv_cache_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"no further options, got \['block_size'\]"):
        LLM(config, block_size=16)
    with LLM(config) as llm:
        assert llm.engine.config is config
    with pytest.raises(ValueError, match="did you mean 'block_size'"):
        LLM("embedded", blok_size=16)


def test_a_closed_llm_says_so(make_text_checkpoint: Callable[..., Path], prompt: Prompt) -> None:
    llm = LLM(str(make_text_checkpoint()), kv_cache_bytes=1 << 20)
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="stopping"):
        llm.generate([prompt(5)])
    assert not llm._mailboxes
