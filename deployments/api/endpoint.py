"""What all POST endpoints do around their own work: admit, read, parse, validate, answer errors."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from starlette.datastructures import Headers
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
    """One validated request: ``size`` in bytes, ``id`` unique in every process, ``created`` in
    Unix seconds, ``arrived`` on the monotonic clock.

    What is entered into ``held`` is left when the answer has been sent, however that ends.
    """

    service: Service
    body: Body
    headers: Headers
    size: int
    id: str
    created: int
    arrived: float
    held: ExitStack


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
            with self._service.gate.admit(), ExitStack() as held:
                response = await self._answer(request, held)
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
            self._service.metrics.refusals.labels(api_error.code or str(api_error.status)).inc()
            await api_error.response()(scope, receive, send)

    async def _answer(self, request: Request, held: ExitStack) -> Response:
        arrived = time.monotonic()
        require_json(request)
        raw = await read_body(request, self._service.config.api)
        body = await self._parse(raw)
        request_id = f"{request.headers.get('x-request-id', 'req')}-{uuid.uuid4().hex[:12]}"
        call = Call(
            service=self._service,
            body=body,
            headers=request.headers,
            size=len(raw),
            id=request_id,
            created=int(time.time()),
            arrived=arrived,
            held=held,
        )
        return await while_connected(request, self._handler(call))

    async def _parse(self, raw: bytes) -> Body:
        data: dict[str, Any] = (
            parse_object(raw)
            if len(raw) <= INLINE_BYTES
            else await self._service.off_loop.run(lambda: parse_object(raw), len(raw))
        )
        try:
            return self._model.model_validate(data)
        except ValidationError as error:
            raise from_validation_error(error) from None
