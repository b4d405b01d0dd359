"""Which error an end or a refusal by the core is for its client.

Pure functions of what the core said; used by api.session and by `LLM`.
"""

from __future__ import annotations

from holdfast.errors import (
    DeadlineExceeded,
    EngineFault,
    InvalidField,
    NotReady,
    QueueFull,
    RequestError,
)
from holdfast.wire.messages import End, Refused

RETRY_AFTER_S = 2.0


def error_of(end: int, message: str) -> RequestError | None:
    """The error that an end is for its client; None for the ends that are answers."""
    if end in (End.STOP, End.LENGTH):
        return None
    if end == End.DEADLINE:
        return DeadlineExceeded(message or "the request's deadline passed")
    if end == End.NOT_FINITE:
        return EngineFault(message, code="not_finite")
    if end == End.SHUTDOWN:
        error = NotReady(message or "the server is shutting down", code="shutdown")
        error.retry_after_s = 5.0
        return error
    return EngineFault(message or "the engine could not finish this request")


def not_ready(message: str) -> NotReady:
    """The 503 of a server without a core, with a time to come back at."""
    error = NotReady(message, code="not_ready")
    error.retry_after_s = RETRY_AFTER_S
    return error


def refusal_of(message: Refused) -> RequestError:
    """The core's refusal as the error that its client gets."""
    if message.status == 429:
        return QueueFull(message.message, message.retry_after_s or 1.0)
    if message.status == 504:
        return DeadlineExceeded(message.message)
    if message.status == 503:
        error = NotReady(message.message, code=message.code or "not_ready")
        error.retry_after_s = message.retry_after_s or RETRY_AFTER_S
        return error
    if message.status == 400:
        return InvalidField(message.field or "body", message.message, code=message.code)
    return EngineFault(message.message, code=message.code or "engine_fault")
