"""What all POST endpoints do around their own work: admit, read, parse, validate, answer errors."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..limits import read_body, require_json
from .errors import from_validation_error
from .fields import RequestModel
from .json_body import INLINE_BYTES, parse_object
from .service import Service
from .sse import ClientLeftError, while_connected

Body = TypeVar("Body", bound=RequestModel)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call(Generic[Body]):
    """One validated request: ``size`` in bytes, ``id`` unique in every process,
    ``created`` in Unix seconds."""

    service: Service
    body: Body
    size: int
    id: str
    created: int


Handler = Callable[[Call[Body]], Awaitable[Response]]


class JsonEndpoint(Generic[Body]):
    """An ASGI endpoint for one JSON request model."""

    def __init__(self, service: Service, model: type[Body], handler: Handler[Body]) -> None:
        self._service = service
        self._model = model
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            with self._service.gate.admit():
                response = await self._answer(request)
                await response(scope, receive, send)
        except ClientLeftError:
            self._service.metrics.clients_left.inc()
        except asyncio.CancelledError:
            # Serve watches the connection too, and may be the first to see it closed.
            self._service.metrics.clients_left.inc()
            raise
        except Exception as error:
            api_error = self._service.to_api_error(error)
            if api_error.status == 500:
                logger.exception("request failed")
            await api_error.response()(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        require_json(request)
        raw = await read_body(request, self._service.config.api)
        body = await self._parse(raw)
        request_id = f"{request.headers.get('x-request-id', 'req')}-{uuid.uuid4().hex[:12]}"
        call = Call(self._service, body, len(raw), request_id, int(time.time()))
        return await while_connected(request, self._handler(call))

    async def _parse(self, raw: bytes) -> Body:
        data: dict[str, Any] = (
            parse_object(raw)
            if len(raw) <= INLINE_BYTES
            else await self._service.text.off_loop(lambda: parse_object(raw), len(raw))
        )
        try:
            return self._model.model_validate(data)
        except ValidationError as error:
            raise from_validation_error(error) from None
