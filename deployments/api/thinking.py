"""What a request wishes about thinking, out of the many names clients use for it."""

from __future__ import annotations

from typing import Any

from ...workers.types import RequestError
from ..config import ThinkingConfig
from ..routing.classifier import Wishes
from .protocol import BudgetFields, ThinkingFields

_BUDGET_NAMES = ("thinking_token_budget", "thinking_budget", "thinking_budget_tokens")
_SWITCH_BUDGET = "thinking.budget_tokens"
_OFF_EFFORTS = ("none", "minimal")


def chat_wishes(
    request: ThinkingFields, config: ThinkingConfig, soft_switch: bool | None
) -> Wishes:
    """Join the settings of a conversation's request with its last soft switch.

    A budget in numbers goes before one named by an effort. Raises ``RequestError`` where two
    settings contradict each other.
    """
    effort = request.reasoning_effort
    by_effort = None if effort is None else effort not in _OFF_EFFORTS
    settings = {
        "enable_thinking": request.enable_thinking,
        "chat_template_kwargs": template_switch(request.chat_template_kwargs),
        "reasoning_effort": by_effort,
        "thinking": None if request.thinking is None else request.thinking.type == "enabled",
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if len(set(given.values())) > 1:
        sides = ", ".join(f"{name} says {'on' if v else 'off'}" for name, v in given.items())
        raise RequestError(f"thinking is both on and off: {sides}", param=next(iter(given)))
    enabled_by, enabled = next(iter(given.items()), ("", None))
    switched = {} if request.thinking is None else {_SWITCH_BUDGET: request.thinking.budget_tokens}
    budget_by, budget = _budget(request, switched)
    if budget is None and by_effort and effort is not None:
        budget_by, budget = "reasoning_effort", int(getattr(config.effort, effort))
    return Wishes(enabled, enabled_by, budget, budget_by, soft_switch)


def raw_wishes(request: BudgetFields) -> Wishes:
    """What a request with raw prompts wishes: its budget alone says anything."""
    budget_by, budget = _budget(request, {})
    return Wishes(budget=budget, budget_by=budget_by, raw=True)


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


def _budget(request: BudgetFields, more: dict[str, int | None]) -> tuple[str, int | None]:
    named = {name: getattr(request, name) for name in _BUDGET_NAMES} | more
    given = {name: value for name, value in named.items() if value is not None}
    if len(set(given.values())) > 1:
        raise RequestError(
            f"{' and '.join(given)} are one setting and differ", param=next(iter(given))
        )
    return next(iter(given.items()), ("", None))
