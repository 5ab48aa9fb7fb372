"""What every endpoint works with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ...workers.types import GenerateRequest, RequestError, SamplingParams
from ..config import ServiceConfig
from ..limits import AdmissionGate
from ..metrics import Metrics
from ..stream_mux import EngineTransport, StreamMux
from ..text_service import TextService
from ..wire import ModelFacts
from .errors import ApiError, from_request_error


@dataclass(frozen=True)
class Service:
    """One ingress: configuration, text, engines, limits and counts."""

    config: ServiceConfig
    facts: ModelFacts
    text: TextService
    transport: EngineTransport
    mux: StreamMux
    gate: AdmissionGate
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """The public name of the served model."""
        return self.config.model_name

    def engine_request(
        self, request_id: str, prompt: list[int], params: SamplingParams, priority: int, salt: str
    ) -> GenerateRequest:
        """A checked request under the service's deadline."""
        return GenerateRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            params=params,
            priority=priority,
            cache_salt=salt,
            deadline_s=self.config.api.request_timeout_s,
        )

    def to_api_error(self, error: Exception) -> ApiError:
        """The client's view of whatever ended a request; the unexpected is a bare 500."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestError):
            return from_request_error(error, self.config.api.retry_after_s)
        return ApiError(500, "an internal error ended the request", code="internal_error")
