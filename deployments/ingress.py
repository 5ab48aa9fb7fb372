"""The HTTP side: an ASGI application over any engine transport; knows nothing of Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..workers.types import RequestError
from .access import AccessMiddleware
from .api.chat import chat_completions
from .api.completions import completions
from .api.endpoint import JsonEndpoint
from .api.errors import ApiError
from .api.models import PlainEndpoints
from .api.openapi import openapi_document
from .api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from .api.service import Service
from .api.tokens import detokenize, tokenize
from .auth import ApiKeyMiddleware
from .config import ServiceConfig, load_api_keys
from .edge import EdgeMiddleware
from .limits import AdmissionGate
from .metrics import Metrics
from .off_loop import OffLoop
from .routing.directory import open_directory
from .stream_mux import EngineTransport


async def create_app(config: ServiceConfig, transports: Mapping[str, EngineTransport]) -> ASGIApp:
    """Build the application over the serving pools' engines, by pool; asks them for limits first.

    Raises ``ValueError`` for key files, pools and checkpoints that cannot be used.
    """
    keys = load_api_keys(config.api)
    metrics, off_loop = Metrics(), OffLoop()
    directory = await open_directory(config, transports, metrics, off_loop)
    service = Service(
        config=config,
        directory=directory,
        off_loop=off_loop,
        gate=AdmissionGate(config.api.max_in_flight, config.api.retry_after_s),
        metrics=metrics,
    )
    layers = [
        Middleware(EdgeMiddleware, max_header_bytes=config.api.max_header_bytes),
        Middleware(AccessMiddleware, metrics=metrics),
    ]
    if keys:
        layers.append(Middleware(ApiKeyMiddleware, keys=keys))

    async def answer_error(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _http_error(request, error).response()
        return service.to_api_error(error).response()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await directory.close()
        off_loop.close()

    app = Starlette(
        routes=_routes(service),
        middleware=layers,
        exception_handlers=dict.fromkeys(
            (HTTPException, ApiError, RequestError, Exception), answer_error
        ),
        lifespan=lifespan,
    )
    # A redirect would be built from the client's Host header.
    app.router.redirect_slashes = False
    return app


def _routes(service: Service) -> list[Route]:
    plain = PlainEndpoints(service)
    chat = JsonEndpoint(service, ChatCompletionRequest, chat_completions)
    complete = JsonEndpoint(service, CompletionRequest, completions)
    to_ids = JsonEndpoint(service, TokenizeRequest, tokenize)
    to_text = JsonEndpoint(service, DetokenizeRequest, detokenize)
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/tokenize", to_ids, methods=["POST"]),
        Route("/detokenize", to_text, methods=["POST"]),
        Route("/v1/models", plain.list_models),
        Route("/v1/models/{model_id:path}", plain.get_model),
        Route("/health", plain.health),
        Route("/version", plain.version),
        Route("/metrics", plain.metrics),
        Route("/openapi.json", _openapi(service)),
    ]


def _openapi(service: Service) -> Any:
    document = openapi_document(service.directory.default.name)

    async def answer(request: Request) -> Response:
        return document

    return answer


def _http_error(request: Request, error: HTTPException) -> ApiError:
    path = request.url.path[:128]
    if error.status_code == 404:
        return ApiError(404, f"there is no route {path!r}", code="route_not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return ApiError(
            405,
            f"{path!r} takes {allowed}, not {request.method}",
            code="method_not_allowed",
            headers=error.headers,
        )
    return ApiError(error.status_code, error.detail, headers=error.headers)
