"""One thinking setting out of the many names clients use for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...workers.types import RequestError
from ..config import ThinkingConfig
from .protocol import ChatCompletionRequest

_BUDGET_NAMES = ("thinking_token_budget", "thinking_budget", "thinking_budget_tokens")


@dataclass(frozen=True, slots=True)
class ThinkingSetting:
    """``enabled`` goes to the chat template (``None``: its own default); ``budget`` in tokens."""

    enabled: bool | None
    budget: int | None


def resolve_thinking(request: ChatCompletionRequest, config: ThinkingConfig) -> ThinkingSetting:
    """Join the request's settings; the server's ceiling bounds every budget.

    A budget in numbers goes before one named by an effort. Raises ``RequestError`` where two
    settings contradict each other.
    """
    effort = request.reasoning_effort
    by_effort = None if effort is None else effort not in ("none", "minimal")
    settings = {
        "enable_thinking": request.enable_thinking,
        "chat_template_kwargs": template_switch(request.chat_template_kwargs),
        "reasoning_effort": by_effort,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if len(set(given.values())) > 1:
        sides = ", ".join(f"{name} says {'on' if v else 'off'}" for name, v in given.items())
        raise RequestError(f"thinking is both on and off: {sides}", param=next(iter(given)))
    default = None if config.default == "auto" else config.default
    enabled = next(iter(given.values()), default)
    budget = _budget(request)
    if budget is None and by_effort and effort is not None:
        budget = int(getattr(config.effort, effort))
    return ThinkingSetting(enabled, under_ceiling(budget, config))


def under_ceiling(budget: int | None, config: ThinkingConfig) -> int | None:
    """The smaller of the wish and the server's ceiling, where either exists."""
    return min((b for b in (budget, config.max_budget) if b is not None), default=None)


def template_switch(kwargs: dict[str, Any]) -> bool | None:
    """``enable_thinking`` out of ``chat_template_kwargs``, which may hold nothing else."""
    for name in kwargs:
        if name != "enable_thinking":
            raise RequestError(
                f"chat_template_kwargs has no key {name[:64]!r}; known is 'enable_thinking'",
                param="chat_template_kwargs",
            )
    value = kwargs.get("enable_thinking")
    if value is not None and not isinstance(value, bool):
        raise RequestError(
            "chat_template_kwargs.enable_thinking is true or false",
            param="chat_template_kwargs.enable_thinking",
        )
    return value


def _budget(request: ChatCompletionRequest) -> int | None:
    given = {name: getattr(request, name) for name in _BUDGET_NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    if len(set(given.values())) > 1:
        raise RequestError(
            f"{' and '.join(given)} are one setting and differ", param=next(iter(given))
        )
    return next(iter(given.values()), None)
