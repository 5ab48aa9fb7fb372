"""The generated problems: right by their own account, of one split, and asked in many ways."""

import json
import random
import re

import pytest

from inference_pio.embedded import thoughts
from inference_pio.embedded.conversation import MODES, varied
from inference_pio.embedded.tasks import (
    KINDS,
    NO_STEP_KINDS,
    Problem,
    draw,
    generate,
    is_correct,
    split_of,
)

KINDS_WITH_SPLITS = sorted(set(KINDS) - {"about"})
_NUMBER = re.compile(r"-?\d+")


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_same_problems(kind: str) -> None:
    assert generate(kind, "test", 3, 20) == generate(kind, "test", 3, 20)
    assert generate(kind, "test", 3, 20) != generate(kind, "test", 4, 20)


@pytest.mark.parametrize("kind", KINDS_WITH_SPLITS)
def test_splits_share_no_content(kind: str) -> None:
    train = {problem.content for problem in generate(kind, "train", 1, 500)}
    test = {problem.content for problem in generate(kind, "test", 1, 100)}
    assert not train & test
    assert {split_of(content) for content in train} == {"train"}
    assert {split_of(content) for content in test} == {"test"}


def test_about_a_tenth_of_all_contents_is_test() -> None:
    shares = [split_of(f"sum {number}") == "test" for number in range(5000)]
    assert 0.08 < sum(shares) / len(shares) < 0.12


def test_wording_and_order_do_not_change_the_split() -> None:
    asked: dict[str, set[str]] = {}
    for problem in generate("small_sum", "train", 1, 4000):
        asked.setdefault(problem.content, set()).add(str(problem.messages[0]["content"]))
    assert max(map(len, asked.values())) > 3


def _sum_in(text: str) -> list[int]:
    spaced = text.replace(" plus ", " + ").replace(" minus ", " - ").replace(" ", "")
    return [int(value) for value in re.findall(r"-?\d+", spaced)]


@pytest.mark.parametrize("mode", MODES)
def test_training_conversations_hold_no_test_sum(mode: str) -> None:
    rng = random.Random(5)
    seen = 0
    for problem in generate("arithmetic", "train", 9, 300):
        talk = varied(problem, mode, "train", rng)  # type: ignore[arg-type]
        for message in talk.messages:
            text = str(message["content"])
            found = re.search(r"\d+( [+-] \d+){1,5}", text)
            if message["role"] == "user" and found:
                operands = sorted(_sum_in(found[0]))
                assert split_of("sum " + " ".join(map(str, operands))) == "train"
                seen += 1
    assert seen > 100


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_column_sums_end_with_the_total(count: int) -> None:
    rng = random.Random(count)
    for _ in range(300):
        operands = [rng.randint(-999, 999) for _ in range(count)]
        lines = thoughts.column_sum(operands).splitlines()
        assert len(lines) == count
        assert int(lines[-1].rpartition(">")[2]) == sum(operands)


def test_column_sum_matches_its_example() -> None:
    assert thoughts.column_sum([417, 58]) == "a+0417\nb7+8=5'1+5=7,4+0=4,0+0=0,>+0475"


def test_sum_answers_follow_from_the_question() -> None:
    for problem in generate("arithmetic", "test", 2, 200):
        text = str(problem.messages[0]["content"])
        if " and " in text or ", " in text:
            assert sum(map(int, _NUMBER.findall(text))) == int(problem.answer)
        else:
            assert sum(_sum_in(text.replace("?", ""))) == int(problem.answer)


@pytest.mark.parametrize("kind", ["sort", "reverse_word", "reverse_short", "count_letters"])
def test_thoughts_contain_their_answer(kind: str) -> None:
    for problem in generate(kind, "train", 2, 100):
        last = problem.thought.splitlines()[-1]
        if kind == "sort":
            taken = [int(line.rpartition(">")[2]) for line in problem.thought.splitlines()]
            assert ", ".join(map(str, taken)) == problem.answer
        elif kind == "count_letters":
            assert last.endswith(problem.answer)
        else:
            assert re.sub(r"\d", "", last) == problem.answer


def test_answers_are_judged_with_and_without_a_thought() -> None:
    problem = generate("arithmetic", "test", 1, 1)[0]
    assert is_correct(problem, problem.answer)
    assert is_correct(
        problem, f"<think>\n{problem.thought}\n</think>\n\n{problem.answer}<|im_end|>"
    )
    assert not is_correct(problem, f"<think>\n{problem.answer}")
    assert not is_correct(problem, problem.answer + "0")


def test_tool_calls_are_judged_as_json() -> None:
    problem = generate("tool_call", "test", 1, 1)[0]
    call = json.loads(problem.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] == "calculator"
    respaced = json.dumps(call, indent=1, sort_keys=True)
    assert is_correct(problem, f"<tool_call>{respaced}</tool_call>")
    assert not is_correct(problem, respaced)
    assert not is_correct(problem, "<tool_call>{broken}</tool_call>")


def test_only_conversations_with_tools_call_one() -> None:
    for kind in KINDS:
        for problem in generate(kind, "train", 4, 30):
            if "<tool_call>" in problem.answer:
                assert problem.tools


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError):
        generate("poetry", "train", 1, 1)


def _last_switch(problem: Problem, mode: str, seed: int) -> str | None:
    talk = varied(problem, mode, "train", random.Random(seed))  # type: ignore[arg-type]
    switches = re.findall(
        r"/(no_think|nothink|think)\b",
        "\n".join(str(m["content"]) for m in talk.messages if m["role"] in ("user", "system")),
    )
    return switches[-1] if switches else None


def test_last_soft_switch_agrees_with_the_mode() -> None:
    rng = random.Random(8)
    for seed in range(300):
        problem = draw(rng.choice(NO_STEP_KINDS), "train", rng)
        assert _last_switch(problem, "think", seed) in (None, "think")
        assert _last_switch(problem, "switched_off", seed) in ("no_think", "nothink")
