"""What a client is told when a request cannot be answered, in the shape of the interface it spoke."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from hybrimoe_kt.errors import ConfigError, HybriMoEError, ModelError

__all__ = ["ApiError", "Json", "as_api_error", "error_body", "error_response"]


class ApiError(Exception):
    """A refusal: HTTP status, a sentence, and OpenAI's `type`, `param` and `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})


class Json(Response):
    """A JSON response that any text survives, also half of a surrogate pair."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


def as_api_error(error: Exception) -> ApiError:
    """Say what went wrong as a refusal; what is not the client's fault is a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelError | ConfigError):
        return ApiError(400, str(error))
    reason = str(error) if isinstance(error, HybriMoEError) else "an error inside the server; its log has the details"
    return ApiError(500, reason, kind="server_error", code="internal_error")


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """Return an error as the clients of `path` expect it."""
    if path.startswith("/api/"):
        return {"error": error.message}
    shown = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": shown}


def error_response(path: str, error: ApiError) -> Json:
    """Return an error as the clients of `path` expect it."""
    return Json(error_body(path, error), status_code=error.status, headers=error.headers)
