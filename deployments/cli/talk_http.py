"""Talks to a server through its OpenAI-style API, as any client would."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import httpx

from .console import CommandError
from .talk import Manner, Message, Piece

KEY_VARIABLE = "INFERENCE_PIO_API_KEY"
END = "[DONE]"


class HttpTalker:
    """One server; a context manager that closes the connection."""

    def __init__(self, url: str) -> None:
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(10.0, read=None),
            trust_env=False,
        )
        self.name = url

    def __enter__(self) -> Self:
        self.name = self._model_name()
        return self

    def __exit__(self, *_error: object) -> None:
        self._client.close()

    def reply(self, messages: Sequence[Message], manner: Manner) -> Iterator[Piece]:
        body = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "enable_thinking": manner.thinking,
            "thinking_token_budget": manner.budget,
            "max_tokens": manner.max_tokens,
            "temperature": manner.temperature,
            "seed": manner.seed,
        }
        given = {key: value for key, value in body.items() if value is not None}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=given) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise CommandError(_reason(answer))
                yield from _pieces(answer.iter_lines())
        except httpx.HTTPError as error:
            raise CommandError(f"{self._client.base_url}: {error}") from error

    def _model_name(self) -> str:
        try:
            answer = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise CommandError(f"no server answers at {self._client.base_url}: {error}") from error
        if answer.status_code != 200:
            raise CommandError(_reason(answer))
        return str(answer.json()["data"][0]["id"])


def _pieces(lines: Iterator[str]) -> Iterator[Piece]:
    for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == END:
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise CommandError(str(event["error"]["message"]))
        for choice in event["choices"]:
            delta = choice["delta"]
            reasoning = delta.get("reasoning_content") or ""
            content = delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                content += str(call["function"].get("arguments") or "")
            if reasoning or content:
                yield Piece(reasoning, content)
    raise CommandError("the server ended the stream before its end")


def _reason(answer: httpx.Response) -> str:
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    return f"the server answered {answer.status_code}: {message}"
