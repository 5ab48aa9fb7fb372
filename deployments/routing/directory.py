"""The models and pools behind one ingress, and the places requests hold in them.

1. ``open_directory`` asks every pool for its model's limits; a pool that could never serve is an
   error then.
2. ``candidates`` finds what a request's ``model`` may mean; ``refuse_if_full`` refuses it before
   any work where no pool of theirs has room.
3. ``in_turn`` says which of its routes can be served now, the best first.
4. ``take`` gives it a place in the least full pool of one; no other request can get between the
   look and the step. ``Place.refit`` moves it on where its prompt turns out too long.
5. The place is held until the answer has been sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...workers.types import RequestError, ThinkingMode
from ..api.errors import ApiError
from ..config import AUTO_MODEL, PoolConfig, ServiceConfig
from ..limits import AdmissionGate
from ..metrics import Metrics, PoolMetrics
from ..off_loop import OffLoop
from ..stream_mux import EngineTransport, StreamMux
from ..text_service import TextService
from ..wire import ModelFacts
from .classifier import Abilities, Route
from .pool_choice import (
    PoolLoad,
    hindrance,
    in_turn,
    least_full,
    named_modes,
    open_modes,
    serves,
)


@dataclass(frozen=True, slots=True)
class ServingPool:
    """One pool that owns requests: its limits, the way to its engines, its places."""

    config: PoolConfig
    model: str
    facts: ModelFacts
    transport: EngineTransport
    mux: StreamMux
    gate: AdmissionGate
    metrics: PoolMetrics

    @property
    def name(self) -> str:
        """The pool's name in the configuration."""
        return self.config.name

    @property
    def load(self) -> PoolLoad:
        """What the choice between pools looks at."""
        return PoolLoad(self.gate.inside, self.gate.limit, self.transport.has_replica())


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One public model: what it can do, its text, its pools in the order of the configuration."""

    abilities: Abilities
    root: str
    text: TextService
    pools: tuple[ServingPool, ...]

    @property
    def name(self) -> str:
        """The name clients use."""
        return self.abilities.model

    @property
    def max_model_len(self) -> int:
        """The longest context that any of its pools holds."""
        return max(pool.facts.max_model_len for pool in self.pools)

    @property
    def num_tokens(self) -> int:
        """The tokens that exist; ids from there up are padding rows."""
        return self.pools[0].facts.num_tokens


class Place:
    """One request's place in one pool, until ``leave``."""

    def __init__(self, eligible: Sequence[ServingPool]) -> None:
        self._eligible = eligible
        self.pool = _enter_least_full(eligible)

    @property
    def largest_context(self) -> int:
        """The longest context of the pools that could serve the request."""
        return max(pool.facts.max_model_len for pool in self._eligible)

    def refit(self, num_tokens: int) -> None:
        """Move to a pool whose context holds ``num_tokens``, where this one's does not.

        Stays where no pool's does. Raises ``ApiError`` 503 where those that could are full.
        """
        if num_tokens <= self.pool.facts.max_model_len:
            return
        fit = [pool for pool in self._eligible if num_tokens <= pool.facts.max_model_len]
        if fit:
            larger = _enter_least_full(fit)
            self.pool.gate.leave()
            self.pool = larger

    def leave(self) -> None:
        """Give the place back; once."""
        self.pool.gate.leave()


class Directory:
    """Every model by its public name."""

    def __init__(self, models: Iterable[ServedModel], auto: tuple[str, str] | None) -> None:
        self.models = {model.name: model for model in models}
        self.auto = None if auto is None else (self.models[auto[0]], self.models[auto[1]])
        self.default = next(iter(self.models.values()))

    @property
    def pools(self) -> list[ServingPool]:
        """All pools, model by model."""
        return [pool for model in self.models.values() for pool in model.pools]

    def candidates(self, name: str | None) -> tuple[ServedModel, ...]:
        """The model a request names, the first one for a silent request, two for ``auto``.

        Raises ``RequestError`` (404) for a name that nothing serves.
        """
        if name == AUTO_MODEL and self.auto is not None:
            return self.auto
        model = self.default if name is None else self.models.get(name)
        if model is None:
            served = [*self.models, *([] if self.auto is None else [AUTO_MODEL])]
            raise RequestError(
                f"the model {str(name)[:128]!r} does not exist; served are: "
                f"{', '.join(repr(known) for known in served)}",
                param="model",
                code="model_not_found",
            )
        return (model,)

    def refuse_if_full(self, candidates: Sequence[ServedModel]) -> None:
        """Raise ``ApiError`` 503 where no pool of any candidate has room."""
        pools = [pool for model in candidates for pool in model.pools]
        if all(pool.gate.is_full for pool in pools):
            raise _all_full(pools)

    def in_turn(self, routes: Sequence[Route]) -> list[Route]:
        """Of a request's routes, best first, those to try now; one that is fallen back to says so.

        At least one comes out: where none can be served, the one to wait for or to be refused by.
        """
        kept = [hindrance([pool.load for pool in self._serving(route)]) for route in routes]
        return [
            routes[place] if kept[0] is None or place == 0 else routes[place].instead(kept[0])
            for place in in_turn(kept)
        ]

    def take(self, route: Route) -> Place:
        """A place in the least full pool that serves ``route``.

        Raises ``ApiError`` 503 with ``Retry-After`` where all of them are full.
        """
        return Place(self._serving(route))

    def _serving(self, route: Route) -> list[ServingPool]:
        return [
            pool
            for pool in self.models[route.model].pools
            if serves(pool.config.modes, route.mode, is_open=route.is_open)
        ]

    async def close(self) -> None:
        """End the streams from the engines."""
        await asyncio.gather(*(pool.mux.close() for pool in self.pools))


async def open_directory(
    config: ServiceConfig,
    transports: Mapping[str, EngineTransport],
    metrics: Metrics,
    off_loop: OffLoop,
) -> Directory:
    """Ask every pool for its limits and load each checkpoint's tokenizer and template once.

    Raises ``ValueError`` for a pool without transport or one that could never serve its model,
    and what the files of a checkpoint raise that cannot be used.
    """
    missing = [pool.name for pool in config.serving_pools if pool.name not in transports]
    if missing:
        raise ValueError(f"no engines are bound for the pools: {', '.join(missing)}")
    answers = await asyncio.gather(*(transports[p.name].facts() for p in config.serving_pools))
    pools: dict[str, list[ServingPool]] = {}
    for pool, facts in zip(config.serving_pools, answers, strict=True):
        name = config.model_name_of(pool)
        serving = _serving_pool(config, pool, transports[pool.name], facts, metrics)
        pools.setdefault(name, []).append(serving)
    # Text that is a little too long for the largest context is refused with its exact length.
    longest: dict[str, int] = {}
    for facts in answers:
        longest[facts.checkpoint] = max(facts.max_model_len, longest.get(facts.checkpoint, 0))
    texts = {
        folder: TextService(Path(folder), limit, off_loop) for folder, limit in longest.items()
    }
    models = [
        _served_model(config, name, own, texts[own[0].facts.checkpoint])
        for name, own in pools.items()
    ]
    return Directory(models, config.routing.auto_models)


def _serving_pool(
    config: ServiceConfig,
    pool: PoolConfig,
    transport: EngineTransport,
    facts: ModelFacts,
    metrics: Metrics,
) -> ServingPool:
    mux = StreamMux(
        transport,
        max_buffered_tokens=config.api.max_buffered_tokens,
        idle_s=config.replicas.idle_subscription_s,
        max_migrations=config.replicas.max_migrations,
    )
    mux.know(facts.replica_id)
    model = config.model_name_of(pool)
    limit = pool.max_in_flight or config.api.max_in_flight
    return ServingPool(
        config=pool,
        model=model,
        facts=facts,
        transport=transport,
        mux=mux,
        gate=AdmissionGate(limit, config.api.retry_after_s),
        metrics=metrics.pool(model, pool.name, pool.slo),
    )


def _served_model(
    config: ServiceConfig, name: str, pools: Sequence[ServingPool], text: TextService
) -> ServedModel:
    for pool in pools:
        able = named_modes(pool.config.modes) | open_modes(pool.config.modes)
        if not text.thinks and ThinkingMode.NON_THINKING not in able:
            raise ValueError(
                f"pool {pool.name!r} serves only thinking, but {name!r} never thinks: its chat "
                "template has no thinking; add 'non_thinking' to its modes"
            )
    abilities = Abilities(
        model=name,
        thinks=text.thinks,
        by_default=text.thinks_by_default,
        modes=frozenset().union(*(named_modes(pool.config.modes) for pool in pools)),
        open_modes=frozenset().union(*(open_modes(pool.config.modes) for pool in pools)),
    )
    return ServedModel(abilities, config.engine_of(pools[0].config).model, text, tuple(pools))


def _enter_least_full(pools: Sequence[ServingPool]) -> ServingPool:
    place = least_full([pool.load for pool in pools])
    if place is None:
        raise _all_full(pools)
    pools[place].gate.enter()
    return pools[place]


def _all_full(pools: Sequence[ServingPool]) -> ApiError:
    places = ", ".join(f"{pool.name} ({pool.gate.inside} of {pool.gate.limit})" for pool in pools)
    return pools[0].gate.refusal(f"every pool that could serve this is full: {places}")
