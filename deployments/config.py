"""The service's configuration: what a Serve application file may say under ``args``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ..workers.config import EngineConfig, FrozenConfig
from ..workers.types import SAMPLING_PROFILES

MIN_KEY_CHARS = 8
INGRESS = "ingress"
"""The name of the deployment that speaks HTTP; Serve would rename one of two of that name."""
AUTO_MODEL = "auto"
"""The model name by which a request leaves the choice to ``routing.auto_models``."""


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

    @model_validator(mode="after")
    def _grow(self) -> Self:
        if not self.low <= self.medium <= self.high:
            raise ValueError(
                f"low ({self.low}), medium ({self.medium}), high ({self.high}): each is at least "
                "the one before"
            )
        return self


class ThinkingConfig(FrozenConfig):
    """How requests that do not say otherwise think, and how far the others may go."""

    default: bool | Literal["auto"] | None = None
    """Thinking on or off where a request is silent; ``None``: as the chat template decides;
    ``auto``: by the request's complexity, in pools that serve the mode ``auto``."""
    think_from: float = Field(0.3, ge=0, le=1)
    """Complexity from which ``auto`` thinks; the budget grows from ``effort.low`` there to
    ``effort.high`` at 1."""
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


class SloConfig(FrozenConfig):
    """What a pool promises, in seconds; the metrics count the requests that kept it."""

    ttft_s: float | None = Field(None, gt=0)
    """Arrival to the first token."""
    first_answer_s: float | None = Field(None, gt=0)
    """Arrival to the first token after the thought."""
    inter_token_s: float | None = Field(None, gt=0)
    """Between tokens of a choice, on average."""


class RemotePrefillConfig(FrozenConfig):
    """From whom a decode pool takes KV that it does not compute itself."""

    pool: str
    """The prefill pool's name."""
    when: Literal["auto", "always", "never"] = "auto"
    """``auto`` decides for each request from measured rates."""
    transport: Literal["object_store", "nccl", "nixl", "cuda_ipc"] = "object_store"
    """How blocks travel: through Ray's object store, or read by NIXL from the prefill replica's own
    memory, which needs the package ``nixl``. The others are refused, with the reason."""
    deadline_s: float = Field(10.0, gt=0)
    """KV that has not come by then is computed here."""


Mode = Literal["thinking", "non_thinking", "auto"]


class PoolConfig(FrozenConfig):
    """Replicas that do the same work: one model, some modes, one role."""

    name: str = Field("engine", pattern=r"^[a-z][a-z0-9-]{0,30}$")
    model: str | None = None
    """``None``: the service's ``engine.model``."""
    served_model_name: str | None = Field(None, min_length=1)
    """The name clients use for the pool's model; ``None``: the service's, else the model itself."""
    role: Literal["unified", "decode", "prefill"] = "unified"
    """``unified`` and ``decode`` pools own requests; a ``prefill`` pool only computes KV for them.
    A ``decode`` pool names its prefill pool."""
    modes: tuple[Mode, ...] = ("thinking", "non_thinking")
    """What the pool serves; with ``auto`` it also takes requests that leave the mode open, whose
    complexity then decides it."""
    replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0)
    """Logical CPUs that Ray reserves for each rank; its threads are ``engine.num_threads``."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs that Ray reserves for each rank."""
    resources: dict[str, float] = Field({})
    """Custom Ray resources of each rank, as a way to name the nodes it may run on."""
    placement: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    """Where the ranks of one replica lie relative to each other."""
    max_in_flight: int | None = Field(None, ge=1)
    """Requests inside the pool; one more is refused with 503. ``None``: only the service's."""
    prefill: RemotePrefillConfig | None = None
    """For ``decode`` pools."""
    slo: SloConfig = SloConfig()
    engine: dict[str, Any] = Field({})
    """Fields of the service's ``engine`` that differ here."""

    @model_validator(mode="after")
    def _role_fits(self) -> Self:
        if self.role == "decode" and self.prefill is None:
            raise ValueError(f"pool {self.name!r} has role decode; name its prefill.pool")
        if self.role != "decode" and self.prefill is not None:
            raise ValueError(f"pool {self.name!r} has role {self.role}; only decode has 'prefill'")
        if not self.modes:
            raise ValueError(f"pool {self.name!r} serves no mode")
        if self.name == INGRESS:
            raise ValueError(f"{INGRESS!r} is the name of the HTTP side; call the pool otherwise")
        return self


class ReplicaConfig(FrozenConfig):
    """The processes around the pools."""

    ingress_replicas: Literal[1] = 1
    """HTTP processes; one, since /metrics counts what its own process served."""
    ingress_resources: dict[str, float] = Field({})
    """Custom Ray resources of an ingress. ``node:__internal_head__: 0.001`` keeps it on the head of
    a cluster: with the node of their ingress, clients lose their connection."""
    health_timeout_s: float = Field(30.0, gt=0)
    """An engine loop that takes no turn for this long is dead."""
    idle_subscription_s: float = Field(60.0, gt=0)
    """An ingress drops its stream from an engine it has not used for this long."""
    max_migrations: int = Field(3, ge=0)
    """How often a request goes on at another replica after its own has died."""


class RoutingConfig(FrozenConfig):
    """How a request finds its pool and replica."""

    auto_models: tuple[str, str] | None = None
    """Public names of the small and the large model between which complexity decides when a request
    asks for the model ``auto``; ``None``: that name is unknown."""
    large_from: float = Field(0.6, ge=0, le=1)
    """Complexity from which the large one is taken."""
    session_header: str = Field("x-session-id", pattern=r"^[a-z][a-z0-9-]{0,63}$")
    """Requests with the same value go to the same replica while it has room."""


class ServiceConfig(FrozenConfig):
    """Everything ``build`` needs; each section has defaults that serve one machine."""

    served_model_name: str | None = Field(None, min_length=1)
    """The name clients use; ``None``: ``engine.model``."""
    http: HttpConfig = HttpConfig()
    api: ApiConfig = ApiConfig()
    engine: EngineConfig = EngineConfig()
    """Of every pool, but for what a pool says itself."""
    pools: tuple[PoolConfig, ...] = Field((PoolConfig(),), min_length=1)
    routing: RoutingConfig = RoutingConfig()
    thinking: ThinkingConfig = ThinkingConfig()
    replicas: ReplicaConfig = ReplicaConfig()

    @model_validator(mode="after")
    def _engines_can_hold_what_is_let_in(self) -> Self:
        for pool in self.serving_pools:
            engine = self.engine_of(pool)
            if self.api.max_prompts > engine.max_waiting:
                raise ValueError(
                    f"api.max_prompts ({self.api.max_prompts}) is above engine.max_waiting "
                    f"({engine.max_waiting}): such a request could never be admitted"
                )
        return self

    @model_validator(mode="after")
    def _pools_fit_together(self) -> Self:
        names = [pool.name for pool in self.pools]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two pools are named {name!r}")
        if not self.serving_pools:
            raise ValueError("every pool has role prefill; nobody would answer requests")
        prefill = {pool.name: pool for pool in self.pools if pool.role == "prefill"}
        for pool in self.serving_pools:
            if pool.prefill is None:
                continue
            source = prefill.get(pool.prefill.pool)
            if source is None:
                raise ValueError(
                    f"pool {pool.name!r} takes KV from {pool.prefill.pool!r}; "
                    f"the prefill pools are: {', '.join(prefill) or 'none'}"
                )
            mine, theirs = self.engine_of(pool), self.engine_of(source)
            for key in ("model", "dtype", "kv_cache_dtype", "block_size", "attention"):
                here, there = getattr(mine, key), getattr(theirs, key)
                if here != there:
                    if key == "attention":
                        here, there = here.label, there.label
                    raise ValueError(
                        f"pools {pool.name!r} and {source.name!r} cannot exchange KV: {key} is "
                        f"{here!r} here and {there!r} there"
                    )
        return self

    @model_validator(mode="after")
    def _models_have_one_meaning(self) -> Self:
        checkpoints: dict[str, str] = {}
        for pool in self.serving_pools:
            name, checkpoint = self.model_name_of(pool), self.engine_of(pool).model
            if checkpoints.setdefault(name, checkpoint) != checkpoint:
                raise ValueError(
                    f"pool {pool.name!r} serves {checkpoint!r} as {name!r}, which another pool "
                    f"uses for {checkpoints[name]!r}; give it a served_model_name of its own"
                )
        for name in self.routing.auto_models or ():
            if name not in checkpoints:
                raise ValueError(
                    f"routing.auto_models names {name!r}; the models are: {', '.join(checkpoints)}"
                )
        if self.routing.auto_models and AUTO_MODEL in checkpoints:
            raise ValueError(f"a model is named {AUTO_MODEL!r}, which routing.auto_models takes")
        return self

    @model_validator(mode="after")
    def _auto_has_a_pool(self) -> Self:
        served = any("auto" in pool.modes for pool in self.serving_pools)
        if self.thinking.default == "auto" and not served:
            raise ValueError("thinking.default is 'auto', but no pool serves the mode auto")
        return self

    def engine_of(self, pool: PoolConfig) -> EngineConfig:
        """The engine of one pool. Raises ``ValueError`` for a wrong key or value in it."""
        settings = self.engine.model_dump(exclude_unset=True) | pool.engine
        if pool.model is not None:
            settings["model"] = pool.model
        return EngineConfig.model_validate(settings)

    def model_name_of(self, pool: PoolConfig) -> str:
        """The public name of a pool's model."""
        if pool.served_model_name is not None:
            return pool.served_model_name
        if pool.model is not None:
            return pool.model
        return self.served_model_name or self.engine.model

    @property
    def serving_pools(self) -> tuple[PoolConfig, ...]:
        """The pools that own requests."""
        return tuple(pool for pool in self.pools if pool.role != "prefill")

    @property
    def approximations(self) -> dict[str, str]:
        """The attention of every pool whose answers approximate its model's."""
        found = {pool.name: self.engine_of(pool).attention for pool in self.serving_pools}
        return {name: a.label for name, a in found.items() if not a.is_exact}

    @property
    def model_name(self) -> str:
        """The public name of the first model."""
        return self.model_name_of(self.serving_pools[0])


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
