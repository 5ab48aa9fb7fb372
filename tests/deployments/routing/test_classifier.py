"""The classifier: a table of cases, and what holds for every request and configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.config import RoutingConfig, ThinkingConfig
from inference_pio.deployments.routing.classifier import (
    Abilities,
    Policy,
    Route,
    Wishes,
    classify,
    routes,
)
from inference_pio.deployments.routing.complexity import WEIGHTS, Complexity
from inference_pio.workers.types import RequestError, ThinkingMode

THINK, ANSWER = ThinkingMode.THINKING, ThinkingMode.NON_THINKING
BOTH = frozenset({THINK, ANSWER})
HYBRID = Abilities("small", thinks=True, by_default=True, modes=BOTH, open_modes=BOTH)
INSTRUCT = Abilities("large", thinks=False, by_default=False, modes=frozenset({ANSWER}))
EASY, HARD = Complexity(0.1), Complexity(0.8, ("math", "long"))


def policy(**thinking: Any) -> Policy:
    return Policy(ThinkingConfig.model_validate(thinking), RoutingConfig())


def route(
    wishes: Wishes = Wishes(),  # noqa: B008 - frozen
    ability: Abilities = HYBRID,
    complexity: Complexity = EASY,
    **thinking: Any,
) -> Route:
    return classify(wishes, [ability], policy(**thinking), complexity)


ON = Wishes(enabled=True, enabled_by="enable_thinking")
OFF = Wishes(enabled=False, enabled_by="thinking")


@pytest.mark.parametrize(
    ("wishes", "thinking", "mode", "switch", "budget", "reason"),
    [
        (ON, {}, THINK, True, None, "explicit:enable_thinking"),
        (OFF, {"default": True}, ANSWER, False, None, "explicit:thinking"),
        (replace(ON, budget=0), {}, THINK, True, 0, "explicit:enable_thinking"),
        (replace(ON, soft_switch=False), {}, THINK, True, None, "explicit:enable_thinking"),
        (replace(OFF, soft_switch=True), {}, ANSWER, False, None, "explicit:thinking"),
        (replace(OFF, budget=50), {}, ANSWER, False, None, "explicit:thinking"),
        (Wishes(budget=0), {}, ANSWER, False, None, "explicit:budget"),
        (Wishes(budget=0, soft_switch=True), {}, ANSWER, False, None, "explicit:budget"),
        (Wishes(soft_switch=False), {"default": True}, ANSWER, False, None, "explicit:soft_switch"),
        (Wishes(soft_switch=True), {"default": False}, THINK, True, None, "explicit:soft_switch"),
        (
            Wishes(soft_switch=False, budget=50),
            {"default": "auto"},
            ANSWER,
            False,
            None,
            "explicit:soft_switch",
        ),
        (Wishes(soft_switch=True, budget=50), {}, THINK, True, 50, "explicit:soft_switch"),
        (Wishes(budget=50), {"default": False}, THINK, True, 50, "explicit:budget"),
        (Wishes(budget=50), {"max_budget": 20}, THINK, True, 20, "explicit:budget"),
        (Wishes(), {}, THINK, None, None, "default:template"),
        (Wishes(), {"max_budget": 20}, THINK, None, 20, "default:template"),
        (Wishes(), {"default": False}, ANSWER, False, None, "default:config"),
        (Wishes(), {"default": True}, THINK, True, None, "default:config"),
        (Wishes(), {"default": "auto"}, ANSWER, False, None, "auto:plain"),
        (Wishes(raw=True), {"default": "auto"}, THINK, None, None, "default:template"),
        (Wishes(raw=True, budget=0), {}, ANSWER, False, 0, "explicit:budget"),
        (Wishes(raw=True), {"max_budget": 9}, THINK, None, 9, "default:template"),
    ],
)
def test_the_table(
    wishes: Wishes,
    thinking: dict[str, Any],
    mode: ThinkingMode,
    switch: bool | None,
    budget: int | None,
    reason: str,
) -> None:
    found = route(wishes, **thinking)
    assert (found.mode, found.enable_thinking, found.budget) == (mode, switch, budget)
    assert found.reason == reason


def test_complexity_decides_what_is_left_open() -> None:
    hard = route(complexity=HARD, default="auto")
    assert (hard.mode, hard.enable_thinking, hard.is_open) == (THINK, True, True)
    assert (hard.reason, hard.reason_kind) == ("auto:math+long", "auto")
    assert hard.complexity == 0.8
    # 0.8 lies 5/7 of the way from 0.3 to 1.
    assert hard.budget == 1024 + round((16384 - 1024) * 5 / 7)
    assert route(complexity=Complexity(0.3), default="auto").budget == 1024
    assert route(complexity=Complexity(1.0), default="auto").budget == 16384
    assert route(complexity=HARD, default="auto", max_budget=99).budget == 99
    assert route(complexity=Complexity(0.29), default="auto").mode is ANSWER


def test_complexity_chooses_among_what_open_pools_serve() -> None:
    thinker = replace(HYBRID, open_modes=frozenset({THINK}))
    assert route(ability=thinker, default="auto").mode is THINK
    answerer = replace(HYBRID, open_modes=frozenset({ANSWER}))
    assert route(ability=answerer, complexity=HARD, default="auto").mode is ANSWER


def test_auto_without_an_open_pool_is_the_templates_default() -> None:
    closed = replace(HYBRID, open_modes=frozenset())
    assert route(ability=closed, complexity=HARD, default="auto").reason == "default:template"


def test_a_pool_of_auto_alone_takes_silent_requests_only() -> None:
    only = replace(HYBRID, modes=frozenset())
    assert route(ability=only).reason == "auto:plain"
    assert route(Wishes(raw=True), only, HARD).budget is None
    with pytest.raises(RequestError, match="serve: auto"):
        route(ON, only)


def test_silent_requests_take_the_mode_that_there_is() -> None:
    answers = replace(HYBRID, modes=frozenset({ANSWER}), open_modes=frozenset())
    found = route(ability=answers, default=True)
    assert (found.mode, found.enable_thinking, found.reason) == (ANSWER, False, "default:pool")
    thinks = replace(HYBRID, modes=frozenset({THINK}), open_modes=frozenset())
    assert route(ability=thinks, default=False).mode is THINK


@pytest.mark.parametrize("wishes", [Wishes(), ON, OFF, Wishes(soft_switch=True), Wishes(budget=9)])
def test_a_model_without_thinking_never_thinks(wishes: Wishes) -> None:
    found = route(wishes, INSTRUCT, HARD, default="auto")
    assert (found.mode, found.enable_thinking, found.budget) == (ANSWER, None, None)
    assert found.reason == "model:never_thinks"


def test_a_mode_that_no_pool_serves_is_refused_with_those_that_are() -> None:
    answers = replace(HYBRID, modes=frozenset({ANSWER}))
    with pytest.raises(RequestError, match="serve: non_thinking") as caught:
        route(ON, answers)
    assert (caught.value.code, caught.value.param) == ("mode_not_served", "enable_thinking")
    with pytest.raises(RequestError) as caught:
        route(Wishes(soft_switch=True), answers)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("wishes", "complexity", "model", "mode", "reason"),
    [
        (Wishes(), EASY, "small", THINK, "model_auto:small,default:template"),
        (Wishes(), HARD, "large", ANSWER, "model_auto:large,model:never_thinks"),
        (ON, HARD, "small", THINK, "model_auto:small,explicit:enable_thinking"),
        (OFF, HARD, "large", ANSWER, "model_auto:large,model:never_thinks"),
        (OFF, EASY, "small", ANSWER, "model_auto:small,explicit:thinking"),
    ],
)
def test_the_model_auto(
    wishes: Wishes, complexity: Complexity, model: str, mode: ThinkingMode, reason: str
) -> None:
    found = classify(wishes, [HYBRID, INSTRUCT], policy(), complexity)
    assert (found.model, found.mode, found.reason) == (model, mode, reason)


MODES = st.frozensets(st.sampled_from(ThinkingMode))
ABILITIES = st.builds(
    Abilities,
    model=st.just("m"),
    thinks=st.booleans(),
    by_default=st.booleans(),
    modes=MODES,
    open_modes=MODES,
).filter(lambda a: bool(a.modes | a.open_modes) and (a.thinks or ANSWER in a.modes | a.open_modes))
MAYBE = st.none() | st.booleans()
WISHES = st.builds(
    Wishes,
    enabled=MAYBE,
    enabled_by=st.just("enable_thinking"),
    budget=st.none() | st.integers(0, 10**9),
    budget_by=st.just("thinking_budget"),
    soft_switch=MAYBE,
    raw=st.booleans(),
)
THINKING = st.builds(
    ThinkingConfig,
    default=MAYBE | st.just("auto"),
    think_from=st.floats(0, 1),
    max_budget=st.none() | st.integers(0, 20_000),
)
COMPLEXITIES = st.builds(
    Complexity,
    score=st.floats(0, 1),
    features=st.lists(st.sampled_from(sorted(WEIGHTS)), unique=True, max_size=3).map(tuple),
)
KINDS = {
    "explicit:enable_thinking",
    "explicit:budget",
    "explicit:soft_switch",
    "model:never_thinks",
    "auto",
    "default:config",
    "default:template",
    "default:pool",
}


@given(WISHES, st.lists(ABILITIES, min_size=1, max_size=2), THINKING, COMPLEXITIES)
def test_what_always_holds(
    wishes: Wishes,
    candidates: list[Abilities],
    thinking: ThinkingConfig,
    complexity: Complexity,
) -> None:
    decide = Policy(thinking, RoutingConfig())
    try:
        found = classify(wishes, candidates, decide, complexity)
    except RequestError:
        # Nobody serves it, so a mode was wished for: silent requests are always routable.
        assert (wishes.enabled, wishes.budget, wishes.soft_switch) != (None, None, None)
        return
    assert found == classify(wishes, candidates, decide, complexity)  # pure
    if thinking.max_budget is not None and found.budget is not None:
        assert found.budget <= thinking.max_budget
    if wishes.budget is not None and found.budget is not None:
        assert found.budget <= wishes.budget
    if found.mode is ANSWER and not wishes.raw:
        assert found.budget is None
    ability = next(a for a in candidates if a.model == found.model)
    if len(candidates) == 1:
        # Somebody serves it, and a wish is always granted.
        assert found.mode in (ability.open_modes if found.is_open else ability.modes)
        if ability.thinks and wishes.enabled is not None:
            assert found.mode is (THINK if wishes.enabled else ANSWER)
        if not ability.thinks:
            assert found.mode is ANSWER
        assert found.reason_kind in KINDS
    else:
        assert found.reason_kind.split(",")[1] in KINDS
    assert ";" not in found.reason
    assert found.reason.isascii()


@given(
    WISHES,
    st.lists(ABILITIES, min_size=1, max_size=2),
    THINKING,
    COMPLEXITIES,
    st.sampled_from(["full", "unavailable"]),
)
def test_what_always_holds_of_a_second_choice(
    wishes: Wishes,
    candidates: list[Abilities],
    thinking: ThinkingConfig,
    complexity: Complexity,
    cause: str,
) -> None:
    candidates = [replace(ability, model=f"m{n}") for n, ability in enumerate(candidates)]
    decide = Policy(thinking, RoutingConfig())
    try:
        found = routes(wishes, candidates, decide, complexity)
    except RequestError:
        return
    assert found[0] == classify(wishes, candidates, decide, complexity)
    assert len({route.model for route in found}) == len(found) <= len(candidates)
    if len(candidates) == 1:
        assert len(found) == 1, "a named model has no second choice"
    for second in found[1:]:
        ability = next(a for a in candidates if a.model == second.model)
        # It is what a client that names the model gets, but for the words that say why.
        (alone,) = routes(wishes, [ability], decide, complexity)
        size = "large" if ability is candidates[-1] else "small"
        assert replace(second, reason=alone.reason, reason_kind=alone.reason_kind) == alone
        assert second.reason == f"model_auto:{size},{alone.reason}"
        told = second.instead(cause)
        assert told.reason == f"fallback:{cause},{second.reason}"
        assert told.reason_kind == f"fallback:{cause},{second.reason_kind}"
        if wishes.enabled is not None:
            # What is wished stands above an answer: both grant it, or it is no second choice.
            assert second.mode is found[0].mode is (THINK if wishes.enabled else ANSWER)


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_complexity_never_means_less_thought(one: float, other: float) -> None:
    low, high = sorted((one, other))
    before = route(complexity=Complexity(low), default="auto")
    after = route(complexity=Complexity(high), default="auto")
    assert (before.budget or 0) <= (after.budget or 0)
    assert not (before.mode is THINK and after.mode is ANSWER)
