"""The web page: a few files with safe headers, and a server of its own for it (`gemma-deploy webui`).

The page talks to /v1/models and /v1/chat/completions of whoever serves it: our server, or `webui_app`, which passes
both on to another one. Its files are read once; nothing else of the disk is reached, and nothing is listed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.serve.passing import ENDPOINTS, PassThrough, base_of, new_client

if TYPE_CHECKING:
    import httpx2
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# What a reply says can be no script: none is in the page, none comes from elsewhere, and no text becomes HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
SAFE_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def page_routes() -> list[Route]:
    """The page at `/` and its files beside it, GET and HEAD, each with `SAFE_HEADERS`; no other path is answered."""
    from starlette.routing import Route

    files = sorted(file for file in FOLDER.iterdir() if file.suffix in KINDS)
    return [Route("/" if file.name == INDEX else f"/{file.name}", _answering(file)) for file in files]


def _answering(file: Path) -> Any:
    """What answers with a file as it is now."""
    from starlette.responses import Response

    body, tag = file.read_bytes(), f'"{hashlib.sha256(file.read_bytes()).hexdigest()[:32]}"'
    headers = {**SAFE_HEADERS, "cache-control": "no-cache", "etag": tag}

    async def answer(request: Request) -> Response:
        known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=KINDS[file.suffix], headers=headers)

    return answer


def webui_app(
    base_url: str, *, hosts: frozenset[str] | None = None, transport: httpx2.AsyncBaseTransport | None = None
) -> Starlette:
    """The page, and behind its `/v1` the two endpoints of another server that it needs.

    Args:
        base_url: of an OpenAI-compatible server, up to `/v1` or without it.
        hosts: names by which the page may be asked for endpoints; None for any.
        transport: instead of a network.

    Raises:
        UsageError: `base_url` is no address.
    """
    from starlette.applications import Starlette
    from starlette.routing import Route

    client = new_client(transport)
    passing = PassThrough(base_of(base_url), client, headers=SAFE_HEADERS, hosts=hosts)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    # Route takes an instance of a class for an ASGI application, which checks the method itself.
    return Starlette(routes=[*(Route(path, passing) for path in ENDPOINTS), *page_routes()], lifespan=lifespan)
