"""Errors as clients see them: one JSON shape, a status that follows from the code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.responses import Response

from ...workers.types import QueueFullError, RequestError

# Codes of RequestError that are not the caller's mistake; every other code is a 400.
STATUS_OF_CODE = {
    "queue_full": 503,
    "overloaded": 503,
    "engine_unavailable": 503,
    "engine_dead": 503,
    "stream_lost": 503,
    "shutting_down": 503,
    "aborted": 503,
    "slow_client": 503,
    "deadline_exceeded": 504,
    "model_not_found": 404,
    "internal_error": 500,
}
TYPE_OF_STATUS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A refusal with its HTTP status.

    ``param`` names the request's field, ``code`` is the stable word that programs test for.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as JSON says it."""
        kind = TYPE_OF_STATUS.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The whole HTTP answer."""
        return json_response(self.body(), self.status, self.headers)


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON by orjson."""
    return Response(
        orjson.dumps(content), status, dict(headers or {}), media_type="application/json"
    )


def from_request_error(error: RequestError, retry_after_s: int) -> ApiError:
    """Give an engine's or validator's refusal its status; 503 says when to come back."""
    status = 503 if isinstance(error, QueueFullError) else STATUS_OF_CODE.get(error.code, 400)
    headers = {"Retry-After": str(retry_after_s)} if status == 503 else {}
    return ApiError(status, error.message, param=error.param, code=error.code, headers=headers)


def from_validation_error(error: ValidationError) -> RequestError:
    """The first complaint of a request model, with the field's dotted path."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A union's branch names ("list[str]", "constrained-int") are in the path; fields are not typed.
    place = [str(part) for part in first["loc"] if str(part).replace("_", "").isalnum()]
    param = ".".join(place) or None
    message = first["msg"].removeprefix("Value error, ")
    return RequestError(f"{param}: {message}" if param else message, param=param)
