"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.serve.adapting import NoAdapterError
from gemma_deploy.serve.request import LostError, QueueFullError

RETRY_SECONDS = 1
LOST = "replica_lost"
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP; param: the field that is wrong; code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, object]:
        """As JSON."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers: Mapping[str, str] = {}
        if self.status == 429 or self.code == LOST:
            headers = {"Retry-After": str(RETRY_SECONDS)}
        elif self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        elif self.status == 413:
            headers = {"Connection": "close"}  # the rest of the body is not read
        return JSONResponse(self.body(), self.status, headers)


def wrong(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A field with a wrong value."""
    return ApiError(400, message if param is None else f"{param}: {message}", param=param, code=code)


def words_of(error: DeployError) -> str:
    """What is wrong, without what lies where on this machine."""
    expected = [f"expected: {error.expected}"] if error.expected else []
    return "; ".join([error.what, *error.problems, *expected])


def told(error: DeployError, param: str | None = None) -> ApiError:
    """What this program refuses, or cannot do, as an answer."""
    message = words_of(error)
    if isinstance(error, NoAdapterError):
        return ApiError(404, message, param="model", code="model_not_found")
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="queue_full")
    if isinstance(error, UsageError):
        return wrong(param, message)
    return ApiError(503, message, code=LOST if isinstance(error, LostError) else "engine_failed")
