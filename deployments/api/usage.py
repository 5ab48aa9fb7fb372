"""Token counts of one client's request over all of its choices."""

from __future__ import annotations

from typing import Any

from ...workers.types import TokenChunk, Usage


class UsageMeter:
    """Keeps the latest counts of every choice; a prompt counts once for all of its choices."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, int], Usage] = {}

    def see(self, chunk: TokenChunk) -> None:
        """Take the counts a chunk carries."""
        self._of[chunk.request_id, chunk.index] = chunk.usage

    def as_json(self) -> dict[str, Any]:
        """The OpenAI ``usage`` object."""
        prompts: dict[str, Usage] = {}
        for (request_id, index), usage in self._of.items():
            if index == 0 or request_id not in prompts:
                prompts[request_id] = usage
        prompt = sum(usage.prompt_tokens for usage in prompts.values())
        output = sum(usage.completion_tokens for usage in self._of.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {
                "cached_tokens": sum(usage.cached_tokens for usage in prompts.values())
            },
            "completion_tokens_details": {
                "reasoning_tokens": sum(usage.reasoning_tokens for usage in self._of.values())
            },
        }
