"""``GET /v1/models`` and the plain GET endpoints."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from ..version import VERSION
from .errors import ApiError, json_response
from .service import Service
from .validation import check_model_name


class PlainEndpoints:
    """Answers that need no request body."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list_models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return json_response({"object": "list", "data": [self._card()]})

    async def get_model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``."""
        check_model_name(request.path_params["model_id"], self._service.model_name)
        return json_response(self._card())

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 after a real turn of the engine loop, else 503."""
        try:
            await self._service.transport.health(self._service.config.replicas.health_timeout_s)
        except Exception as error:
            raise ApiError(
                503,
                f"the engine does not answer ({type(error).__name__})",
                code="engine_unavailable",
                headers={"Retry-After": str(self._service.config.api.retry_after_s)},
            ) from error
        return json_response({"status": "ok"})

    async def version(self, request: Request) -> Response:
        """``GET /version``."""
        return json_response({"version": VERSION})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        service = self._service
        service.metrics.in_flight.set(service.gate.inside)
        service.metrics.unknown_chunks.set(service.mux.unknown_chunks)
        text = service.metrics.render(await service.mux.stats())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "inference-pio",
            "root": self._service.config.engine.model,
            "parent": None,
            "max_model_len": self._service.facts.max_model_len,
        }
