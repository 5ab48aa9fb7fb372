"""``inference-pio generate``: one prompt, one answer, no server."""

from __future__ import annotations

import json

from ...workers.llm import LLM, RequestOutput
from ...workers.types import SamplingParams
from .console import err, out, progress


def run_generate(
    prompt: str,
    model: str,
    dtype: str,
    attention: str,
    params: SamplingParams,
    *,
    thinking: bool | None,
    raw: bool,
    as_json: bool,
) -> None:
    """Answer and print: the answer to standard output, the thought to standard error."""
    with progress() as say:
        say(f"loading {model}")
        with LLM(model, dtype=dtype, attention=attention, max_num_seqs=1) as llm:
            say("generating")
            if raw:
                output = llm.generate(prompt, params)[0]
            else:
                messages = [{"role": "user", "content": prompt}]
                output = llm.chat(messages, params, enable_thinking=thinking)
    if as_json:
        print(json.dumps(_as_json(output, raw=raw), ensure_ascii=False))
        return
    choice = output.choices[0]
    if raw:
        out.print(choice.text, markup=False, soft_wrap=True)
        return
    if choice.reasoning:
        err.print(choice.reasoning, style="dim italic", markup=False, soft_wrap=True)
    out.print(choice.content, markup=False, soft_wrap=True)


def _as_json(output: RequestOutput, *, raw: bool) -> dict[str, object]:
    choice = output.choices[0]
    parts: dict[str, object] = (
        {"text": choice.text} if raw else {"reasoning": choice.reasoning, "content": choice.content}
    )
    return {
        **parts,
        "finish_reason": choice.finish_reason.value,
        "prompt_tokens": choice.usage.prompt_tokens,
        "completion_tokens": choice.usage.completion_tokens,
        "reasoning_tokens": choice.usage.reasoning_tokens,
    }
