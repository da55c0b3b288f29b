"""`ktransformers --port N`: from the command line to a server."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.sizes import parse_bytes

from .chat_output import visible
from .loading import open_engine, save_kept
from .server_options import API_KEY_VARIABLE

if TYPE_CHECKING:
    from hybrimoe_kt.server.settings import Settings

__all__ = ["run_server", "server_settings"]

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def run_server(options: argparse.Namespace, console: Console) -> int:
    """Load the model and serve it until a signal; return 0, or end the process with 1 where an answer was cut short."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"the server needs {missing[0]}, which is not installed: run pip install 'hybrimoe-kt[serve]', "
            f"or pip install '.[serve]' in a checkout"
        )
    settings = server_settings(options)
    if settings.api_key is None and settings.host not in ("127.0.0.1", "localhost", "::1"):
        console.print(
            f"warning: anyone who reaches {visible(settings.host)} can use this server; --api_key asks for a key",
            markup=False,
        )
    from hybrimoe_kt.server.origins import EVERY_PAGE
    from hybrimoe_kt.server.run import bind, serve

    if settings.api_key is None and (wide := [origin for origin in settings.origins if origin in EVERY_PAGE]):
        console.print(
            f"warning: with --cors_origin {wide[0]} any page that a browser here shows can use this server; --api_key "
            f"asks for a key",
            markup=False,
        )
    listener = bind(settings)
    engine = open_engine(options, console)

    def on_ready(url: str) -> None:
        console.print(
            f"serving at {url} (chat page), {url}/v1 (OpenAI), {url}/api (Ollama); Ctrl-C ends it", markup=False
        )

    if not serve(engine, settings, listener, on_ready=on_ready):
        if options.kept_path is not None:
            console.print("an answer was cut short, so conversations are not written", markup=False)
        _leave(1)
    save_kept(engine, options, console)
    return 0


def _leave(code: int) -> NoReturn:
    """End the process past the interpreter's own ending.

    A server cut short leaves a thread inside a backend's native code. When that thread comes back to an interpreter
    that has ended meanwhile, it is unwound through C++, which aborts (SIGABRT where the exit code should be).
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def server_settings(options: argparse.Namespace) -> Settings:
    """Return what the command line and the environment say; ConfigError where it cannot be used."""
    from hybrimoe_kt.server.settings import Settings

    given = {
        "host": options.host,
        "port": options.port,
        "model_name": options.model_name,
        "api_key": options.api_key if options.api_key is not None else os.environ.get(API_KEY_VARIABLE),
        "max_waiting": options.max_waiting,
        "max_per_client": options.max_per_client,
        "max_request_bytes": _size(options.max_request_size),
        "origins": tuple(map(_origin, options.cors_origin or ())),
        "shutdown_s": options.shutdown_s,
        "ssl_certfile": _readable("ssl_certfile", options.ssl_certfile),
        "ssl_keyfile": _readable("ssl_keyfile", options.ssl_keyfile),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    if given["api_key"] is not None and not given["api_key"].strip():
        raise ConfigError(f"the API key is empty; give --api_key or {API_KEY_VARIABLE} a text, or leave both out")
    if options.model_name is not None and not options.model_name.strip():
        raise ConfigError("--model_name is empty; give a name, or leave it out")
    if given["ssl_keyfile"] and not given["ssl_certfile"]:
        raise ConfigError("--ssl_keyfile needs --ssl_certfile")
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    num_bytes = parse_bytes(text)
    if not num_bytes:
        raise ConfigError(f"--max_request_size {text!r} is not understood: give bytes, such as 500KiB or 16MiB")
    return num_bytes


def _origin(text: str) -> str:
    from hybrimoe_kt.server.origins import parse_origin

    origin = parse_origin(text)
    if origin is None:
        raise ConfigError(
            f"--cors_origin {text!r} is not understood: give scheme and host, such as https://chat.example or "
            f"app://obsidian.md, a scheme such as chrome-extension://*, null, or * for any"
        )
    return origin


def _readable(flag: str, file: Path | None) -> str | None:
    if file is None:
        return None
    if not file.is_file() or not os.access(file, os.R_OK):
        raise ConfigError(f"--{flag} {file}: no such file, or it cannot be read")
    return str(file)
