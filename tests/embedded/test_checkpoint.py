"""The checkpoint in the repository: its files, its tokenizer, its template, and that it thinks."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from inference_pio.embedded import checkpoint_path
from inference_pio.embedded.chat import EMPTY_THOUGHT, render_completion, render_prompt
from inference_pio.embedded.conversation import Conversation, plain
from inference_pio.embedded.evaluate import Judge
from inference_pio.embedded.tasks import NO_STEP_KINDS, generate
from inference_pio.embedded.tokenizer import SPECIAL_TOKENS, TAG_TOKENS, build_tokenizer

LARGEST_CHECKPOINT = 8_000_000

CALCULATOR = {"type": "function", "function": {"name": "calculator", "parameters": {}}}
ASK = {"role": "user", "content": "What is 4 + 5?"}
CALL = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "Call it.",
    "tool_calls": [{"function": {"name": "calculator", "arguments": {"expression": "4 + 5"}}}],
}
RESULT = {"role": "tool", "content": "9"}
SAID = {"role": "assistant", "content": "<think>\nold\n</think>\n\n9"}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [ASK],
    "system": [SYSTEM, ASK],
    "history": [ASK, SAID, ASK],
    "history with reasoning_content": [
        ASK,
        {"role": "assistant", "content": "9", "reasoning_content": "old"},
        ASK,
    ],
    "last turn is an assistant's": [ASK, {**SAID, "content": "9"}],
    "tool result": [SYSTEM, ASK, CALL, RESULT],
    "two tool results": [ASK, CALL, RESULT, RESULT],
    "tool result and an answer": [ASK, CALL, RESULT, SAID],
    "tool step in the past": [ASK, CALL, RESULT, SAID, ASK],
    "words before a call": [ASK, {**CALL, "content": "So:"}, RESULT],
    "arguments as text": [
        ASK,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "calculator", "arguments": '{"expression": "4 + 5"}'}],
        },
        RESULT,
    ],
    "tool response as a user turn": [
        ASK,
        CALL,
        {"role": "user", "content": "<tool_response>\n9\n</tool_response>"},
    ],
    "late system turn": [ASK, {**SAID, "content": "9"}, SYSTEM, ASK],
}


@cache
def source_tokenizer() -> Tokenizer:
    """Built once: hypothesis runs an example a call."""
    return build_tokenizer()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint_path() / "config.json").read_text())
    return content


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.set_num_threads(1)
    return Judge(checkpoint_path())


def test_importing_the_package_finds_the_checkpoint() -> None:
    assert checkpoint_path().is_dir()


def test_checkpoint_is_small_enough_for_a_repository() -> None:
    assert sum(file.stat().st_size for file in checkpoint_path().iterdir()) <= LARGEST_CHECKPOINT


def test_weights_are_bf16_and_agree_with_the_config(config: dict[str, Any]) -> None:
    with safe_open(checkpoint_path() / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        names = set(weights.keys())
        assert all(weights.get_tensor(name).dtype == torch.bfloat16 for name in names)
        embedding = weights.get_tensor("model.embed_tokens.weight")
        key = weights.get_tensor("model.layers.0.self_attn.k_proj.weight")
        assert weights.get_tensor("model.layers.0.self_attn.q_norm.weight").shape == (32,)
    assert "lm_head.weight" not in names
    assert embedding.shape == (config["vocab_size"], config["hidden_size"])
    assert key.shape[0] == config["num_key_value_heads"] * config["head_dim"]


def test_config_is_a_plain_qwen3(config: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"
    assert config["rope_theta"] > 0
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["max_position_embeddings"] >= 4096
    assert config["vocab_size"] % 64 == 0
    assert config["vocab_size"] > tokenizer.get_vocab_size()


def test_generation_config_has_the_defaults_of_qwen3(tokenizer: Tokenizer) -> None:
    content = json.loads((checkpoint_path() / "generation_config.json").read_text())
    assert (content["temperature"], content["top_p"], content["top_k"]) == (0.6, 0.95, 20)
    assert tokenizer.token_to_id("<|im_end|>") in content["eos_token_id"]


def test_checkpoint_has_the_tokenizer_of_the_source(tokenizer: Tokenizer) -> None:
    assert json.loads(tokenizer.to_str()) == json.loads(build_tokenizer().to_str())


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = source_tokenizer()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tags_are_single_tokens_of_qwens_kinds(tokenizer: Tokenizer) -> None:
    added = {
        token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()
    }
    assert added == dict.fromkeys(SPECIAL_TOKENS, True) | dict.fromkeys(TAG_TOKENS, False)
    assert all(len(tokenizer.encode(name).ids) == 1 for name in added)
    assert tokenizer.decode(tokenizer.encode("<think>a<|im_end|>").ids) == "<think>a"


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("2407").tokens == ["2", "4", "0", "7"]


def test_template_of_the_modes() -> None:
    opened = "<|im_start|>user\nWhat is 4 + 5?<|im_end|>\n<|im_start|>assistant\n"
    assert render_prompt([ASK]) == opened
    assert render_prompt([ASK], enable_thinking=True) == opened
    assert render_prompt([ASK], enable_thinking=False) == opened + "<think>\n\n</think>\n\n"


def test_completions_agree_with_the_template() -> None:
    thought = {"role": "assistant", "content": "9", "reasoning_content": "4+5=9"}
    whole = render_prompt([ASK, thought], add_generation_prompt=False)
    assert whole == render_prompt([ASK]) + render_completion("9", "4+5=9", False) + "\n"
    off = render_prompt([ASK], enable_thinking=False)
    assert off + render_completion("9", None, True) == render_prompt([ASK]) + render_completion(
        "9", None, False
    )
    assert off.endswith(EMPTY_THOUGHT)


def test_template_names_tools_and_keeps_thoughts_of_tool_steps() -> None:
    prompt = render_prompt(CONVERSATIONS["tool result"], [CALCULATOR])
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(CALCULATOR)}\n</tools>" in prompt
    assert (
        "<think>\nCall it.\n</think>\n\n<tool_call>\n"
        '{"name": "calculator", "arguments": {"expression": "4 + 5"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n9\n</tool_response><|im_end|>\n"
    ) in prompt


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("enable_thinking", [None, True, False])
def test_transformers_renders_the_same(name: str, enable_thinking: bool | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    extra: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    rendered = tokenizer.apply_chat_template(
        CONVERSATIONS[name],
        tools=[CALCULATOR],
        add_generation_prompt=True,
        tokenize=False,
        **extra,
    )
    assert rendered == render_prompt(CONVERSATIONS[name], [CALCULATOR], enable_thinking)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("generation", [False, True])
def test_template_agrees_with_qwen3s(
    name: str, with_tools: bool, generation: bool, data_dir: Path
) -> None:
    """Equal text but for the sentences around the list of tools."""
    real_config = data_dir / "hf-qwen3-0.6b" / "tokenizer_config.json"
    source = json.loads(real_config.read_text(encoding="utf-8"))["chat_template"]
    environment = ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    tools = [CALCULATOR] if with_tools else []
    messages = CONVERSATIONS[name]
    real = environment.from_string(source).render(
        messages=messages, tools=tools or None, add_generation_prompt=generation
    )
    ours = render_prompt(messages, tools, add_generation_prompt=generation)
    if with_tools:
        real, ours = ("".join(_around_tools(text)) for text in (real, ours))
    assert ours == real


def _around_tools(text: str) -> tuple[str, str, str]:
    """What stands before the tools section, the tools, and all after the section."""
    before, _, rest = text.partition("# Tools\n")
    listed = rest.partition("<tools></tools>")[2] or rest
    tools, _, rest = listed.partition("<tools>\n")[2].partition("\n</tools>")
    return before, tools, rest.partition("<|im_end|>")[2]


def test_it_thinks(judge: Judge) -> None:
    problems = generate("arithmetic", "test", 77, 32)
    thinking, answering = (
        judge.score("arithmetic", mode, problems, [plain(problem, on) for problem in problems])
        for mode, on in (("think", True), ("off", False))
    )
    assert thinking.right >= 0.95
    assert thinking.right - answering.right >= 0.5
    assert thinking.obeyed == answering.obeyed == 1.0
    assert thinking.thought_tokens > 80


@pytest.mark.parametrize("kind", NO_STEP_KINDS)
def test_it_answers_at_once_what_needs_no_steps(judge: Judge, kind: str) -> None:
    problems = generate(kind, "test", 77, 40)
    score = judge.score(kind, "off", problems, [plain(problem, False) for problem in problems])
    assert score.right >= 0.9
    assert score.obeyed == 1.0


def test_soft_switches(judge: Judge) -> None:
    def asked(text: str, thinks: bool, **extra: Any) -> Conversation:
        earlier = extra.get("messages", ())
        return Conversation(
            messages=(*earlier, {"role": "user", "content": text}),
            tools=(),
            enable_thinking=extra.get("enable_thinking"),
            answer="42",
            thought="" if thinks else None,
        )

    first = ({"role": "user", "content": "What is 3 + 4? /no_think"},)
    past = (*first, {"role": "assistant", "content": "7"})
    system = ({"role": "system", "content": "/no_think"},)
    cases = [
        asked("What is 20 + 22?", True),
        asked("What is 20 + 22? /no_think", False),
        asked("What is 20 + 22? /nothink", False),
        asked("What is 20 + 22? /think", True),
        asked("What is 20 + 22?", False, messages=past),
        asked("What is 20 + 22? /think", True, messages=past),
        asked("What is 20 + 22?", False, messages=system),
        asked("What is 20 + 22? /think", True, messages=system),
        asked("What is 20 + 22? /think", False, enable_thinking=False),
    ]
    problem = next(p for p in generate("small_sum", "train", 1, 10_000) if p.answer == "42")
    score = judge.score("switches", "mixed", [problem] * len(cases), cases)
    assert score.obeyed == 1.0
    assert score.right >= 0.85
