"""The service's configuration: what a Serve application file may say under ``args``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ..workers.config import EngineConfig, FrozenConfig
from ..workers.types import SAMPLING_PROFILES

MIN_KEY_CHARS = 8


class HttpConfig(FrozenConfig):
    """Where the launcher lets the service listen; ``build`` itself opens no port."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)


class ApiConfig(FrozenConfig):
    """Who may call, how much, and how long."""

    keys_file: Path | None = None
    """A file with one API key a line; empty lines and lines that start with ``#`` are skipped."""
    keys_env: str = "INFERENCE_PIO_API_KEYS"
    """The environment variable with API keys, separated by commas."""
    max_body_bytes: int = Field(32 * 2**20, ge=1024)
    """A larger request body is refused with 413."""
    max_header_bytes: int = Field(64 * 2**10, ge=1024)
    """Larger request headers, all together, are refused with 431."""
    body_timeout_s: float = Field(20.0, gt=0)
    """A body that takes longer to arrive is refused with 408."""
    request_timeout_s: float = Field(600.0, gt=0)
    """A request that takes longer ends with 504."""
    max_in_flight: int = Field(1024, ge=1)
    """Requests inside the service, waiting ones included; one more is refused with 503."""
    retry_after_s: int = Field(1, ge=1)
    """What ``Retry-After`` says on a 503."""
    max_prompts: int = Field(256, ge=1)
    """Prompts in one completions request."""
    max_buffered_tokens: int = Field(8192, ge=64)
    """Tokens held for a client that reads too slowly; beyond that its request is cut."""


class EffortBudgets(FrozenConfig):
    """Thought tokens that ``reasoning_effort`` stands for."""

    low: int = Field(1024, ge=0)
    medium: int = Field(4096, ge=0)
    high: int = Field(16384, ge=0)


class ThinkingConfig(FrozenConfig):
    """How requests that do not say otherwise think, and how far the others may go."""

    default: bool | None = None
    """Thinking on or off where a request is silent; ``None``: as the chat template decides."""
    max_budget: int | None = Field(None, ge=0)
    """Ceiling of every thought, in tokens; ``None``: only the context limit."""
    effort: EffortBudgets = EffortBudgets()
    sampling_profile: str | None = None
    """The sampling profile of requests that name none."""

    @field_validator("sampling_profile")
    @classmethod
    def _known_profile(cls, name: str | None) -> str | None:
        if name is not None and name not in SAMPLING_PROFILES:
            raise ValueError(f"no profile {name!r}; there are {', '.join(SAMPLING_PROFILES)}")
        return name


class ReplicaConfig(FrozenConfig):
    """How many processes serve, and what Ray accounts for them."""

    ingress_replicas: Literal[1] = 1
    """HTTP processes; one, since /metrics counts what its own process served."""
    engine_replicas: int = Field(1, ge=1)
    engine_num_cpus: float = Field(1.0, ge=0)
    """Logical CPUs that Ray reserves for an engine; its threads are ``engine.num_threads``."""
    health_timeout_s: float = Field(30.0, gt=0)
    """An engine loop that takes no turn for this long is dead."""
    idle_subscription_s: float = Field(60.0, gt=0)
    """An ingress drops its stream from an engine it has not used for this long."""


class ServiceConfig(FrozenConfig):
    """Everything ``build`` needs; each section has defaults that serve one machine."""

    served_model_name: str | None = Field(None, min_length=1)
    """The name clients use; ``None``: ``engine.model``."""
    http: HttpConfig = HttpConfig()
    api: ApiConfig = ApiConfig()
    engine: EngineConfig = EngineConfig()
    thinking: ThinkingConfig = ThinkingConfig()
    replicas: ReplicaConfig = ReplicaConfig()

    @model_validator(mode="after")
    def _engine_can_hold_what_is_let_in(self) -> Self:
        if self.api.max_prompts > self.engine.max_waiting:
            raise ValueError(
                f"api.max_prompts ({self.api.max_prompts}) is above engine.max_waiting "
                f"({self.engine.max_waiting}): such a request could never be admitted"
            )
        return self

    @property
    def model_name(self) -> str:
        """The model's public name."""
        return self.served_model_name or self.engine.model


def load_config(args: dict[str, Any]) -> ServiceConfig:
    """Check the ``args`` of a Serve application.

    Raises ``ValueError`` that lists every wrong key with its section.
    """
    try:
        return ServiceConfig.model_validate(args)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or 'args'}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise ValueError("the service configuration is wrong:\n" + "\n".join(lines)) from None


def load_api_keys(config: ApiConfig) -> tuple[str, ...]:
    """Collect the keys from file and environment; none at all leaves the service open.

    Raises ``ValueError`` for a key file that cannot be read or a key too short to be one.
    """
    lines: list[str] = os.environ.get(config.keys_env, "").split(",")
    if config.keys_file is not None:
        try:
            lines += config.keys_file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"api.keys_file cannot be read: {error}") from None
    keys = tuple(k for k in (line.strip() for line in lines) if k and not k.startswith("#"))
    if config.keys_file is not None and not keys:
        raise ValueError(f"api.keys_file {config.keys_file} holds no key")
    for key in keys:
        if len(key) < MIN_KEY_CHARS:
            raise ValueError(f"an API key has at least {MIN_KEY_CHARS} characters")
    return keys
