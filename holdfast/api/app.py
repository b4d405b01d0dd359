"""The HTTP application: routes, authorisation, bodies; nothing lasts longer than a request.

Owns the paths and what each may be asked; validation lies in api.schema, generations in api.stream.
Everything it needs is passed to `create_app`; it must not know processes, sockets or the core.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from holdfast import __version__
from holdfast.api.chat import ChatRequest, GenerationFields, render
from holdfast.api.client import CoreClient
from holdfast.api.completions import CompletionRequest, DetokenizeRequest, TokenizeRequest
from holdfast.api.format import ChatFormat, CompletionFormat, Envelope, Format
from holdfast.api.front import Front, Keys, error_response
from holdfast.api.schema import check_prompt, parse
from holdfast.api.stream import Exchange, Prompt
from holdfast.api.text import Tokenizer
from holdfast.config import Limits
from holdfast.core.metrics import Metrics, MetricsBoard
from holdfast.errors import (
    BodyTooLarge,
    InvalidField,
    NotReady,
    RequestError,
    UnknownModel,
)

# Longer texts are tokenised in a thread: 16 Ki characters take some 5 ms.
_THREAD_CHARS = 16 << 10
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    limits: Limits
    served_name: str
    api_keys: tuple[str, ...] = ()
    """None at all: everybody may ask, as one tenant."""
    cors_origins: tuple[str, ...] = ()
    body_bytes_max: int = 16 << 20
    body_timeout_s: float = 30.0
    """A body must have arrived by then."""
    started: int = field(default_factory=lambda: int(time.time()))


def create_app(
    config: ApiConfig,
    client: CoreClient,
    tokenizer: Tokenizer,
    metrics: Metrics,
    board: MetricsBoard | None = None,
) -> FastAPI:
    """The application of one api process. `board` reads the slots of all; default: none."""
    app = FastAPI(title="Holdfast", version=__version__, redoc_url=None)
    routes = _Routes(config, client, tokenizer, board)
    body = {"chat": ChatRequest, "completions": CompletionRequest}
    add = app.add_api_route
    add("/v1/chat/completions", routes.chat, methods=["POST"], **_body_doc(body["chat"]))
    add("/v1/completions", routes.completions, methods=["POST"], **_body_doc(body["completions"]))
    add("/v1/models", routes.models, methods=["GET"], response_class=JSONResponse)
    add("/v1/models/{model:path}", routes.model, methods=["GET"], response_class=JSONResponse)
    add("/tokenize", routes.tokenize, methods=["POST"], **_body_doc(TokenizeRequest))
    add("/detokenize", routes.detokenize, methods=["POST"], **_body_doc(DetokenizeRequest))
    add("/health", routes.health, methods=["GET"], response_class=JSONResponse)
    add("/ready", routes.ready, methods=["GET"], response_class=JSONResponse)
    add("/metrics", routes.metrics, methods=["GET"], response_class=Response)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Front, metrics=metrics)
    if config.cors_origins:
        # Outermost, so that errors carry its headers too.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.openapi = lambda: _openapi(app)
    return app


class _Routes:
    def __init__(
        self,
        config: ApiConfig,
        client: CoreClient,
        tokenizer: Tokenizer,
        board: MetricsBoard | None,
    ) -> None:
        self._config = config
        self._client = client
        self._tokenizer = tokenizer
        self._board = board
        self._keys = Keys(config.api_keys)

    async def chat(self, request: Request) -> Response:
        """A conversation's next message, whole or streamed."""
        tenant, body = await self._receive(request, ChatRequest)
        self._check_model(body.model)
        text = body.prompt_text(self._tokenizer.template)
        ids = await self._encode(text, special=False, field="messages")
        prompt = self._prompt(body, ids, "messages")
        envelope = self._envelope("chatcmpl", body)
        form = ChatFormat(envelope, self._tokenizer)
        return self._exchange(tenant, body, [prompt], form)

    async def completions(self, request: Request) -> Response:
        """What follows a text or token ids, whole or streamed."""
        tenant, body = await self._receive(request, CompletionRequest)
        self._check_model(body.model)
        prompts, echoes = [], {}
        choices = body.n or 1
        for at, given in enumerate(body.prompts(self._config.limits.vocab_size)):
            if isinstance(given, str):
                ids = await self._encode(given, special=True, field="prompt")
                text = given
            else:
                ids = given
                text = self._tokenizer.decode(ids, skip_special=False) if body.echo else ""
            prompts.append(self._prompt(body, ids, "prompt"))
            if body.echo:
                echoes.update(dict.fromkeys(range(at * choices, (at + 1) * choices), text))
        form = CompletionFormat(self._envelope("cmpl", body), self._tokenizer, echoes)
        return self._exchange(tenant, body, prompts, form)

    async def models(self, request: Request) -> dict[str, Any]:
        """The one model that is served."""
        self._authorize(request)
        return {"object": "list", "data": [self._model()]}

    async def model(self, request: Request, model: str) -> dict[str, Any]:
        self._authorize(request)
        self._check_model(model)
        return self._model()

    async def tokenize(self, request: Request) -> Response:
        """Ids of a text, or of messages put through the chat template."""
        _, body = await self._receive(request, TokenizeRequest)
        self._check_model(body.model)
        if body.messages is not None:
            text = render(
                self._tokenizer.template,
                body.messages,
                add_generation_prompt=body.add_generation_prompt is not False,
            )
            special, name = bool(body.add_special_tokens), "messages"
        else:
            text, special, name = body.prompt or "", body.add_special_tokens is not False, "prompt"
        ids = await self._encode(text, special=special, field=name, bounded=False)
        answer: dict[str, Any] = {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": self._config.limits.context_tokens,
        }
        if body.return_token_strs:
            answer["token_strs"] = [self._tokenizer.show(token)[0] for token in ids]
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        """Text of ids."""
        _, body = await self._receive(request, DetokenizeRequest)
        self._check_model(body.model)
        ids = body.checked(self._config.limits.vocab_size)
        text = self._tokenizer.decode(ids, skip_special=bool(body.skip_special_tokens))
        return JSONResponse({"prompt": text})

    async def health(self) -> dict[str, str]:
        """This process is alive and its loop turns."""
        return {"status": "ok"}

    async def ready(self) -> dict[str, Any]:
        """Whether the engine can step now; 503 with the reason otherwise."""
        if not self._client.ready:
            error = NotReady(self._client.detail, code="not_ready")
            error.retry_after_s = 1.0
            raise error
        return {"ready": True, "detail": self._client.detail}

    async def metrics(self) -> Response:
        """All processes' counters, as Prometheus text."""
        text = b"" if self._board is None else self._board.render()
        return Response(text, media_type=_PROMETHEUS)

    # --- the parts of a request ---

    def _authorize(self, request: Request) -> str:
        return self._keys.tenant(request.headers.get("authorization"))

    async def _receive(self, request: Request, model: type[Body]) -> tuple[str, Body]:
        """(tenant, body). Who may not ask is told before the body is read."""
        tenant = self._authorize(request)
        return tenant, parse(model, await self._read(request))

    async def _read(self, request: Request) -> bytes:
        most = self._config.body_bytes_max
        announced = request.headers.get("content-length", "")
        error = BodyTooLarge(f"the body is over {most} bytes", field="body", code="body_too_large")
        if announced.isdecimal() and int(announced) > most:
            raise error
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise error
        except TimeoutError:
            raise InvalidField(
                "body", f"the body did not arrive in {self._config.body_timeout_s:g} s"
            ) from None
        return b"".join(parts)

    def _check_model(self, name: str | None) -> None:
        served = self._config.served_name
        if name is not None and name != served:
            raise UnknownModel(
                f"this server serves {served!r}, not {name!r}",
                field="model",
                code="model_not_found",
            )

    async def _encode(
        self, text: str, *, special: bool, field: str, bounded: bool = True
    ) -> list[int]:
        """Ids of `text`; one that cannot be a context is refused before it costs much."""
        tokenizer = self._tokenizer
        if bounded:
            least = len(text) // tokenizer.chars_a_token_max
            check_prompt(self._config.limits, max(1, least), field, at_least="at least ")
        if len(text) <= _THREAD_CHARS:
            return tokenizer.encode(text, special=special, field=field)
        return await asyncio.to_thread(tokenizer.encode, text, special=special, field=field)

    def _prompt(self, body: GenerationFields, ids: list[int], field: str) -> Prompt:
        resolved = body.resolve(
            self._config.limits,
            prompt_tokens=len(ids),
            end_ids=self._tokenizer.end_ids,
            prompt_field=field,
        )
        return Prompt(ids, resolved)

    def _envelope(self, prefix: str, body: GenerationFields) -> Envelope:
        return Envelope(
            id=f"{prefix}-{uuid.uuid4().hex}",
            model=self._config.served_name,
            created=int(time.time()),
            include_usage=body.include_usage,
            names_as_ids=bool(body.return_tokens_as_token_ids),
        )

    def _exchange(
        self, tenant: str, body: GenerationFields, prompts: list[Prompt], form: Format
    ) -> Exchange:
        return Exchange(
            self._client,
            self._tokenizer,
            prompts,
            form,
            tenant=tenant,
            stream=bool(body.stream),
            include_usage=body.include_usage,
            want_logprobs=body.alternatives() >= 0,
        )

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._config.served_name,
            "object": "model",
            "created": self._config.started,
            "owned_by": "holdfast",
            "max_model_len": self._config.limits.context_tokens,
        }


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    messages = {
        404: f"there is no {request.url.path}; /docs lists what there is",
        405: f"{request.url.path} does not answer {request.method}",
    }
    plain = RequestError(
        messages.get(error.status_code, str(error.detail)), code=codes.get(error.status_code)
    )
    plain.status = error.status_code
    plain.kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return error_response(plain, dict(error.headers or {}))


# --- the documentation at /docs: bodies are parsed by hand, so their schemas are added by hand ---

_BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_REF = "#/components/schemas/{model}"


def _body_doc(model: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "response_class": JSONResponse,
        "response_model": None,
    }


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description="OpenAI-compatible. Unknown fields are refused, none is ignored.",
            routes=app.routes,
        )
        bodies = models_json_schema([(m, "validation") for m in _BODIES], ref_template=_REF)[1]
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(bodies["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema
