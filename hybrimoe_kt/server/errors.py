"""What a client is told when a request cannot be answered, in the shape of the interface it spoke."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response

from hybrimoe_kt.errors import ConfigError, HybriMoEError, ModelError

__all__ = ["ApiError", "Json", "as_api_error", "error_body", "error_response", "invalid_request", "named_as"]

# What Anthropic's interface calls the errors of a status; others are "api_error".
_ANTHROPIC_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip


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


def invalid_request(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Say what pydantic found wrong in a request, of which each `loc` is a place."""
    first = max(errors, key=lambda found: len(found["loc"]))  # of a choice of types, the one that came furthest
    if first["type"] == "json_invalid":
        return ApiError(400, f"the request is not JSON: {first['ctx']['error']}", code="invalid_json")
    param = _param(first["loc"], body)
    return ApiError(400, f"{param or 'the request'}: {first['msg']}", param=param, code=first["type"])


def _param(location: Sequence[Any], body: Any) -> str | None:
    """Name a place in the request, such as "messages[0].content", without the types that were tried there."""
    shown = ""
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(part, int):
            shown += f"[{part}]"
            body = body[part] if isinstance(body, list) and part < len(body) else None
        elif isinstance(body, dict) and (part in body or is_last):
            shown += f".{part}"
            body = body.get(part)
    return shown.lstrip(".") or None


@contextmanager
def named_as(places: Mapping[str, str]) -> Iterator[None]:
    """Call the fields that a refusal names as the interface does that the client speaks."""
    try:
        yield
    except ApiError as error:
        name = (error.param or "").partition("[")[0].partition(".")[0]
        if name in places:
            error.param = places[name]
            if error.message.startswith(f"{name} "):
                error.message = places[name] + error.message.removeprefix(name)
        raise


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """Return an error as the clients of `path` expect it."""
    if path.startswith("/api/"):
        return {"error": error.message}
    if path.startswith("/v1/messages"):
        # By these words its clients know that they are to shorten the conversation.
        begun = "prompt is too long: " if error.code == "context_length_exceeded" else ""
        kind = _ANTHROPIC_KINDS.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": begun + error.message}}
    shown = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": shown}


def error_response(path: str, error: ApiError) -> Json:
    """Return an error as the clients of `path` expect it."""
    return Json(error_body(path, error), status_code=error.status, headers=error.headers)
