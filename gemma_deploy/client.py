"""A client of servers that speak OpenAI's protocol: which model is asked, and what their errors say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.reading import read_text, text_kind

if TYPE_CHECKING:
    from pathlib import Path

    import httpx2

ERROR_BYTES = 1 << 16  # of an answer that is an error
PROBLEM_CHARACTERS = 200  # of what a server says of an error
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Target:
    """A server and what it is asked with.

    Args:
        url: up to `/v1`, or without it; model: "" for the only one that it has.
        key: for its Authorization, "" for none.
        vocabulary: ids are below that.
        seconds: in which a request must send something.
    """

    url: str
    model: str = ""
    key: str = ""
    vocabulary: int = 256_000
    seconds: float = 600.0

    @property
    def root(self) -> str:
        """The address without `/v1`, and without a slash at the end."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def base(self) -> str:
        """Where OpenAI's endpoints are."""
        return f"{self.root}/v1"


def new_client(
    *,
    seconds: float,
    connections: int,
    kept: int,
    key: str = "",
    transport: httpx2.AsyncBaseTransport | None = None,
) -> httpx2.AsyncClient:
    """A client that follows no redirects and takes nothing from the environment, no proxy above all.

    Args:
        seconds: in which a server must send something; connections: at most; kept: of these open between requests.
        key: for its Authorization, "" for none.
        transport: instead of a network.
    """
    import httpx2

    return httpx2.AsyncClient(
        transport=transport,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(seconds, connect=CONNECT_SECONDS, pool=CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=kept),
        trust_env=False,
        follow_redirects=False,
    )


def connected(
    target: Target, connections: int, transport: httpx2.AsyncBaseTransport | None = None
) -> httpx2.AsyncClient:
    """A client for a server, to be entered and left: at most so many connections.

    Args:
        transport: instead of a network.
    """
    return new_client(
        seconds=target.seconds, connections=connections, kept=connections, key=target.key, transport=transport
    )


async def model_of(client: httpx2.AsyncClient, target: Target) -> dict[str, Any]:
    """What the server says of the model that is asked; its name is `id`.

    Raises:
        UsageError: it has several and none is named, or not this one; DeployError: there is no such server.
    """
    import httpx2

    where = f"{target.base}/models"
    try:
        answer = await client.get(where)
        if answer.status_code != 200:
            raise DeployError(
                f"the server answers {said(answer.status_code, answer.content)}",
                where=where,
                next_step="name the server's address up to /v1, and its key with --api-key-file",
            )
        models = {str(one["id"]): dict(one) for one in answer.json()["data"]}
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise DeployError(
            f"no answer: {reason(error)}", where=where, next_step="start the server, or name its address in --server"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DeployError(
            "the answer is no list of models",
            where=where,
            expected='{"data": [{"id": NAME}, ...]}, as OpenAI\'s servers answer',
            next_step="name the address of such a server in --server",
        ) from error
    alone = [one for one in models.values() if not one.get("parent")]  # others are adapters of these
    if not target.model and len(alone) == 1:
        return alone[0]
    if target.model in models:
        return models[target.model]
    raise UsageError(
        f"the server has no model named {target.model!r}" if target.model else "the server has several models",
        where=where,
        expected=", ".join(list(models)[:20]) or "one: it has none",
        next_step="name one with --model",
    )


async def beginning(response: httpx2.Response) -> bytes:
    """What a server says of an error, as far as anybody reads it."""
    content = b""
    async for part in response.aiter_bytes():
        content += part
        if len(content) > ERROR_BYTES:
            break
    return content[:ERROR_BYTES]


def said(status: int, content: bytes) -> str:
    """An answer that is an error, as a sentence."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        message = content.decode(errors="replace")
    return f"{status}: {' '.join(str(message).split())[:PROBLEM_CHARACTERS]}"


def reason(error: Exception) -> str:
    """Why there was no answer."""
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}"


def key_in(file: Path | None) -> str:
    """The key that a file holds, without what stands around it; "" of no file.

    Raises:
        UsageError: it cannot be read, or holds no key.
    """
    if file is None:
        return ""
    key = read_text(file, text_kind("--api-key-file")).strip()
    if not key.isascii() or not key.isprintable() or " " in key or not key:
        raise UsageError(
            "it holds no key",
            where=str(file),
            expected="one word of ASCII letters, digits and signs",
            next_step="check --api-key-file",
        )
    return key
