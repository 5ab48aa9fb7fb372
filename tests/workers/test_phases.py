from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from inference_pio.workers.config import LoopGuardConfig
from inference_pio.workers.phases import PhaseMachine, PhaseTokens
from inference_pio.workers.types import SequencePhase, ThinkingMode, ThoughtEnd, TokenKind

OPEN, CLOSE, TOOL, TOOL_END, LINE, END, USER = 1, 2, 3, 4, 5, 6, 7
STOP_TEXT = (20, 21, 22, CLOSE, LINE)
TOKENS = PhaseTokens(
    think_open=OPEN,
    think_close=CLOSE,
    tool_open=TOOL,
    tool_close=TOOL_END,
    whitespace=frozenset({LINE}),
    stop_text_ids=STOP_TEXT,
    eos=frozenset({END}),
)
PROMPT = (USER, 10, END, USER)
EMPTY_BLOCK = (OPEN, LINE, CLOSE, LINE)
CONTENT, THOUGHT, CALL, TAG, STOP = (
    TokenKind.CONTENT,
    TokenKind.THOUGHT,
    TokenKind.TOOL_CALL,
    TokenKind.TAG,
    TokenKind.STOP,
)

generated_ids = st.lists(st.sampled_from([OPEN, CLOSE, TOOL, TOOL_END, LINE, 10, 11]), max_size=40)
budgets = st.none() | st.integers(0, 8)


def machine(
    prompt: Sequence[int] = PROMPT,
    *,
    budget: int | None = None,
    guard: LoopGuardConfig | None = None,
    stop_ids: frozenset[int] | None = None,
    tokens: PhaseTokens = TOKENS,
) -> PhaseMachine:
    return PhaseMachine(prompt, tokens, budget=budget, loop_guard=guard, stop_ids=stop_ids)


def run(phases: PhaseMachine, token_ids: Sequence[int]) -> list[TokenKind]:
    return [phases.append(token_id) for token_id in token_ids]


def generate(phases: PhaseMachine, sampled: Sequence[int]) -> tuple[list[int], list[TokenKind]]:
    """Output and kinds of a sequence whose sampler would give ``sampled`` in turn."""
    output: list[int] = []
    kinds: list[TokenKind] = []
    for token_id in sampled:
        tokens = phases.take_forced() or (token_id,)
        output += tokens
        kinds += run(phases, tokens)
    return output, kinds


class TestPrompt:
    @pytest.mark.parametrize(
        ("prompt", "mode", "phase"),
        [
            ((), ThinkingMode.THINKING, SequencePhase.PROMPT),
            (PROMPT, ThinkingMode.THINKING, SequencePhase.PROMPT),
            ((*PROMPT, *EMPTY_BLOCK), ThinkingMode.NON_THINKING, SequencePhase.ANSWER),
            ((*PROMPT, OPEN, CLOSE), ThinkingMode.NON_THINKING, SequencePhase.ANSWER),
            ((*PROMPT, *EMPTY_BLOCK, 10), ThinkingMode.NON_THINKING, SequencePhase.ANSWER),
            ((*PROMPT, OPEN), ThinkingMode.THINKING, SequencePhase.THINKING),
            ((*PROMPT, OPEN, LINE, 10), ThinkingMode.THINKING, SequencePhase.THINKING),
            ((*PROMPT, OPEN, 10, CLOSE, 11), ThinkingMode.THINKING, SequencePhase.ANSWER),
            ((*PROMPT, *EMPTY_BLOCK, TOOL), ThinkingMode.NON_THINKING, SequencePhase.TOOL_CALL),
            ((*PROMPT, OPEN, 10, TOOL, 11), ThinkingMode.THINKING, SequencePhase.TOOL_CALL),
            ((*PROMPT, TOOL, 10, TOOL_END), ThinkingMode.THINKING, SequencePhase.ANSWER),
        ],
    )
    def test_gives_mode_and_first_phase(
        self, prompt: tuple[int, ...], mode: ThinkingMode, phase: SequencePhase
    ) -> None:
        phases = machine(prompt)
        assert (phases.mode, phases.phase) == (mode, phase)

    @pytest.mark.parametrize("earlier", [EMPTY_BLOCK, (OPEN, 10), (TOOL, TOOL_END), (TOOL,)])
    def test_tags_of_closed_turns_say_nothing(self, earlier: tuple[int, ...]) -> None:
        phases = machine((USER, *earlier, END, *PROMPT))
        assert (phases.mode, phases.phase) == (ThinkingMode.THINKING, SequencePhase.PROMPT)

    def test_a_checkpoint_without_thinking_takes_think_tags_for_content(self) -> None:
        tokens = PhaseTokens(tool_open=TOOL, tool_close=TOOL_END, eos=frozenset({END}))
        phases = machine((*PROMPT, OPEN), tokens=tokens, budget=1)
        assert (phases.mode, phases.phase) == (ThinkingMode.NON_THINKING, SequencePhase.ANSWER)
        assert run(phases, [OPEN, 10, CLOSE]) == [CONTENT] * 3
        assert phases.take_forced() == ()


class TestKinds:
    def test_thought_answer_and_tool_call(self) -> None:
        phases = machine()
        kinds = run(phases, [OPEN, LINE, 10, CLOSE, LINE, 11, TOOL, 12, TOOL_END, 13, END])
        assert kinds == [
            *(TAG, THOUGHT, THOUGHT, TAG),
            *(CONTENT, CONTENT, TAG, CALL, TAG, CONTENT, STOP),
        ]
        assert phases.thought_end is ThoughtEnd.NATURAL
        assert phases.reasoning_tokens == 2
        start = len(PROMPT) + 1
        assert phases.thought_span == (start, start + 2)

    def test_whitespace_may_stand_before_the_thought(self) -> None:
        phases = machine()
        assert run(phases, [LINE, LINE, OPEN, 10]) == [CONTENT, CONTENT, TAG, THOUGHT]

    def test_a_later_think_tag_is_content(self) -> None:
        phases = machine()
        assert run(phases, [10, OPEN, 11, CLOSE]) == [CONTENT] * 4
        assert phases.thought_span is None

    def test_a_second_thought_is_content(self) -> None:
        phases = machine()
        assert run(phases, [OPEN, CLOSE, OPEN, 10]) == [TAG, TAG, CONTENT, CONTENT]

    def test_think_tags_are_content_when_thinking_is_off(self) -> None:
        phases = machine((*PROMPT, *EMPTY_BLOCK))
        assert run(phases, [OPEN, 10, CLOSE]) == [CONTENT] * 3
        assert phases.reasoning_tokens == 0

    def test_a_tool_call_ends_an_open_thought(self) -> None:
        phases = machine()
        assert run(phases, [OPEN, 10, TOOL, 11, OPEN, CLOSE, TOOL, TOOL_END, 12]) == [
            *(TAG, THOUGHT, TAG),
            *(CALL, CALL, CALL, CALL, TAG, CONTENT),
        ]
        assert phases.thought_end is ThoughtEnd.TOOL_CALL

    def test_a_thought_opened_by_the_prompt_counts_from_there(self) -> None:
        phases = machine((*PROMPT, OPEN, LINE))
        assert run(phases, [10, CLOSE, 11]) == [THOUGHT, TAG, CONTENT]
        assert phases.reasoning_tokens == 1
        assert phases.thought_span == (len(PROMPT) + 1, len(PROMPT) + 3)

    @pytest.mark.parametrize("before", [[], [OPEN, 10], [10], [TOOL, 10]])
    def test_a_stop_id_ends_every_phase(self, before: list[int]) -> None:
        phases = machine()
        run(phases, before)
        assert phases.append(END) is STOP

    def test_the_request_decides_which_ids_stop(self) -> None:
        phases = machine(stop_ids=frozenset({CLOSE}))
        assert run(phases, [OPEN, END, CLOSE]) == [TAG, THOUGHT, STOP]

    @given(generated_ids)
    def test_counts_are_the_kinds_counted(self, token_ids: list[int]) -> None:
        phases = machine()
        kinds = run(phases, token_ids)
        assert phases.reasoning_tokens == kinds.count(THOUGHT)
        places = [place for place, kind in enumerate(kinds, len(PROMPT)) if kind is THOUGHT]
        if places:
            assert phases.thought_span == (places[0], places[-1] + 1)

    @given(generated_ids)
    def test_there_is_one_thought_at_the_start_at_most(self, token_ids: list[int]) -> None:
        kinds = run(machine(), token_ids)
        places = [place for place, kind in enumerate(kinds) if kind is THOUGHT]
        assert places == list(range(places[0], places[-1] + 1)) if places else True
        if places:
            assert all(token_id == LINE for token_id in token_ids[: places[0] - 1])


class TestBudget:
    def test_is_followed_by_the_stop_text_once(self) -> None:
        phases = machine(budget=2)
        run(phases, [OPEN, 10])
        assert phases.take_forced() == ()
        phases.append(11)
        assert phases.take_forced() == STOP_TEXT
        assert phases.take_forced() == ()
        assert run(phases, STOP_TEXT) == [THOUGHT, THOUGHT, THOUGHT, TAG, CONTENT]
        assert phases.thought_end is ThoughtEnd.BUDGET
        assert phases.phase is SequencePhase.ANSWER

    def test_of_zero_closes_the_thought_without_a_word(self) -> None:
        phases = machine(budget=0)
        phases.append(OPEN)
        assert phases.take_forced() == (CLOSE, LINE)
        assert run(phases, (CLOSE, LINE)) == [TAG, CONTENT]
        assert (phases.thought_end, phases.reasoning_tokens) == (ThoughtEnd.BUDGET, 0)

    def test_of_zero_holds_before_the_first_token_of_a_thought_the_prompt_opened(self) -> None:
        assert machine((*PROMPT, OPEN), budget=0).take_forced() == (CLOSE, LINE)

    def test_that_is_not_spent_forces_nothing(self) -> None:
        phases = machine(budget=3)
        assert generate(phases, [OPEN, 10, 11, CLOSE, 12, 13, 14])[0][3] == CLOSE
        assert phases.thought_end is ThoughtEnd.NATURAL

    @given(generated_ids, st.integers(0, 8))
    def test_bounds_every_thought(self, token_ids: list[int], budget: int) -> None:
        phases = machine(budget=budget)
        generate(phases, token_ids)
        assert phases.reasoning_tokens <= budget + STOP_TEXT.index(CLOSE) * (budget > 0)
        if phases.thought_end is ThoughtEnd.NATURAL:
            assert phases.reasoning_tokens < budget


class TestLoops:
    GUARD = LoopGuardConfig(min_repeats=3, min_tokens=8, max_period=4)

    def test_end_the_thought_and_leave_room_for_the_answer(self) -> None:
        phases = machine(guard=self.GUARD)
        output, _ = generate(phases, [OPEN, *[10, 11, 12] * 4, 13])
        assert output == [OPEN, *[10, 11, 12] * 3, *STOP_TEXT, 11, 12, 13]
        assert phases.thought_end is ThoughtEnd.LOOP
        assert phases.phase is SequencePhase.ANSWER

    def test_are_left_alone_in_the_answer_and_without_a_guard(self) -> None:
        answering = machine(guard=self.GUARD)
        generate(answering, [10] * 30)
        unguarded = machine()
        output, _ = generate(unguarded, [OPEN, *[10] * 30])
        assert output == [OPEN, *[10] * 30]
        assert answering.thought_end is unguarded.thought_end is None


class TestCopies:
    @given(generated_ids, generated_ids, budgets)
    def test_a_fork_goes_on_alone(
        self, before: list[int], after: list[int], budget: int | None
    ) -> None:
        phases = machine(budget=budget, guard=TestLoops.GUARD)
        control = machine(budget=budget, guard=TestLoops.GUARD)
        assert generate(phases, before) == generate(control, before)
        fork = phases.fork()
        expected = generate(fork, after)
        generate(phases, after[::-1])
        assert generate(control, after) == expected

    @given(generated_ids, budgets)
    def test_a_replay_gives_the_same_state(self, sampled: list[int], budget: int | None) -> None:
        phases = machine(budget=budget, guard=TestLoops.GUARD)
        output, kinds = generate(phases, sampled)
        replay = machine(budget=budget, guard=TestLoops.GUARD)
        assert run(replay, output) == kinds
        assert (
            *(replay.phase, replay.mode, replay.reasoning_tokens),
            *(replay.thought_end, replay.thought_span, replay.take_forced()),
        ) == (
            *(phases.phase, phases.mode, phases.reasoning_tokens),
            *(phases.thought_end, phases.thought_span, phases.take_forced()),
        )


def test_tokens_that_cannot_end_a_thought_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a </think> token"):
        PhaseTokens(think_open=OPEN)
    with pytest.raises(ValueError, match=f"no </think> \\(id {CLOSE}\\)"):
        PhaseTokens(think_open=OPEN, think_close=CLOSE, stop_text_ids=(20,))


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Any:
    """The real tokenizer, as transformers loads it."""
    return AutoTokenizer.from_pretrained(data_dir / "hf-qwen3-0.6b")


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> PhaseTokens:
    """Its tags."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    return PhaseTokens(
        think_open=151667,
        think_close=151668,
        tool_open=151657,
        tool_close=151658,
        whitespace=frozenset({*ids("\n"), *ids("\n\n")}),
        stop_text_ids=ids("\n\nI have to give the solution now.\n</think>\n\n"),
        eos=frozenset({151645, 151643}),
    )


class TestQwen3Prompts:
    """Prompts as the checkpoints' own templates render them."""

    QUESTION: ClassVar = [{"role": "user", "content": "What is 3 + 4?"}]
    TOOLS: ClassVar = [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    ]
    STEP: ClassVar = [
        *QUESTION,
        {
            "role": "assistant",
            "reasoning_content": "I should add.",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 3, "b": 4}}}],
        },
        {"role": "tool", "content": "7"},
    ]

    @pytest.mark.parametrize("tools", [None, TOOLS])
    @pytest.mark.parametrize("messages", [QUESTION, STEP])
    @pytest.mark.parametrize(
        ("enable_thinking", "mode", "phase"),
        [
            (True, ThinkingMode.THINKING, SequencePhase.PROMPT),
            (False, ThinkingMode.NON_THINKING, SequencePhase.ANSWER),
        ],
    )
    def test_are_read_by_mode(
        self,
        tokenizer: Any,
        tokens: PhaseTokens,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        enable_thinking: bool,
        mode: ThinkingMode,
        phase: SequencePhase,
    ) -> None:
        prompt = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
            return_dict=False,
        )
        phases = machine(prompt, tokens=tokens)
        assert (phases.mode, phases.phase) == (mode, phase)

    def test_continue_inside_a_thought_that_was_begun(
        self, tokenizer: Any, tokens: PhaseTokens
    ) -> None:
        prompt = tokenizer.encode("<|im_start|>assistant\n<think>\nFirst", add_special_tokens=False)
        assert machine(prompt, tokens=tokens).phase is SequencePhase.THINKING

    def test_output_of_the_model_is_read_as_thought_and_answer(
        self, tokenizer: Any, tokens: PhaseTokens
    ) -> None:
        output = tokenizer.encode(
            "<think>\nThe sum is 7.\n</think>\n\nIt is 7.<|im_end|>", add_special_tokens=False
        )
        phases = machine(tokenizer.encode("<|im_start|>assistant\n"), tokens=tokens)
        kinds = run(phases, output)
        thought = [t for t, kind in zip(output, kinds, strict=True) if kind is THOUGHT]
        answer = [t for t, kind in zip(output, kinds, strict=True) if kind is CONTENT]
        assert tokenizer.decode(thought) == "\nThe sum is 7.\n"
        assert tokenizer.decode(answer) == "\n\nIt is 7."
        assert kinds[-1] is STOP
