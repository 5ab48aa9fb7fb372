"""Mode, budget and model of a request: one pure function from what is wished, able and configured.

1. The model: the one that is named; for ``auto``, of the two that are configured, the ones that can
   do what is wished, and among both the large one from ``routing.large_from`` on. The other one
   comes second: a request may fall back to it, and to no model that its client did not leave open.
2. A model whose template has no thinking never thinks, whatever is wished.
3. A wish of the request, the strongest first: a field that names the mode, a budget of 0, the last
   ``/think`` or ``/no_think``, any other budget.
4. Without a wish the configuration's default; with ``auto``, where a pool of the model takes such
   requests, complexity decides the mode and how long the thought may be.

The server's ceiling bounds every budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...workers.types import RequestError, ThinkingMode
from ..config import RoutingConfig, ThinkingConfig
from .complexity import Complexity

THINKING, NON_THINKING = ThinkingMode.THINKING, ThinkingMode.NON_THINKING


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request says about thinking.

    ``enabled`` comes from the field ``enabled_by``; ``budget`` in thought tokens from
    ``budget_by``. ``raw`` marks a prompt that no template was applied to: it says itself how the
    model begins, so complexity decides nothing about it, unless its pools serve only that way.
    """

    enabled: bool | None = None
    enabled_by: str = ""
    budget: int | None = None
    budget_by: str = ""
    soft_switch: bool | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Abilities:
    """What one model can do here.

    ``thinks``: its template knows thinking; ``by_default``: and thinks when told nothing.
    ``modes`` are those that its pools serve by name, ``open_modes`` those between which its pools
    with the mode ``auto`` let complexity choose.
    """

    model: str
    thinks: bool
    by_default: bool
    modes: frozenset[ThinkingMode]
    open_modes: frozenset[ThinkingMode] = frozenset()


@dataclass(frozen=True, slots=True)
class Policy:
    """The parts of the configuration that decide."""

    thinking: ThinkingConfig
    routing: RoutingConfig


@dataclass(frozen=True, slots=True)
class Route:
    """What was decided.

    ``enable_thinking`` goes to the template, ``None`` leaves it to its own default. ``budget`` is
    the thought's, in tokens; ``None``: no bound. ``is_open``: complexity decided the mode, so a
    pool with the mode ``auto`` serves it. ``reason`` is a list of words, ``reason_kind`` the same
    without the features of the text: a set small enough for a metric's label.
    """

    mode: ThinkingMode
    enable_thinking: bool | None
    budget: int | None
    complexity: float
    model: str
    reason: str
    reason_kind: str
    is_open: bool = False

    def instead(self, cause: str) -> Route:
        """This route for a request that fell back to it; ``cause``: what kept the one before."""
        return replace(
            self,
            reason=f"fallback:{cause},{self.reason}",
            reason_kind=f"fallback:{cause},{self.reason_kind}",
        )


@dataclass(frozen=True, slots=True)
class _Decision:
    mode: ThinkingMode
    reason: str
    param: str | None = None
    enable_thinking: bool | None = None
    is_open: bool = False


def classify(
    wishes: Wishes, candidates: Sequence[Abilities], policy: Policy, complexity: Complexity
) -> Route:
    """The route of a request to one of ``candidates``: one model, or the small and the large one.

    Raises ``RequestError`` (``mode_not_served``) where no pool of the model serves what is wished.
    """
    return routes(wishes, candidates, policy, complexity)[0]


def routes(
    wishes: Wishes, candidates: Sequence[Abilities], policy: Policy, complexity: Complexity
) -> tuple[Route, ...]:
    """The route of a request, then the one to the other candidate that grants the same wish.

    Raises as ``classify`` does.
    """
    wish = _wish(wishes)
    return tuple(
        _route(wishes, wish, ability, candidates, policy, complexity)
        for ability in _by_preference(wish, candidates, policy, complexity)
    )


def _route(
    wishes: Wishes,
    wish: _Decision | None,
    ability: Abilities,
    candidates: Sequence[Abilities],
    policy: Policy,
    complexity: Complexity,
) -> Route:
    decision = _decide(wish, ability, policy, complexity, raw=wishes.raw)
    reason = kind = decision.reason
    if kind == "auto":
        reason += ":" + ("+".join(complexity.features) or "plain")
    if len(candidates) > 1:
        size = "large" if ability is candidates[-1] else "small"
        reason, kind = f"model_auto:{size},{reason}", f"model_auto:{size},{kind}"
    return Route(
        mode=decision.mode,
        enable_thinking=decision.enable_thinking,
        budget=_budget(wishes, decision, policy, complexity),
        complexity=complexity.score,
        model=ability.model,
        reason=reason,
        reason_kind=kind,
        is_open=decision.is_open,
    )


def under_ceiling(budget: int | None, thinking: ThinkingConfig) -> int | None:
    """The smaller of a wish and the server's ceiling, where either exists."""
    return min((b for b in (budget, thinking.max_budget) if b is not None), default=None)


def grown_budget(score: float, thinking: ThinkingConfig) -> int:
    """The budget of a thought that complexity asked for: ``effort.low`` at ``think_from``,
    ``effort.high`` at 1, in proportion between them."""
    low, high = thinking.effort.low, thinking.effort.high
    share = max(0.0, score - thinking.think_from) / max(1.0 - thinking.think_from, 1e-9)
    return low + round((high - low) * min(1.0, share))


def _wish(wishes: Wishes) -> _Decision | None:
    if wishes.enabled is not None:
        return _asked(wishes.enabled, f"explicit:{wishes.enabled_by}", wishes.enabled_by)
    if wishes.budget == 0:
        return _asked(False, "explicit:budget", wishes.budget_by)
    if wishes.soft_switch is not None:
        return _asked(wishes.soft_switch, "explicit:soft_switch", "messages")
    if wishes.budget is not None:
        return _asked(True, "explicit:budget", wishes.budget_by)
    return None


def _asked(thinking: bool, reason: str, param: str | None = None) -> _Decision:
    return _Decision(THINKING if thinking else NON_THINKING, reason, param, thinking)


def _by_preference(
    wish: _Decision | None, candidates: Sequence[Abilities], policy: Policy, complexity: Complexity
) -> list[Abilities]:
    """The candidates that can do what is wished, the best first; one of them where none can."""
    fit = [a for a in candidates if wish is None or wish.mode in _can(a)]
    ranked = fit or list(candidates)
    if complexity.score >= policy.routing.large_from:
        ranked.reverse()
    return ranked if fit else ranked[:1]


def _can(ability: Abilities) -> frozenset[ThinkingMode]:
    return ability.modes if ability.thinks else ability.modes - {THINKING}


def _decide(
    wish: _Decision | None,
    ability: Abilities,
    policy: Policy,
    complexity: Complexity,
    *,
    raw: bool,
) -> _Decision:
    if not ability.thinks:
        is_open = NON_THINKING not in ability.modes and NON_THINKING in ability.open_modes
        never = _Decision(NON_THINKING, "model:never_thinks", is_open=is_open)
        return never if is_open else _served(never, ability)
    if wish is not None:
        return _served(wish, ability)
    default = policy.thinking.default
    left_open = default == "auto" and not raw
    if ability.open_modes and (left_open or not ability.modes):
        return _by_complexity(ability, policy, complexity)
    if isinstance(default, bool):
        silent = _asked(default, "default:config")
    else:
        mode = THINKING if ability.by_default else NON_THINKING
        silent = _Decision(mode, "default:template")
    if silent.mode in ability.modes:
        return silent
    return _asked(silent.mode is NON_THINKING, "default:pool")


def _by_complexity(ability: Abilities, policy: Policy, complexity: Complexity) -> _Decision:
    thinking = complexity.score >= policy.thinking.think_from
    if (THINKING if thinking else NON_THINKING) not in ability.open_modes:
        thinking = not thinking
    mode = THINKING if thinking else NON_THINKING
    return _Decision(mode, "auto", enable_thinking=thinking, is_open=True)


def _served(decision: _Decision, ability: Abilities) -> _Decision:
    if decision.mode in ability.modes:
        return decision
    served = ", ".join(sorted(ability.modes)) or "auto"
    raise RequestError(
        f"the request is for the mode {decision.mode.value} ({decision.reason}); the pools of "
        f"{ability.model!r} serve: {served}",
        param=decision.param,
        code="mode_not_served",
    )


def _budget(
    wishes: Wishes, decision: _Decision, policy: Policy, complexity: Complexity
) -> int | None:
    if wishes.raw:
        return under_ceiling(wishes.budget, policy.thinking)
    if decision.mode is NON_THINKING:
        return None
    if decision.reason == "auto":
        return under_ceiling(grown_budget(complexity.score, policy.thinking), policy.thinking)
    return under_ceiling(wishes.budget, policy.thinking)
