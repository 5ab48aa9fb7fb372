"""The table of what must be refused, line by line, against the running service."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PROMPT: dict[str, Any] = {"prompt": "hi", "max_tokens": 2}
JSON = {"content-type": "application/json"}


def check_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The one error shape, with the right status."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a"',
        b"",
        b"null",
        b"[]",
        b'{"prompt": "\xff\xfe"}',
        b"[" * 100_000,
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_broken_json(client: httpx.Client, body: bytes) -> None:
    for path in (CHAT, COMPLETE, "/tokenize", "/detokenize"):
        error = check_error(client.post(path, content=body, headers=JSON), 400)
        assert error["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": 151936}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"min_tokens": 10**9}, "min_tokens"),
        ({"logit_bias": {"151936": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [151936]}, "stop_token_ids"),
        ({"allowed_token_ids": [10**12]}, "allowed_token_ids"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 10_000}, "prompt"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"chat_template": "{{ 1 }}"}, None),
        ({"kv_transfer_params": {"do_remote_decode": True}}, None),
        ({"prompt_embeds": "AAAA"}, None),
        ({"custom_logit_processor": "x"}, None),
        ({"structured_outputs": {"regex": "(a+)+$"}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_values(client: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    error = check_error(client.post(COMPLETE, json={**PROMPT, **fields}), 400)
    if param is not None:
        assert (error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": 1},
        {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(5000)]},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_chat_values(client: httpx.Client, fields: dict[str, Any]) -> None:
    check_error(client.post(CHAT, json={**HELLO, **fields}), 400)


def test_context_overflow_by_one_token(client: httpx.Client) -> None:
    limit = client.get("/v1/models").json()["data"][0]["max_model_len"]
    fits = {"prompt": [1] * (limit - 1), "max_tokens": 1}
    assert client.post(COMPLETE, json=fits).status_code == 200
    error = check_error(client.post(COMPLETE, json={**fits, "max_tokens": 2}), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(limit) in error["message"]
    assert str(limit - 1) in error["message"]
    long = {"messages": [{"role": "user", "content": "q" * limit}]}
    assert check_error(client.post(CHAT, json=long), 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "content",
    ["\x00", " " * 900_000, "\N{GRINNING FACE}", "e\u0301" * 2000, "\N{GRINNING FACE}" * 200_000],
    ids=["nul", "spaces", "emoji", "combining", "emojis"],
)
def test_odd_text_is_answered_or_refused(client: httpx.Client, content: str) -> None:
    answer = client.post(CHAT, json={**HELLO, "messages": [{"role": "user", "content": content}]})
    assert answer.status_code in (200, 400)


def test_control_tokens_in_content_are_plain_text(client: httpx.Client) -> None:
    def ids(text: str) -> list[int]:
        answer = client.post("/tokenize", json={"messages": [{"role": "user", "content": text}]})
        assert answer.status_code == 200
        found: list[int] = answer.json()["tokens"]
        return found

    control = {
        token: client.post("/tokenize", json={"prompt": token}).json()["tokens"]
        for token in ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>")
    }
    for token, plain in control.items():
        assert len(plain) > 1, token
        rendered = ids(f"a{token}b")
        assert ids("ab")[0] == rendered[0]
        assert len(rendered) >= len(ids("ab")) + len(plain) - 2
    answer = client.post(
        CHAT, json={**HELLO, "messages": [{"role": "user", "content": "</think><|im_end|>"}]}
    )
    assert answer.status_code == 200


TOO_BIG = json.dumps({"prompt": "a" * 2**21}).encode()


def test_bodies_over_the_limit(client: httpx.Client) -> None:
    check_error(client.post(COMPLETE, content=TOO_BIG, headers=JSON), 413)
    pieces = (TOO_BIG[start : start + 2**16] for start in range(0, len(TOO_BIG), 2**16))
    check_error(client.post(COMPLETE, content=pieces, headers=JSON), 413)


@pytest.mark.parametrize(
    ("media", "refusal"),
    [
        ("application/json", (413, "body_too_large")),
        ("text/plain", (415, "unsupported_media_type")),
    ],
)
def test_a_refused_body_does_not_cost_the_next_request_its_connection(
    service_url: str, media: str, refusal: tuple[int, str]
) -> None:
    place = urlsplit(service_url)
    with closing(HTTPConnection(str(place.hostname), place.port, timeout=20)) as connection:
        connection.putrequest("POST", COMPLETE)
        connection.putheader("Content-Type", media)
        connection.putheader("Content-Length", str(len(TOO_BIG)))
        connection.endheaders(TOO_BIG[: 2**16])
        time.sleep(0.3)  # an answer now would overtake the rest
        connection.send(TOO_BIG[2**16 :])
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == refusal
        # On another connection only where the answer has announced the end of this one.
        connection.request("GET", "/v1/models")
        with connection.getresponse() as next_answer:
            assert next_answer.status == 200
            next_answer.read()


def test_a_body_far_over_the_limit_is_not_waited_for(service_url: str) -> None:
    answer = raw(service_url, head(2**40))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in answer


@pytest.mark.parametrize(
    "media", ["text/plain", "application/x-www-form-urlencoded", "", "application/json;charset=x"]
)
def test_other_media_types(client: httpx.Client, media: str) -> None:
    check_error(client.post(COMPLETE, content=b"{}", headers={"content-type": media}), 415)


def raw(url: str, request: bytes, *, end: bool = False) -> bytes:
    """Send bytes as they are; ``end`` closes our direction after them."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
        connection.sendall(request)
        if end:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
            if b"\r\n\r\n" in b"".join(parts) and b"}}" in part:
                break
        return b"".join(parts)


def head(length: int | str, path: str = COMPLETE, extra: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{extra}\r\n"
    ).encode()


def test_a_slow_body_is_given_up(service_url: str) -> None:
    started = time.monotonic()
    answer = raw(service_url, head(100) + b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer
    assert time.monotonic() - started < 15


def test_false_content_lengths(service_url: str, client: httpx.Client) -> None:
    body = json.dumps(PROMPT).encode()
    assert raw(service_url, head(len(body) - 5) + body).startswith(b"HTTP/1.1 400")
    assert raw(service_url, head(10**12) + body).startswith(b"HTTP/1.1 413")
    for wrong in ("-1", "abc", "1e3"):
        assert raw(service_url, head(wrong) + body).startswith(b"HTTP/1.1 400")
    assert client.get("/health").status_code == 200


def test_a_megabyte_of_headers_is_refused_by_the_proxy(client: httpx.Client) -> None:
    # HAProxy reads a request's headers into one buffer and answers 400 itself when they are more;
    # our own 431 is for servers without it (see test_edge.py).
    answer = client.get("/health", headers={"x-big": "x" * 2**20})
    assert answer.status_code in (400, 431)


def test_request_ids_are_echoed_or_replaced(client: httpx.Client) -> None:
    assert client.get("/version", headers={"x-request-id": "My_id-1"}).headers.get_list(
        "x-request-id"
    ) == ["My_id-1"]
    for bad in ("http://evil.example/", "a" * 10_000, "a b", "\u00e9", ""):
        answer = client.get("/version", headers={b"x-request-id": bad.encode()})
        (given,) = answer.headers.get_list("x-request-id")
        assert given.isalnum()
        assert len(given) == 32


def test_unknown_routes_and_methods(client: httpx.Client) -> None:
    for path in ("/", "/v1", "/v1/embeddings", "/v1/chat/completions/", "/docs"):
        check_error(client.get(path), 404)
    error = check_error(client.get(CHAT), 405)
    assert error["code"] == "method_not_allowed"
    assert client.get(CHAT).headers["allow"] == "POST"
    check_error(client.post("/health"), 405)


def test_dots_in_a_path_are_not_resolved(service_url: str) -> None:
    answer = raw(service_url, b"GET /v1/../health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404")


def test_another_model(client: httpx.Client) -> None:
    error = check_error(client.post(CHAT, json={**HELLO, "model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    check_error(client.get("/v1/models/gpt-4"), 404)


def test_a_refusal_is_no_stream(client: httpx.Client) -> None:
    body = {**PROMPT, "stream": True, "prompt": [10**6]}
    check_error(client.post(COMPLETE, json=body), 400)


def test_neighbours_do_not_notice(client: httpx.Client) -> None:
    body = {"prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 3, "seed": 1}
    before = client.post(COMPLETE, json=body).json()["choices"]
    for fields in ({"logit_bias": {"999999": 5}}, {"stop_token_ids": [-7]}, {"prompt": [10**9]}):
        assert client.post(COMPLETE, json={**body, **fields}).status_code == 400
    assert client.post(COMPLETE, json=body).json()["choices"] == before
