"""Every error Holdfast raises on purpose: whose fault it is, whether to retry, which HTTP code.

HoldfastError
├── RequestError                     the fault lies with, or ends, one request
│   ├── InvalidField        400      user: a field is wrong; names it
│   ├── Unauthorized        401      user: no or wrong API key
│   ├── UnknownModel        404      user: a model this server does not serve
│   ├── BodyTooLarge        413      user: the body is over the server's limit
│   ├── QueueFull           429      nobody: too much work; retry after a while
│   ├── EngineFault         500      us: this one request cannot be finished
│   ├── NotReady            503      us: no worker can step at the moment; retry
│   └── DeadlineExceeded    504      nobody: the request's own deadline passed
├── OperatorError           exit 2   operator: an option, a model folder, a port, the memory
│   ├── OptionError                  an option is wrong; names it
│   └── ModelError                   a checkpoint is unreadable or does not fit its config
├── LinkError                        a peer process is gone or speaks another protocol
│   ├── LinkClosed                   end of file: the peer is dead
│   ├── LinkTimeout                  the peer took longer than the deadline
│   └── LinkOverflow                 the peer does not read; the bounded buffer is full
├── WorkerFault                      the device side broke: the epoch ends, requests are resumed
└── InvariantError                   our bug: never caught to continue; survives `python -O`
"""

from __future__ import annotations


class HoldfastError(Exception):
    """Root of the tree; never raised itself."""


class RequestError(HoldfastError):
    """One request is refused or ends early. `status` and `kind` follow OpenAI's error object."""

    status = 500
    kind = "server_error"
    retryable = False

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code
        self.retry_after_s: float | None = None


class InvalidField(RequestError):
    """A field's value cannot be honoured. `field` is the name as the user wrote it."""

    status = 400
    kind = "invalid_request_error"

    def __init__(self, field: str, message: str, *, code: str | None = None) -> None:
        super().__init__(message, field=field, code=code)


class Unauthorized(RequestError):
    status = 401
    kind = "authentication_error"


class UnknownModel(RequestError):
    status = 404
    kind = "invalid_request_error"


class BodyTooLarge(RequestError):
    status = 413
    kind = "invalid_request_error"


class QueueFull(RequestError):
    """The bounded queue is full. `retry_after_s` becomes the Retry-After header."""

    status = 429
    kind = "rate_limit_error"
    retryable = True

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_s = retry_after_s


class EngineFault(RequestError):
    status = 500
    retryable = True

    def __init__(self, message: str, *, code: str = "engine_fault") -> None:
        super().__init__(message, code=code)


class NotReady(RequestError):
    status = 503
    retryable = True


class DeadlineExceeded(RequestError):
    status = 504
    kind = "deadline_exceeded"

    def __init__(self, message: str) -> None:
        super().__init__(message, field="timeout", code="deadline")


class OperatorError(HoldfastError):
    """The command cannot run as asked: one line that says what to do, exit code 2."""


class OptionError(OperatorError):
    """`option` is the command-line name, e.g. `--kv-pages`."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option = option


class ModelError(OperatorError):
    pass


class LinkError(HoldfastError):
    pass


class LinkClosed(LinkError):
    pass


class LinkTimeout(LinkError):
    pass


class LinkOverflow(LinkError):
    pass


class WorkerFault(HoldfastError):
    pass


class InvariantError(HoldfastError):
    """An invariant of ours does not hold. The message carries the values."""


def require(condition: object, message: str) -> None:
    """Raise InvariantError unless `condition`; for invariants that production relies on."""
    if not condition:
        raise InvariantError(message)
