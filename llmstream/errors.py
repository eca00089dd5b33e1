"""Everything that can go wrong, as one tree.

    LLMStreamError
    ├── ConfigError               the configuration is wrong; nothing was started
    ├── BadRequest            400
    │   ├── ContextLengthExceeded 400
    │   └── BodyTooLarge      413
    ├── Unauthorized          401  no API key, or none that is valid
    ├── Forbidden             403  the API key may not do this
    ├── NotFound              404  no such job, session, route …
    │   └── ModelNotFound     404
    ├── Conflict              409
    ├── Overloaded            429  the queue is full; retry after a while
    ├── RateLimited           429  the caller's limit is reached; retry after a while
    ├── StoreUnavailable      503  Redis cannot be reached or refuses writes
    │   └── StoreError             the store answered something unexpected
    ├── BrokerUnavailable     503  RabbitMQ cannot be reached or does not confirm
    ├── ShuttingDown          503  this replica takes no new work
    ├── Draining              503  no replica takes new work of this kind
    ├── ProviderError         502  the model's side failed
    │   ├── EngineCrashed     502  the engine's process ended; retryable
    │   ├── UpstreamDenied    502  the upstream does not serve us: key, rights, account
    │   ├── UpstreamRejected  4xx  the upstream refused the request for good
    │   │   ├── UpstreamTooLong   400  it does not fit the model's context
    │   │   ├── UpstreamFiltered  400  its content is not allowed
    │   │   └── UpstreamUnknown   404  the upstream has no such model or path
    │   ├── UpstreamLimited   429  the upstream wants less; retryable
    │   ├── UpstreamBroken    502  cut or malformed; retryable
    │   │   ├── UpstreamFailed        502  a server error
    │   │   ├── UpstreamTimeout       504  no answer, no first token or no next one in time
    │   │   └── UpstreamUnreachable   502  no connection
    │   └── DeadlineExceeded  504  the job ran out of its time
    └── Fenced                     another attempt or a cancellation took the job over; never shown to a client

A room may add leaves of its own beside its code. Each class carries the HTTP ``status``, the OpenAI ``type`` and
``code``, whether trying again can help, and whether another target of the same route may do better.
"""

from __future__ import annotations

from typing import Any, ClassVar

from llmstream.types import Failure


class LLMStreamError(Exception):
    """Base of all errors of this package; the message says what happened and what to do."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retryable: ClassVar[bool] = False
    elsewhere: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.http_status = status or self.status
        self.retry_after = retry_after
        """Seconds after which trying again makes sense, where that is known."""

    def failure(self) -> Failure:
        """The error as it is kept in a job's log."""
        return Failure(
            message=self.message,
            type=self.type,
            code=self.error_code,
            param=self.param,
            status=self.http_status,
            retryable=self.retryable,
            retry_after=self.retry_after,
        )

    def body(self) -> dict[str, Any]:
        """The OpenAI error body."""
        return error_body(self.failure())


def error_body(failure: Failure) -> dict[str, Any]:
    """Renders a failure as ``{"error": {"message", "type", "param", "code"}}``."""
    return {"error": {"message": failure.message, "type": failure.type, "param": failure.param, "code": failure.code}}


class ConfigError(LLMStreamError):
    pass


class BadRequest(LLMStreamError):
    status, type = 400, "invalid_request_error"


class ContextLengthExceeded(BadRequest):
    code, elsewhere = "context_length_exceeded", True


class BodyTooLarge(BadRequest):
    status, code = 413, "body_too_large"


class Unauthorized(LLMStreamError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(LLMStreamError):
    status, type, code = 403, "invalid_request_error", "insufficient_permissions"


class NotFound(LLMStreamError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class Conflict(LLMStreamError):
    status, type, code = 409, "invalid_request_error", "conflict"


class Overloaded(LLMStreamError):
    status, type, code, retryable = 429, "rate_limit_error", "queue_full", True


class RateLimited(LLMStreamError):
    status, type, code, retryable = 429, "rate_limit_error", "rate_limit_exceeded", True


class StoreUnavailable(LLMStreamError):
    status, type, code, retryable = 503, "service_unavailable", "store_unavailable", True


class StoreError(StoreUnavailable):
    code = "store_error"


class BrokerUnavailable(LLMStreamError):
    status, type, code, retryable = 503, "service_unavailable", "broker_unavailable", True


class ShuttingDown(LLMStreamError):
    status, type, code, retryable = 503, "service_unavailable", "shutting_down", True


class Draining(LLMStreamError):
    status, type, code, retryable = 503, "service_unavailable", "queue_draining", True


class ProviderError(LLMStreamError):
    status, type, code = 502, "upstream_error", "provider_error"


class EngineCrashed(ProviderError):
    code, retryable, elsewhere = "engine_crashed", True, True


class UpstreamDenied(ProviderError):
    code, elsewhere = "upstream_denied", True


class UpstreamRejected(ProviderError):
    status, type, code = 400, "invalid_request_error", "upstream_rejected"


class UpstreamTooLong(UpstreamRejected):
    code, elsewhere = "context_length_exceeded", True


class UpstreamFiltered(UpstreamRejected):
    code = "content_filter"


class UpstreamUnknown(UpstreamRejected):
    status, elsewhere = 404, True


class UpstreamLimited(ProviderError):
    status, type, code = 429, "rate_limit_error", "upstream_rate_limited"
    retryable, elsewhere = True, True


class UpstreamBroken(ProviderError):
    code, retryable, elsewhere = "upstream_broken", True, True


class UpstreamFailed(UpstreamBroken):
    code = "upstream_failed"


class UpstreamTimeout(UpstreamBroken):
    status, type, code = 504, "timeout_error", "upstream_timeout"


class UpstreamUnreachable(UpstreamBroken):
    code = "upstream_unreachable"


class DeadlineExceeded(ProviderError):
    status, type, code = 504, "timeout_error", "deadline_exceeded"


class Fenced(LLMStreamError):
    code = "fenced"
