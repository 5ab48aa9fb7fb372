"""From a request's wishes to its place in a pool, and what the answer's header says of it.

1. ``decide`` gives the routes that a request may take, the best one first: one, or two where the
   client left the model to us.
2. ``serve_first`` tries those that can be served now. One that turns out to be full or without a
   replica before any of its answer exists is left for the next, which says so in its reason.
3. ``enter`` takes the place in a pool, ``fit_context`` settles where the prompt's length fits.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response

from ...workers.types import RequestError
from ..edge import PASSED_SESSION_HEADER, SESSION_HEADER
from ..routing.classifier import Route, Wishes
from ..routing.classifier import routes as routes_of
from ..routing.complexity import Complexity
from ..routing.directory import Place, ServedModel, ServingPool
from ..routing.pool_choice import Hindrance
from ..wire import RouteHints, route_hints
from .errors import ApiError
from .protocol import SamplingFields
from .service import Service
from .validation import check_context

ROUTE_HEADER = "x-inference-pio-route"
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HINDRANCES: dict[str, Hindrance] = {
    "overloaded": "full",
    "queue_full": "full",
    "engine_unavailable": "unavailable",
}
"""Codes of refusals that say something of the pool and nothing of the request. No token of an
answer exists when one is raised."""

Serve = Callable[[Route, ExitStack], Awaitable[Response]]
"""Answers by one route; what it enters is left when the answer has been sent."""


@dataclass(frozen=True, slots=True)
class Routed:
    """A request's route, its model and its place in a pool of it."""

    route: Route
    model: ServedModel
    place: Place

    @property
    def pool(self) -> ServingPool:
        """The pool that serves it."""
        return self.place.pool

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says about it."""
        route = self.route
        parts = {"mode": route.mode.value, "pool": self.pool.name}
        if route.budget is not None:
            parts["budget"] = str(route.budget)
        parts |= {"complexity": f"{route.complexity:.2f}", "reason": route.reason}
        return {ROUTE_HEADER: "; ".join(f"{name}={value}" for name, value in parts.items())}


def decide(
    service: Service,
    candidates: Sequence[ServedModel],
    wishes: Wishes,
    complexity: Complexity,
) -> tuple[Route, ...]:
    """The routes among ``candidates``, the best one first.

    Raises ``RequestError`` where none serves what is wished.
    """
    return routes_of(wishes, [model.abilities for model in candidates], service.policy, complexity)


async def serve_first(
    service: Service, found: Sequence[Route], held: ExitStack, serve: Serve
) -> Response:
    """The answer of the first of the routes ``found`` that can be served.

    Raises what ``serve`` raises: of the last one tried, or at once for a request that is refused
    for its own sake.
    """
    *others, last = service.directory.in_turn(found)
    for route in others:
        with ExitStack() as attempt:
            try:
                response = await serve(route, attempt)
            except (ApiError, RequestError) as error:
                cause = _HINDRANCES.get(error.code or "")
                if cause is None:
                    raise
                last = last.instead(cause)
            else:
                held.push(attempt.pop_all())
                return response
    return await serve(last, held)


def enter(service: Service, route: Route, held: ExitStack) -> Routed:
    """Take a place for ``route``, to be left with ``held``. Raises ``ApiError`` 503 where full."""
    place = service.directory.take(route)
    held.callback(place.leave)
    return Routed(route, service.directory.models[route.model], place)


def fit_context(routed: Routed, prompts: Sequence[int], max_tokens: int | None, param: str) -> None:
    """Settle in a pool whose context holds every prompt and ``max_tokens`` more.

    ``prompts`` are lengths in tokens. Without ``max_tokens`` one more must fit. Raises
    ``RequestError`` (``context_length_exceeded``) with the numbers where no pool's does.
    """
    longest = max(prompts)
    routed.place.refit(longest + (max_tokens or 1))
    check_context(longest, max_tokens, routed.place.largest_context, param)


def hints_for(
    service: Service, headers: Headers, body: SamplingFields, prompt: Sequence[int]
) -> RouteHints:
    """What the choice of a replica may know of a request: its prompt's beginning, its session."""
    session = session_of(headers, service.config.routing.session_header, body.prompt_cache_key)
    return route_hints(prompt, body.cache_salt, session)


def session_of(headers: Headers, header: str, prompt_cache_key: str | None) -> str | None:
    """The name a client gives its conversation: the configured header, else the cache key.

    Anything but 1 to 64 letters, digits, ``_`` and ``-`` names nothing.
    """
    passed = PASSED_SESSION_HEADER if header == SESSION_HEADER.decode() else header.encode()
    for name in (*headers.getlist(passed.decode())[:1], prompt_cache_key):
        if name is not None and _SESSION.fullmatch(name):
            return name
    return None
