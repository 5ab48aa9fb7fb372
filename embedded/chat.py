"""The chat template of the embedded model, and how it is rendered outside transformers."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .problem import Message, Tool

THOUGHT_OPENS = "<think>\n"
THOUGHT_CLOSES = "\n</think>\n\n"
EMPTY_THOUGHT = THOUGHT_OPENS + THOUGHT_CLOSES
TURN_ENDS = "<|im_end|>"
OUT_OF_BUDGET = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now."
)
"""What Qwen's servers write into a thought whose budget is spent, before they close it."""


def template_source() -> str:
    """The Jinja source, as it also lies in the checkpoint's tokenizer_config.json."""
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = ImmutableSandboxedEnvironment()
    # The same filter as in transformers: no HTML escapes, keys in the caller's order.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template_source())


def render_prompt(
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Prompt text of a conversation; `enable_thinking=None` leaves the variable unset."""
    variables: dict[str, object] = {
        "messages": messages,
        "tools": list(tools) or None,
        "add_generation_prompt": add_generation_prompt,
    }
    if enable_thinking is not None:
        variables["enable_thinking"] = enable_thinking
    return _template().render(variables)


def render_completion(answer: str, thought: str | None, prompt_has_thought: bool) -> str:
    """The assistant turn that belongs after a prompt.

    Thinking off by the template: the answer only. Thinking off by a soft switch (`thought` is
    None): an empty thought comes first, as the model has to write it itself.
    """
    if prompt_has_thought:
        return answer + TURN_ENDS
    if thought is None:
        return EMPTY_THOUGHT + answer + TURN_ENDS
    return THOUGHT_OPENS + thought + THOUGHT_CLOSES + answer + TURN_ENDS
