"""Front: what every HTTP request passes before and after its route, as one ASGI middleware.

Owns the request id (taken from x-request-id or drawn, always returned), the count of requests by
route and status, and the last resort for errors of ours: the one place in api that catches
everything, logs it, and tells the client nothing of it. Knows no bodies and no models.
"""

from __future__ import annotations

import hmac
import logging
import math
import re
import uuid
from collections.abc import Sequence
from hashlib import blake2b, sha256

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from holdfast.api.format import error_json
from holdfast.api.stream import ABORT_EXTENSION
from holdfast.core.metrics import OTHER, ROUTES, Metrics
from holdfast.errors import EngineFault, InvalidField, RequestError, Unauthorized

log = logging.getLogger("holdfast.api")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
# What nginx calls a request whose client left before its answer.
_CLIENT_GONE = 499


class Front:
    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _CLIENT_GONE
        wanted = _header(scope, b"x-request-id")
        valid = wanted is None or _REQUEST_ID.fullmatch(wanted) is not None
        request_id = wanted if wanted and valid else uuid.uuid4().hex.encode()
        scope["state"] = {**scope.get("state", {}), "request_id": request_id.decode()}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            if not valid:
                raise InvalidField(
                    "x-request-id", "1 to 128 letters, digits or any of . _ : / + = -"
                )
            await self._app(scope, receive, answer)
        except RequestError as error:
            await error_response(error)(scope, receive, answer)
        except ClientDisconnect:
            pass  # It left while it was still sending.
        except Exception:
            log.exception("request %s failed", request_id.decode())
            if status == _CLIENT_GONE:
                error = EngineFault(
                    f"internal error; the server's log has it under request id "
                    f"{request_id.decode()}",
                    code="internal_error",
                )
                await error_response(error)(scope, receive, answer)
            elif (abort := scope.get("extensions", {}).get(ABORT_EXTENSION)) is not None:
                # Half an answer is out: a cut connection is the only honest end of it.
                abort()
        finally:
            self._metrics.add("http_requests_total", labels=(route_of(scope["path"]), str(status)))


class Keys:
    """API keys. Each one's tenant is a name that says nothing of the key and never changes."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._tenants = [
            (sha256(key.encode()).digest(), blake2b(key.encode(), digest_size=8).hexdigest())
            for key in keys
        ]

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an Authorization header; "" on a server without keys.

        Raises Unauthorized. Every key is compared, each in constant time.
        """
        if not self._tenants:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = sha256(key.strip().encode()).digest()
        found = None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, given):
                found = tenant
        if found is None or scheme.lower() != "bearer":
            message = "no API key was given" if authorization is None else "wrong API key"
            raise Unauthorized(
                f"{message}; send the header `Authorization: Bearer <key>`", code="invalid_api_key"
            )
        return found


def error_response(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    """OpenAI's error object with its status, and what the status demands of headers."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(
        orjson.dumps(error_json(error)), error.status, headers, media_type="application/json"
    )


def route_of(path: str) -> str:
    """The metrics' label of a path: one of a fixed list."""
    if path in ROUTES:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else OTHER


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)
