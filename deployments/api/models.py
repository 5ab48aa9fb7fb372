"""``GET /v1/models`` and the plain GET endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from ..config import AUTO_MODEL
from ..engine_metrics import EngineReading
from ..pool_metrics import PoolReading
from ..routing.directory import ServedModel
from ..version import VERSION
from .errors import ApiError, json_response
from .service import Service


class PlainEndpoints:
    """Answers that need no request body."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list_models(self, request: Request) -> Response:
        """``GET /v1/models``: every model, and the name ``auto`` where it chooses between two."""
        directory = self._service.directory
        cards = [self._card((model,)) for model in directory.models.values()]
        if directory.auto is not None:
            cards.append(self._card(directory.auto))
        return json_response({"object": "list", "data": cards})

    async def get_model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``."""
        found = self._service.directory.candidates(request.path_params["model_id"])
        return json_response(self._card(found))

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 after a real turn of an engine loop of every pool, else 503."""
        pools = self._service.directory.pools
        limit = self._service.config.replicas.health_timeout_s
        results = await asyncio.gather(
            *(pool.transport.health(limit) for pool in pools), return_exceptions=True
        )
        silent = {
            pool.name: type(result).__name__
            for pool, result in zip(pools, results, strict=True)
            if isinstance(result, BaseException)
        }
        if silent:
            said = ", ".join(f"{name} ({error})" for name, error in silent.items())
            raise ApiError(
                503,
                f"pools whose engines do not answer: {said}; "
                f"the other {len(pools) - len(silent)} of {len(pools)} do",
                code="engine_unavailable",
                headers={"Retry-After": str(self._service.config.api.retry_after_s)},
            )
        return json_response({"status": "ok", "pools": {pool.name: "ok" for pool in pools}})

    async def version(self, request: Request) -> Response:
        """``GET /version``: of the package, what computes in each pool, and its attention."""
        pools = self._service.directory.pools
        kernels = {pool.name: pool.facts.kernels for pool in pools}
        attention = {pool.name: pool.facts.attention for pool in pools}
        return json_response({"version": VERSION, "kernels": kernels, "attention": attention})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        service = self._service
        metrics, pools = service.metrics, service.directory.pools
        metrics.in_flight.set(service.gate.inside)
        metrics.unknown_chunks.set(sum(pool.mux.unknown_chunks for pool in pools))
        seen = [
            PoolReading(
                pool.name,
                pool.gate.inside,
                pool.gate.limit,
                pool.mux.stale_chunks,
                pool.mux.migrations,
            )
            for pool in pools
        ]
        found = await asyncio.gather(*(pool.mux.stats() for pool in pools))
        readings = [
            EngineReading(pool.model, pool.name, replica, stats)
            for pool, replicas in zip(pools, found, strict=True)
            for replica, stats in replicas.items()
        ]
        return Response(metrics.render(readings, seen), media_type=CONTENT_TYPE_LATEST)

    def _card(self, models: Sequence[ServedModel]) -> dict[str, Any]:
        """One model; two: the name that chooses between them."""
        pools = [pool for model in models for pool in model.pools]
        card: dict[str, Any] = {
            "id": models[0].name if len(models) == 1 else AUTO_MODEL,
            "object": "model",
            "created": self._service.created,
            "owned_by": "inference-pio",
            "root": models[0].root if len(models) == 1 else None,
            "parent": None,
            # Whichever of the two is chosen, a prompt of this length fits.
            "max_model_len": min(model.max_model_len for model in models),
            "modes": sorted({mode for pool in pools for mode in pool.config.modes}),
            "pools": [
                {
                    "name": pool.name,
                    "modes": list(pool.config.modes),
                    "max_model_len": pool.facts.max_model_len,
                    "attention": pool.facts.attention,
                }
                for pool in pools
            ],
        }
        if len(models) > 1:
            card["chooses_between"] = [model.name for model in models]
        return card
