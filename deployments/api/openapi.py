"""The OpenAPI document, made from the request models themselves."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from ..version import VERSION
from .errors import json_response
from .fields import HARMLESS, RequestModel
from .protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_POSTS: tuple[tuple[str, type[RequestModel], str], ...] = (
    ("/v1/chat/completions", ChatCompletionRequest, "Answer a conversation"),
    ("/v1/completions", CompletionRequest, "Complete prompts"),
    ("/tokenize", TokenizeRequest, "Text or messages to token ids"),
    ("/detokenize", DetokenizeRequest, "Token ids to text"),
)
_GETS = (
    ("/v1/models", "The served models"),
    ("/health", "Whether the engine loop of every pool turns"),
    ("/version", "The version of the service, and each pool's kernels and attention"),
)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_POST_ERRORS = ("400", "401", "404", "408", "413", "415", "431", "503", "504")
_GET_ERRORS = ("401", "404", "431", "503")


def openapi_document(model_name: str) -> Response:
    """``GET /openapi.json``, rendered once."""
    modes = [(model, "validation") for _, model, _ in _POSTS]
    _, schemas = models_json_schema(
        modes,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {path: {"post": _post(model, text)} for path, model, text in _POSTS}
    paths |= {path: {"get": {"summary": t, "responses": _ok(_GET_ERRORS)}} for path, t in _GETS}
    paths["/v1/models/{model_id}"] = {"get": _get_model(model_name)}
    paths["/metrics"] = {"get": _get_metrics()}
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Inference-PIO",
            "version": VERSION,
            "description": "Also accepted, without effect on what is generated: "
            + ", ".join(sorted(HARMLESS)),
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return json_response(document)


def _post(model: type[RequestModel], text: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    responses = _ok(_POST_ERRORS)
    if "stream" in model.model_fields:
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": text,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": responses,
    }


def _get_model(model_name: str) -> dict[str, Any]:
    parameter = {
        "name": "model_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
        "example": model_name,
    }
    return {
        "summary": "One model",
        "parameters": [parameter],
        "responses": _ok(_GET_ERRORS),
    }


def _get_metrics() -> dict[str, Any]:
    responses = _ok(_GET_ERRORS)
    responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return {"summary": "Prometheus metrics", "responses": responses}


def _ok(errors: tuple[str, ...]) -> dict[str, Any]:
    answer = {"application/json": {"schema": {"type": "object"}}}
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": answer}}
    for status in errors:
        responses[status] = {"description": "Refused", "content": refusal}
    return responses
