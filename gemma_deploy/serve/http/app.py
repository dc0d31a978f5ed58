"""The application: who may ask, what is asked for, and one line in the log for each answer."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gemma_deploy.errors import DeployError, UsageError, plain
from gemma_deploy.runtime.limits import check_tokens
from gemma_deploy.serve.http.adapters import LoadFields, Loading, UnloadFields
from gemma_deploy.serve.http.chats import Chat, chat_of, rendered
from gemma_deploy.serve.http.completions import Completion
from gemma_deploy.serve.http.described import description
from gemma_deploy.serve.http.embeddings import EmbeddingFields, ServedEncoder
from gemma_deploy.serve.http.errors import ApiError, told, wrong
from gemma_deploy.serve.http.fields import (
    ChatFields,
    Choosing,
    CompletionFields,
    DetokenizeFields,
    TokenizeFields,
    read,
)
from gemma_deploy.serve.http.manual import manual_route
from gemma_deploy.serve.http.metrics import exposed
from gemma_deploy.serve.http.response_fields import ResponseFields, renamed
from gemma_deploy.serve.http.responses import ModelResponse
from gemma_deploy.serve.http.served import Served
from gemma_deploy.serve.http.streaming import ClientLeft, EventStream, unless_left
from gemma_deploy.serve.visitors import UNKNOWN_NAME, foreign
from gemma_deploy.serve.webui import page_routes

log = logging.getLogger(__name__)
answers = logging.getLogger("gemma_deploy.serve.answers")  # a line for each
LARGEST_BODY = 8 << 20
BODY_SECONDS = 30.0  # from the first byte of a body to its last
SHOWN_PATH = 200  # characters in the log
LEFT = 499  # as nginx logs it; nobody reads it
One = TypeVar("One")
Answer = Completion | Chat | ModelResponse
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Settings:
    """How the application answers.

    Args:
        keys: one of which a request must bring (`Authorization: Bearer KEY`); none: everybody may ask.
        hosts: names by which it may be asked, None for any; see visitors.py.
        origins: web pages of elsewhere that may ask; none by default.
        json_log: a line of JSON for each request in the place of words.
        largest_body: bytes of a request, at most.
        adapters: a directory from which adapters may be loaded by request; None: from none.
    """

    keys: Sequence[str] = ()
    hosts: Collection[str] | None = None
    origins: Sequence[str] = ()
    json_log: bool = False
    largest_body: int = LARGEST_BODY
    adapters: Path | None = None


class Server:
    """Answers requests to some artifacts.

    Args:
        served: artifacts that make text, each under names of its own; encoders: those that make vectors.
    """

    def __init__(
        self, served: Sequence[Served], settings: Settings | None = None, *, encoders: Sequence[ServedEncoder] = ()
    ) -> None:
        self._served, self._settings = tuple(served), settings or Settings()
        self._names = {name: one for one in self._served for name in one.names}
        self._encoders = {name: one for one in encoders for name in one.names}
        self._loading = Loading(self._settings.adapters, {*self._names, *self._encoders})
        self._description = description(version("gemma-deploy"))
        self._keys = [key.encode() for key in self._settings.keys]

    def app(self) -> Starlette:
        """The ASGI application."""
        posts = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chats,
            "/v1/responses": self._responses,
            "/v1/embeddings": self._embeddings,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
        }
        gets = {
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._model,
            "/metrics": self._metrics,
            "/openapi.json": self._described,
        }
        routes = [Route(path, self._guarded(handler), methods=["POST"]) for path, handler in posts.items()]
        routes += [Route(path, self._guarded(handler), methods=["GET"]) for path, handler in gets.items()]
        routes += [Route("/health", self._health, methods=["GET"]), manual_route(self._description), *page_routes()]
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _no_such_thing})
        if self._settings.origins:
            from starlette.middleware.cors import CORSMiddleware

            app.add_middleware(
                CORSMiddleware, allow_origins=list(self._settings.origins), allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )  # fmt: skip
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        for one in self._served:
            one.start()
        try:
            yield
        finally:
            for one in self._served:
                await asyncio.to_thread(one.worker.stop)

    def _guarded(self, handler: Handler) -> Handler:
        """A handler for those who may ask, whose errors are answers."""

        async def guarded(request: Request) -> Response:
            try:
                self._authenticate(request)
                return await handler(request)
            except ApiError as error:
                if error.status != 400:
                    log.info("%s: %d %s", _path(request), error.status, plain(error.message))
                return error.response()
            except (ClientLeft, ClientDisconnect):
                return Response(status_code=LEFT)
            except DeployError as error:
                return told(error).response()
            except Exception:
                log.exception("%s: a fault of this program", _path(request))
                return ApiError(500, "a fault of this program; its log tells more").response()

        return guarded

    def _authenticate(self, request: Request) -> None:
        """Refuse pages of other sites, and who has no key.

        Raises:
            ApiError: with 421, 403 or 401.
        """
        given, settings = request.headers, self._settings
        status = foreign(given.get("host", ""), given.get("origin"), hosts=settings.hosts, origins=settings.origins)
        if status == UNKNOWN_NAME:
            raise ApiError(status, "this server is not known by that name: ask 127.0.0.1, or start it with a key")
        if status:
            raise ApiError(status, "pages of other sites may not ask: --allow-origin names those that may")
        if not self._keys:
            return
        scheme, _, key = given.get("authorization", "").partition(" ")
        offered = key.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(offered, key) for key in self._keys]  # all of them, whichever fits
        if not any(matches):
            raise ApiError(401, "no API key that this server knows: Authorization: Bearer KEY", code="invalid_api_key")

    def _find(self, name: str | None) -> tuple[Served, str]:
        """What makes text under a name, and that name."""
        base, _, adapter = (name or "").rpartition(":")
        if name not in self._names and base in self._names and adapter in self._names[base].adapters:
            return self._names[base].adapters[adapter], f"{base}:{adapter}"
        return self._find_model(name)

    def _find_model(self, name: str | None) -> tuple[Served, str]:
        """The same of models alone."""
        return _found(self._names, name, self._encoders, "makes vectors of texts: /v1/embeddings")

    def _every(self) -> Mapping[str, Served | ServedEncoder]:
        """All that is served, adapters too, by name."""
        return {**{name: found for one in self._served for name, found in one.called().items()}, **self._encoders}

    async def _body(self, request: Request) -> bytes:
        """What was sent, up to a limit and in a limited time."""
        most = self._settings.largest_body
        refusal = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > most:
            raise refusal
        found = bytearray()

        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    found.extend(piece)
                    if len(found) > most:
                        raise refusal
        except TimeoutError:
            raise ApiError(408, f"the body was not here within {BODY_SECONDS:g} s") from None
        return bytes(found)

    async def _completions(self, request: Request) -> Response:
        fields = read(CompletionFields, await self._body(request))
        served, name = self._find(fields.model)
        guide = await served.guide(fields.grammar())
        return await self._answered(request, Completion(served, fields, name, guide=guide), fields)

    async def _chats(self, request: Request) -> Response:
        fields = read(ChatFields, await self._body(request))
        served, name = self._find(fields.model)
        return await self._answered(request, await chat_of(served, fields, name), fields)

    async def _responses(self, request: Request) -> Response:
        fields = read(ResponseFields, await self._body(request))
        served, name = self._find(fields.model)
        chat_fields = fields.chat()
        try:
            chat = await chat_of(served, chat_fields, name)
        except ApiError as error:
            raise renamed(error) from None
        return await self._answered(request, ModelResponse(chat, fields, name), fields)

    async def _embeddings(self, request: Request) -> Response:
        fields = read(EmbeddingFields, await self._body(request))
        encoder, name = _found(self._encoders, fields.model, self._names, "makes text: /v1/completions")
        return JSONResponse(await encoder.answer(fields, name))

    async def _answered(self, request: Request, answer: Answer, fields: Choosing) -> Response:
        def done() -> None:
            self._tell(answer, fields.model)

        if not fields.stream:
            try:
                return JSONResponse(await unless_left(request, answer.whole(), answer.asked))
            finally:
                done()
        try:
            await unless_left(request, answer.speeches[0].begin(), ())  # so that the status tells whether it can be
        except BaseException:
            for one in answer.asked:
                one.leave()
            raise
        return EventStream(answer.chunks(), answer.asked, done, named=isinstance(answer, ModelResponse))

    def _tell(self, answer: Answer, name: str | None) -> None:
        """A line in the log: never the prompt."""
        speeches = answer.speeches
        tokens, first = sum(one.tokens for one in speeches), speeches[0].first
        later = max((one.seconds for one in speeches), default=0.0) - first
        waits = [one.queued for one in speeches if one.queued is not None]
        told = {
            "id": answer.id,
            "model": name,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": sum(one.cached for one in speeches),
            "completion_tokens": tokens,
            "queue_s": round(max(waits), 4) if waits else None,
            "first_token_s": round(first, 4),
            "tokens_per_s": round((tokens - len(speeches)) / later, 1)
            if later > 0 and tokens > len(speeches)
            else None,
            "finish": ",".join(one.finish or "left" for one in speeches[:8]),
        }
        if self._settings.json_log:
            answers.info("%s", json.dumps(told))
        else:
            answers.info("%s", " ".join(f"{key}={value}" for key, value in told.items()))

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [one.card(name) for name, one in self._every().items()]})

    async def _model(self, request: Request) -> Response:
        one, name = _found(self._every(), request.path_params["name"], {}, "")
        return JSONResponse(one.card(name))

    async def _tokenize(self, request: Request) -> Response:
        fields = read(TokenizeFields, await self._body(request))
        served, _ = self._find(fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise wrong("prompt", "give a text (prompt) or a conversation (messages)")
        try:
            if fields.messages is not None:
                text = rendered(served, fields.messages, names=fields.chat_template_kwargs)
                ids = served.encode(text, special=True)
            else:
                ids = served.encode(fields.prompt or "", special=bool(fields.parse_special))
                ids = ids if fields.add_special_tokens in (None, True) else ids[1:]
        except UsageError as error:
            raise told(error, "prompt") from None
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": served.context})

    async def _detokenize(self, request: Request) -> Response:
        fields = read(DetokenizeFields, await self._body(request))
        served, _ = self._find(fields.model)
        if fields.tokens:
            try:
                check_tokens(fields.tokens, served.vocabulary, "tokens")
            except UsageError as error:
                raise told(error, "tokens") from None
        return JSONResponse({"prompt": served.tokenizer.decode_all(fields.tokens)})

    async def _load(self, request: Request) -> Response:
        fields = read(LoadFields, await self._body(request))
        return JSONResponse(await self._loading.load(self._find_model(fields.model)[0], fields))

    async def _unload(self, request: Request) -> Response:
        fields = read(UnloadFields, await self._body(request))
        return JSONResponse(await self._loading.unload(self._find_model(fields.model)[0], fields))

    async def _health(self, request: Request) -> Response:
        broken = [one.names[0] for one in self._served if one.worker.broken is not None]
        status = {"status": "ok"} if not broken else {"status": "failed", "models": broken}
        return JSONResponse(status, 503 if broken else 200)

    async def _described(self, request: Request) -> Response:
        return JSONResponse(self._description)

    async def _metrics(self, request: Request) -> Response:
        found = {
            one.names[0]: (
                one.worker.counts(),
                {name: each.metrics for name, each in (("", one), *one.adapters.items())},
                one.worker.actors(),
            )
            for one in self._served
        }
        return PlainTextResponse(exposed(found), media_type="text/plain; version=0.0.4")


def _found(models: Mapping[str, One], name: str | None, others: Collection[str], what: str) -> tuple[One, str]:
    """What is asked for by a name, and that name.

    Args:
        others: names of what answers other requests, and `what` that does.
    """
    if name is None and len(set(map(id, models.values()))) == 1:
        name = next(iter(models))
    if name is None:
        raise wrong("model", f"name one of {', '.join(models) or 'those that do this, of which none is served here'}")
    if name in others:
        raise wrong("model", f"{name} {what}")
    if name not in models:
        raise ApiError(404, f"no model {name[:80]!r} is served here", param="model", code="model_not_found")
    return models[name], name


def _path(request: Request) -> str:
    """As a line of the log may show it."""
    return plain(request.scope["path"])[:SHOWN_PATH]


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    answer: Any = ApiError(error.status_code, message).response()
    answer.headers.update(error.headers or {})
    return answer
