"""What every endpoint works with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ...workers.types import GenerateRequest, RequestError, SamplingParams
from ..config import ServiceConfig
from ..limits import AdmissionGate
from ..metrics import Metrics
from ..off_loop import OffLoop
from ..routing.classifier import Policy
from ..routing.directory import Directory
from .errors import ApiError, from_request_error


@dataclass(frozen=True)
class Service:
    """One ingress: configuration, models and pools, limits and counts."""

    config: ServiceConfig
    directory: Directory
    off_loop: OffLoop
    gate: AdmissionGate
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def policy(self) -> Policy:
        """What the classifier reads of the configuration."""
        return Policy(self.config.thinking, self.config.routing)

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
