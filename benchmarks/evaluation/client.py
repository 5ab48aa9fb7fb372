"""Asks an OpenAI-compatible server for chat completions; waits out what passes by itself."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any, Self

import httpx

from ..http_stream import StreamError
from .item import Item, Mode, Reply, ToolCall
from .sampling import Sampling

KEY_VARIABLE = "INFERENCE_PIO_API_KEY"
TRIES = 6
LONGEST_PAUSE_S = 30.0
PASSING = frozenset({408, 429, 502, 503, 504})
"""Answers that say: not now."""
OF_THE_ITEM = frozenset({400, 413, 422})
"""Answers that say that this request cannot be served; others can."""


class ApiClient:
    """One server and one of its models; an async context manager."""

    def __init__(self, url: str, *, max_tokens: int | None, timeout_s: float) -> None:
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(30.0, read=timeout_s, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._max_tokens = max_tokens
        self.model = ""

    async def __aenter__(self) -> Self:
        try:
            answer = await self._client.get("/v1/models")
            answer.raise_for_status()
            self.model = str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            await self._client.aclose()
            raise StreamError(
                f"no OpenAI-compatible server answers at {self._client.base_url}: {error}"
            ) from error
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._client.aclose()

    async def ask(self, item: Item, mode: Mode, sampling: Sampling, seed: int) -> Reply:
        """The answer to an item, or the reason why this server refuses it.

        Raises ``StreamError`` where the server stays away or refuses every request.
        """
        body = self._body(item, mode, sampling, seed)
        reason = ""
        for number in range(TRIES):
            if number:
                await asyncio.sleep(min(2.0 ** (number - 1), LONGEST_PAUSE_S))
            begin = time.perf_counter()
            try:
                answer = await self._client.post("/v1/chat/completions", json=body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code == 200:
                return read_reply(answer.content, time.perf_counter() - begin)
            reason = f"{answer.status_code}: {_message(answer)}"
            if answer.status_code in OF_THE_ITEM:
                return Reply(refusal=reason)
            if answer.status_code not in PASSING:
                break
        raise StreamError(f"{item.id} got no answer: {reason}")

    def _body(self, item: Item, mode: Mode, sampling: Sampling, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(item.messages),
            "seed": seed,
            "chat_template_kwargs": {"enable_thinking": mode == "thinking"},
            **sampling.fields(),
        }
        if item.tools:
            body["tools"] = list(item.tools)
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        return body


def read_reply(content: bytes, seconds: float) -> Reply:
    """What a chat completion says. Raises ``StreamError`` for another form."""
    try:
        document = httpx.Response(200, content=content).json()
        choice, usage = document["choices"][0], document.get("usage") or {}
        message = choice["message"]
        details = usage.get("completion_tokens_details") or {}
        return Reply(
            content=message.get("content") or "",
            reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
            tool_calls=tuple(
                ToolCall(call["function"]["name"], call["function"].get("arguments") or "")
                for call in message.get("tool_calls") or ()
            ),
            finish_reason=choice.get("finish_reason") or "",
            prompt_tokens=usage.get("prompt_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or 0,
            reasoning_tokens=details.get("reasoning_tokens"),
            seconds=seconds,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StreamError(
            f"the server's answer is no chat completion ({error}): {content[:200]!r}"
        ) from error


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return answer.text[:200]
