"""Requests made up from our own OpenAPI document never meet a 5xx."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{model_id}"),
    ("GET", "/v1/models"),
    ("GET", "/version"),
    ("GET", "/health"),
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_made_up_request_is_our_fault(client: httpx.Client, method: str, path: str) -> None:
    document = client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][method]
    strategy = operation.as_strategy() | operation.as_strategy(
        generation_mode=schemathesis.GenerationMode.NEGATIVE
    )

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis_given(strategy)
    def check(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and method == "POST" and "completions" in path:
            body["max_tokens"] = 2  # else one of them may write up to the context limit
        answer = case.call(base_url=str(client.base_url))
        assert answer.status_code < 500, answer.text
        assert answer.status_code != 422

    check()


@hypothesis_given(st.binary(max_size=200))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_bytes_are_our_fault(client: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=body, headers=headers)
    assert 400 <= answer.status_code < 500


def test_the_document_names_every_route(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert {path for _, path in OPERATIONS} <= set(document["paths"])
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "200" in operation["responses"], (path, method)
            assert "422" not in operation["responses"]
