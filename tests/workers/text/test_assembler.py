from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.workers.phases import PhaseMachine, PhaseTokens
from inference_pio.workers.text.assembler import (
    AssembledOutput,
    ChunkOrderError,
    OutputAssembler,
    assemble,
    new_call_id,
)
from inference_pio.workers.text.tokenizer import Tokenizer
from inference_pio.workers.text.tool_calls import ToolCall
from inference_pio.workers.types import (
    FinishReason,
    TokenChunk,
    TokenKind,
    TokenLogprob,
    Usage,
)

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é}"}}\n</tool_call>'
USAGE = Usage(0, 0, 0, 0)


def counted_ids() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"call_{next(numbers)}"


def machine(tokenizer: Tokenizer, prompt: str) -> PhaseMachine:
    tags = tokenizer.tags
    tokens = PhaseTokens(
        think_open=tags.think_open,
        think_close=tags.think_close,
        tool_open=tags.tool_open,
        tool_close=tags.tool_close,
        whitespace=tags.whitespace,
        stop_text_ids=tags.stop_text_ids,
        eos=frozenset() if tags.eos is None else frozenset({tags.eos}),
    )
    ids = tokenizer.encode(prompt, parse_special=True)
    return PhaseMachine(ids, tokens, budget=None, loop_guard=None)


def chunks(
    tokenizer: Tokenizer,
    ids: list[int],
    cuts: list[int],
    prompt: str = "",
    reason: FinishReason = FinishReason.STOP,
    logprobs: bool = False,
) -> Iterator[TokenChunk]:
    """The chunks an engine would send for these ids, cut at ``cuts``."""
    if tokenizer.eos in ids:
        ids = ids[: ids.index(tokenizer.eos) + 1]
    phases = machine(tokenizer, prompt)
    kinds = [phases.append(token) for token in ids]
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for start, end in itertools.pairwise(borders):
        yield TokenChunk(
            request_id="r",
            index=0,
            first=start,
            token_ids=tuple(ids[start:end]),
            kinds=tuple(kinds[start:end]),
            usage=USAGE,
            logprobs=tuple(TokenLogprob(token, -1.0, ((token, -1.0), (0, -2.0)))
                           for token in ids[start:end]) if logprobs else None,
            finish_reason=reason if end == len(ids) else None,
        )  # fmt: skip


def read(
    tokenizer: Tokenizer,
    text: str | list[int],
    *,
    prompt: str = "",
    reason: FinishReason = FinishReason.STOP,
    parse: bool = True,
    tools: bool = True,
    **settings: Any,
) -> AssembledOutput:
    """The answer for this output, after checking that every cut of it gives the same."""
    ids = text if isinstance(text, list) else tokenizer.encode(text, parse_special=True)

    def once(cuts: list[int]) -> AssembledOutput:
        assembler = OutputAssembler(
            tokenizer,
            parse=parse,
            tools=tools,
            make_call_id=counted_ids(),
            **settings,
        )
        return assemble(assembler, chunks(tokenizer, ids, cuts, prompt, reason))

    whole = once([])
    for cut in range(1, len(ids)):
        assert once([cut]) == whole
    assert once(list(range(len(ids)))) == whole
    return whole


def parts(output: AssembledOutput) -> tuple[str | None, str, list[tuple[str, str]]]:
    return output.reasoning, output.content, [(c.name, c.arguments) for c in output.tool_calls]


F = ("f", '{"a": "é}"}')


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        ("hello", None, "hello", []),
        ("<think>\nhe\n\nllo\n</think>\n\nyes\n", "he\n\nllo", "yes\n", []),
        ("\n<think>\n a \n</think>\n\n\n b", " a ", " b", []),
        (" \n<think>t</think>x", "t", "x", []),
        (" \nx", None, " \nx", []),
        ("<think>\n\n</think>\n\nyes", None, "yes", []),
        ("<think> \n </think>yes", None, "yes", []),
        ("<think></think>", None, "", []),
        ("<think>only a thought", "only a thought", "", []),
        ("<think>\nthought\n\n", "thought", "", []),
        ("\n\n", None, "\n\n", []),
        ("\n\nx\n", None, "\n\nx\n", []),
        ("a <think>b</think>", None, "a <think>b</think>", []),
        ("a</think>b", None, "a</think>b", []),
        (CALL, None, "", [F]),
        (f"{CALL}\n{CALL}\n", None, "", [F, F]),
        (f"one\n\n{CALL}", None, "one", [F]),
        (f"one\n{CALL}\ntwo", None, "one\ntwo", [F]),
        (f"{CALL}\n\ntwo", None, "two", [F]),
        (f"<think>\nt\n</think>\n\n{CALL}", "t", "", [F]),
        (f"<think>\nt\n</think>\n\nx\n{CALL}", "t", "x", [F]),
        (f"<think>\nt\n{CALL}\n", "t", "", [F]),
        ("a\n<tool_call>\nno\n</tool_call>\nb", None, "a\n<tool_call>\nno\n</tool_call>\nb", []),
        ("<tool_call>no", None, "<tool_call>no", []),
        ("<tool_call>", None, "<tool_call>", []),
        ("<tool_call></tool_call>", None, "<tool_call></tool_call>", []),
        ("<think>t<tool_call>\n{]", "t", "<tool_call>\n{]", []),
        (f"<tool_call>x</tool_call>{CALL}", None, "<tool_call>x</tool_call>", [F]),
        ("</tool_call>x", None, "</tool_call>x", []),
        (
            '<tool_call>{"name": "f", "arguments": {"a": 1,}}\n</tool_call>\nz',
            None,
            "}}\n\nz",
            [("f", '{"a": 1,')],
        ),
        ('<tool_call>{"name": "f", "arguments": {"a', None, "", [("f", '{"a')]),
    ],
)
def test_answers(
    tiny: Tokenizer, text: str, reasoning: str | None, content: str, calls: list[tuple[str, str]]
) -> None:
    assert parts(read(tiny, text)) == (reasoning, content, calls)


def test_real_tokenizer(qwen: Tokenizer) -> None:
    output = read(qwen, f"<think>\nHm, 🦙.\n</think>\n\nSo:\n{CALL}\n{CALL}<|im_end|>")
    assert parts(output) == ("Hm, 🦙.", "So:", [F, F])
    assert output.tool_calls[0] == ToolCall("call_1", *F)
    assert output.tool_calls[1].id == "call_2"
    assert output.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        (CALL, FinishReason.STOP, "tool_calls"),
        (CALL, FinishReason.LENGTH, "length"),
        (CALL, FinishReason.ABORT, "abort"),
        ("hello", FinishReason.STOP, "stop"),
        ("<tool_call>no</tool_call>", FinishReason.STOP, "stop"),
        ('<tool_call>{"name": "f", "arguments": {"a', FinishReason.STOP, "stop"),
        ('<tool_call>{"name": "f", "arguments": {}', FinishReason.STOP, "tool_calls"),
    ],
)
def test_finish_reason(tiny: Tokenizer, text: str, reason: FinishReason, expected: str) -> None:
    assert read(tiny, text, reason=reason).finish_reason == expected


def test_thinking_off_makes_all_content(tiny: Tokenizer) -> None:
    off = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    text = "\n<think>a</think>\n\nb\n"
    assert parts(read(tiny, text, prompt=off)) == (None, text, [])


def test_a_prompt_may_have_opened_the_thought(tiny: Tokenizer) -> None:
    opened = "<|im_start|>assistant\n<think>\n"
    assert parts(read(tiny, "a\n</think>\n\nb", prompt=opened)) == ("a", "b", [])


def test_a_prompt_may_have_opened_the_tool_call(tiny: Tokenizer) -> None:
    opened = "<|im_start|>assistant\n<tool_call>"
    assert parts(read(tiny, "{}</tool_call>x", prompt=opened)) == (None, "{}</tool_call>x", [])


def test_without_tools_a_tool_call_is_content(tiny: Tokenizer) -> None:
    text = f"a\n{CALL}\nb"
    assert parts(read(tiny, text, tools=False)) == (None, text, [])
    thinking = f"<think>\nt\n{CALL}"
    assert parts(read(tiny, thinking, tools=False)) == ("t", CALL, [])


def test_raw_text_keeps_all(tiny: Tokenizer) -> None:
    text = f"\n<think>\n\n</think>\n\na\n{CALL}\n"
    assert parts(read(tiny, f"{text}<|im_end|>", parse=False)) == (None, text, [])


def test_a_tokenizer_without_tags(tagless: Tokenizer) -> None:
    text = f"<think>a</think>{CALL}"
    assert parts(read(tagless, text)) == (None, text, [])


def test_half_a_character_at_the_end_of_a_thought(tiny: Tokenizer) -> None:
    text = tiny.encode("<think>a</think>b", parse_special=True)
    half = next(i for i in range(256) if tiny.token_bytes(i) == b"\xc3")
    assert parts(read(tiny, [*text[:2], half, *text[2:], half])) == ("a\ufffd", "b\ufffd", [])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("a-b", "c", [])),
        ({"include_stop": True}, ("a-b", "c-", [])),
        ({"stop_in_thought": True}, ("a", "", [])),
        ({"stop_in_thought": True, "include_stop": True}, ("a-", "", [])),
    ],
)
def test_stop_strings(tiny: Tokenizer, settings: dict[str, Any], expected: object) -> None:
    text = "<think>\na-b\n</think>\n\nc-d"
    assert parts(read(tiny, text, stop=("-",), **settings)) == expected


def test_stop_strings_leave_tool_calls_alone(tiny: Tokenizer) -> None:
    assert parts(read(tiny, f"x\n{CALL}\ny}}z", stop=("}",))) == (None, "x\ny", [F])


def test_a_stop_string_may_be_a_tag(tiny: Tokenizer) -> None:
    text = "<think>a</think>b"
    stopped = read(tiny, text, stop=("</think>",), stop_in_thought=True)
    assert parts(stopped) == ("a", "", [])
    raw = read(tiny, text, stop=("</think>",), stop_in_thought=True, include_stop=True, parse=False)
    assert raw.content == "<think>a</think>"


def test_half_a_tag_is_no_content(tiny: Tokenizer) -> None:
    stopped = read(tiny, "<think>a</think>xb", stop=("k>x",), stop_in_thought=True)
    assert parts(stopped) == ("a", "", [])


def test_what_is_streamed_comes_at_once(tiny: Tokenizer) -> None:
    assembler = OutputAssembler(tiny, tools=True, make_call_id=counted_ids())
    ids = tiny.encode(f"<think>\nab\n</think>\n\nc{CALL}", parse_special=True)
    deltas = [assembler.feed(chunk) for chunk in chunks(tiny, ids, list(range(len(ids))))]
    assert [d.reasoning for d in deltas if d.reasoning] == ["a", "b"]
    assert [d.content for d in deltas if d.content] == ["c"]
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert (calls[0].index, calls[0].id, calls[0].name) == (0, "call_1", "f")
    assert all((call.index, call.id, call.name) == (0, None, None) for call in calls[1:])
    assert [call.arguments for call in calls] == list(F[1])
    assert not assembler.finish()
    assert assembler.complete_calls == 1


@pytest.mark.parametrize("first", [1, 3])
def test_lost_and_repeated_chunks_are_seen(tiny: Tokenizer, first: int) -> None:
    assembler = OutputAssembler(tiny)
    kinds = (TokenKind.CONTENT,) * 2
    assembler.feed(TokenChunk("r", 0, 0, (1, 2), kinds, USAGE))
    with pytest.raises(ChunkOrderError, match=f"token {first}, expected is 2"):
        assembler.feed(TokenChunk("r", 0, first, (1, 2), kinds, USAGE))


def test_logprobs_have_text_and_bytes(tiny: Tokenizer) -> None:
    ids = tiny.encode("<think>é</think>b<|im_end|>", parse_special=True)
    given = chunks(tiny, ids, [2], logprobs=True)
    entries = assemble(OutputAssembler(tiny), given).logprobs
    assert [entry.token_id for entry in entries] == ids[:-1]
    assert b"".join(entry.data for entry in entries) == "<think>é</think>b".encode()
    assert [entry.token for entry in entries][1:3] == ["\ufffd", "\ufffd"]
    assert [entry.kind for entry in entries if entry.token == "b"] == [TokenKind.CONTENT]
    assert [(top.token_id, top.logprob) for top in entries[-1].top] == [(ids[-2], -1.0), (0, -2.0)]


def test_call_ids_are_fresh() -> None:
    first, second = new_call_id(), new_call_id()
    assert first != second
    assert first.startswith("call_")
    assert len(bytes.fromhex(first.removeprefix("call_"))) == 12


SNIPPETS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, "\n", "\n\n", " ", "hello", "é",
     "🦙", '{"name": "f", ', '"arguments": {', "}", '"', "}}", "<|im_end|>", "x", "<", "tool"]
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_tokens_in_any_chunks_give_the_same_answer(
    tiny: Tokenizer, data: st.DataObject
) -> None:
    if data.draw(st.booleans()):
        text = "".join(data.draw(st.lists(SNIPPETS, max_size=14)))
        ids = tiny.encode(text, parse_special=True)
    else:
        tags = sorted(tiny.control.values())
        ids = data.draw(st.lists(st.integers(0, 255) | st.sampled_from(tags), max_size=25))
    modes = st.fixed_dictionaries(
        {
            "parse": st.booleans(),
            "tools": st.booleans(),
            "stop": st.sampled_from([(), ("hello",), ("}", "x<"), ("k>", "\n\n")]),
            "include_stop": st.booleans(),
            "stop_in_thought": st.booleans(),
            "min_tokens": st.integers(0, 12),
        }
    )
    mode = data.draw(modes)
    prompt = data.draw(st.sampled_from(["", "<think>\n\n</think>\n\n", "<think>"]))

    def once(cuts: list[int]) -> AssembledOutput:
        assembler = OutputAssembler(tiny, make_call_id=counted_ids(), **mode)
        return assemble(assembler, chunks(tiny, ids, cuts, prompt))

    whole = once([])
    assert once(list(range(len(ids)))) == whole
    assert once(data.draw(st.lists(st.integers(0, len(ids)), max_size=6))) == whole
    if not mode["parse"] and not mode["stop"]:
        until = ids.index(tiny.eos) if tiny.eos in ids else len(ids)
        assert whole.content == tiny.decode(ids[:until])


WORDS = st.text(st.characters(categories=["L", "P", "S"], exclude_characters="<"), min_size=1)


@settings(max_examples=150, deadline=None)
@given(
    thought=WORDS | st.none(),
    content=WORDS | st.just(""),
    calls=st.lists(
        st.tuples(st.sampled_from(["f", "get"]), st.dictionaries(WORDS, WORDS)), max_size=3
    ),
)
def test_what_a_template_writes_is_read_back(
    tiny: Tokenizer,
    thought: str | None,
    content: str,
    calls: list[tuple[str, dict[str, str]]],
) -> None:
    """The answer as Qwen's template would write it into the history."""
    written = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = "" if thought is None else f"<think>\n{thought}\n</think>\n\n"
    text += content
    for number, (name, arguments) in enumerate(written):
        text += "\n" if number or content else ""
        text += f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    ids = tiny.encode(text, parse_special=True)
    assembler = OutputAssembler(tiny, tools=True)
    output = assemble(assembler, chunks(tiny, ids, list(range(len(ids)))))
    assert parts(output) == (thought, content, written)
