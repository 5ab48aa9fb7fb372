"""The bodies of the OpenAI-style requests, field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...workers.types import MAX_TOP_LOGPROBS
from .fields import RequestModel

Effort = Literal["none", "minimal", "low", "medium", "high"]
TokenIds = list[int]
INT32 = 2**31
# A prompt is text or token ids; a list of either is many prompts.
Prompt = str | list[int] | list[str] | list[list[int]]


class StreamOptions(RequestModel):
    """What a stream carries besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class ResponseFormat(RequestModel):
    """Plain text; the structured formats are not built yet."""

    type: Literal["text"]

    @model_validator(mode="before")
    @classmethod
    def _built(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") in ("json_object", "json_schema"):
            raise ValueError(f"type {data['type']!r} is not built yet; 'text' is")
        return data


class BudgetFields(RequestModel):
    """The thinking budget under every name clients use for it."""

    thinking_token_budget: int | None = Field(None, ge=0, lt=INT32)
    thinking_budget: int | None = Field(None, ge=0, lt=INT32)
    thinking_budget_tokens: int | None = Field(None, ge=0, lt=INT32)


class ThinkingSwitch(RequestModel):
    """Thinking on or off as Anthropic's clients say it."""

    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = Field(None, ge=0, lt=INT32)

    @model_validator(mode="after")
    def _budget_of_something(self) -> ThinkingSwitch:
        if self.type == "disabled" and self.budget_tokens is not None:
            raise ValueError("budget_tokens goes with type 'enabled'")
        return self


class ThinkingFields(BudgetFields):
    """The thinking mode and budget under every name clients use for them."""

    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] = Field({})
    reasoning_effort: Effort | None = None
    thinking: ThinkingSwitch | None = None


class SamplingFields(RequestModel):
    """What both kinds of completion share; ranges are checked by ``SamplingParams``."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = Field({})
    bad_words: list[str] = Field([], max_length=128)
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | list[str] = Field([])
    stop_token_ids: TokenIds = Field([], max_length=128)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    sampling_profile: str | None = None
    response_format: ResponseFormat | None = None
    priority: int = Field(0, ge=-INT32, lt=INT32)
    cache_salt: str = Field("", max_length=256)
    prompt_cache_key: str | None = Field(None, max_length=1024)
    best_of: int | None = None

    @field_validator("logit_bias")
    @classmethod
    def _bounded_bias(cls, value: dict[str, float]) -> dict[str, float]:
        if len(value) > 1024:
            raise ValueError(f"{len(value)} entries; at most 1024 are taken")
        return value

    @model_validator(mode="after")
    def _no_search(self) -> SamplingFields:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of is {self.best_of}; only n ({self.n}) itself is built")
        return self


class ChatCompletionRequest(SamplingFields, ThinkingFields):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _logprobs_asked_for(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(SamplingFields, BudgetFields):
    """The body of ``POST /v1/completions``."""

    prompt: Prompt
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class TokenizeRequest(ThinkingFields):
    """The body of ``POST /tokenize``: a prompt, or messages to render as for chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=4096)
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(RequestModel):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds = Field(max_length=2**20)
