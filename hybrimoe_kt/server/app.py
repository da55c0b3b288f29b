"""The application: routes behind the access check, errors in the client's shape, the page's files at `/`."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from hybrimoe_kt import __version__
from hybrimoe_kt.errors import HybriMoEError

from .access import Access
from .anthropic_routes import anthropic_routes
from .body import BodyLimit
from .errors import ApiError, Json, as_api_error, error_response, invalid_request
from .ollama_routes import ollama_routes
from .openai_routes import openai_routes
from .origins import Origins
from .responses_routes import responses_routes
from .service import Service

__all__ = ["make_app"]

logger = logging.getLogger(__name__)

# The page is all of its own: nothing from elsewhere may run in it, and no other page may frame it.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
"""Of the page's files. Windows keeps a list of its own, which may call a script plain text; browsers refuse that."""
_BY_ACCEPT = {"Vary": "Accept"}

# What clients of other servers ask for, and why there is nothing.
_ABSENT = {
    **dict.fromkeys(
        ("/api/embed", "/api/embeddings", "/v1/embeddings"), "this server makes no embeddings, only answers"
    ),
    **dict.fromkeys(
        ("/api/create", "/api/copy", "/api/delete", "/api/push"), "this server has one model and keeps it as it is"
    ),
    "/v1/messages/batches": "this server has no batches; send the messages to /v1/messages",
    "/completion": "llama.cpp's own interface is not spoken here; use /v1/completions",
}


def make_app(service: Service) -> ASGIApp:
    """Return the ASGI application of one server."""
    app = FastAPI(title="hybrimoe_kt", version=__version__, docs_url=None, redoc_url=None)
    for routes in (openai_routes, responses_routes, anthropic_routes, ollama_routes):
        app.include_router(routes(service))
    _add_own_routes(app, service)
    page = _add_page(app)
    for kind, handler in ((ApiError, _refused), (RequestValidationError, _invalid), (HTTPException, _http)):
        app.add_exception_handler(kind, handler)
    app.add_exception_handler(HybriMoEError, _failed)  # raised on purpose: the connection goes on
    app.add_exception_handler(Exception, _failed)
    known = {*app.openapi()["paths"], *page}
    settings = service.settings
    layers: ASGIApp = BodyLimit(app, service.max_request_bytes, settings.request_s)
    if allowed := Origins(settings.origins).pattern:
        layers = CORSMiddleware(
            layers, allow_origin_regex=allowed, allow_methods=["*"], allow_headers=["*"], max_age=600
        )
    return Access(layers, service, {"/health", *page}, known)


def _add_own_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["server"])
    async def health() -> Json:
        return Json({"status": "ok", "model": service.model_name})

    @app.get("/metrics", tags=["server"])
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/hybrimoe/stats", tags=["server"])
    async def stats() -> Json:
        return Json(service.metrics.page_stats(service.model_name))


def _add_page(app: FastAPI) -> list[str]:
    """Serve the page's files, and return their paths."""
    folder = Path(str(resources.files("hybrimoe_kt.server") / "page"))
    files = {f"/{file.relative_to(folder).as_posix()}": file for file in folder.rglob("*") if file.is_file()}
    for path, file in files.items():
        app.add_api_route(path, _sender(file), include_in_schema=False)

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        """Browsers get the page, and programs what Ollama's clients look for."""
        if "text/html" in request.headers.get("accept", ""):
            return FileResponse(files["/index.html"], headers=_PAGE_HEADERS | _BY_ACCEPT)
        return PlainTextResponse("Ollama is running", headers=_BY_ACCEPT)

    return [*files, "/"]


def _sender(file: Path) -> Any:
    async def send() -> FileResponse:
        return FileResponse(file, headers=_PAGE_HEADERS, media_type=_MEDIA_TYPES[file.suffix])

    return send


async def _refused(request: Request, error: Any) -> Response:
    return error_response(request.url.path, error)


async def _http(request: Request, error: Any) -> Response:
    path = request.url.path
    if error.status_code == 404:
        shown = ApiError(404, _ABSENT.get(path, f"there is nothing at {path}"), code="not_found")
    elif error.status_code == 405:
        shown = ApiError(
            405, f"{path} does not take {request.method}", code="method_not_allowed", headers=error.headers
        )
    elif error.status_code == 400:
        shown = ApiError(400, "the request is not JSON in UTF-8", code="invalid_json")
    else:
        shown = ApiError(error.status_code, str(error.detail), headers=error.headers)
    return error_response(path, shown)


async def _invalid(request: Request, error: Any) -> Response:
    found = [{**one, "loc": one["loc"][1:]} for one in error.errors()]
    return error_response(request.url.path, invalid_request(found, error.body))


async def _failed(request: Request, error: Any) -> Response:
    logger.error("%s %r failed", request.method, request.url.path, exc_info=error)
    return error_response(request.url.path, as_api_error(error))
