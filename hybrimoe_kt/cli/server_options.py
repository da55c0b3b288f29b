"""The flags of `ktransformers` that only a server has."""

from __future__ import annotations

import argparse
from pathlib import Path

from .terminal import number, whole

__all__ = ["API_KEY_VARIABLE", "DEFAULT_PARALLEL", "add_server_flags", "settle_server"]

API_KEY_VARIABLE = "HYBRIMOE_API_KEY"

DEFAULT_PARALLEL = 4
"""Answers at once: agents seldom ask for more, and each one more makes all others slower. A choice."""

# What only the server does, and what only an answer in the terminal has.
_SERVER_ONLY = (
    "model_name", "api_key", "parallel", "max_waiting", "max_per_client", "max_request_size", "cors_origin",
    "shutdown_s", "ssl_certfile",
    "ssl_keyfile",
)  # fmt: skip
_TERMINAL_ONLY = ("prompt", "prompt_file", "stats_json", "timeline")


def add_server_flags(server: argparse._ArgumentGroup) -> None:
    """Add them to a group of the parser."""
    server.add_argument("--port", type=whole(0, 65535), metavar="N", help="default 10002; 0: any that is free")
    server.add_argument("--host", metavar="ADDRESS", help="default 127.0.0.1: this machine only; 0.0.0.0: any")
    server.add_argument("--model_name", metavar="NAME", help="what clients call the model; default: its own name")
    server.add_argument(
        "--api_key", metavar="KEY", help=f"what clients must send; others see it here, not in ${API_KEY_VARIABLE}"
    )
    server.add_argument(
        "--parallel", type=whole(1, 64), metavar="N",
        help=f"answers at once, default {DEFAULT_PARALLEL}; they share the context's memory on a GPU",
    )  # fmt: skip
    server.add_argument(
        "--max_per_client", type=whole(0), metavar="N",
        help="requests of one address that may wait or be answered; default 0: no limit of its own",
    )  # fmt: skip
    server.add_argument(
        "--max_waiting", type=whole(0), metavar="N", help="requests that may wait, default 64; more get 429"
    )
    server.add_argument(
        "--max_request_size", metavar="SIZE", help="longest request (16MiB); default: what the context may need"
    )
    server.add_argument(
        "--cors_origin", action="append", metavar="ORIGIN", help="page or app that may use the server; repeatable"
    )
    server.add_argument(
        "--shutdown_s", type=number(0, 86400), metavar="S", help="how long answers may go on after SIGTERM, default 60"
    )
    server.add_argument("--ssl_certfile", type=Path, metavar="FILE", help="serve https with this certificate")
    server.add_argument("--ssl_keyfile", type=Path, metavar="FILE", help="and this key")


def settle_server(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Set `is_server`; exits when flags contradict each other, and notes those without effect."""
    options.is_server = options.port is not None or options.host is not None
    if options.is_server:
        if clash := [flag for flag in _TERMINAL_ONLY if getattr(options, flag) is not None]:
            parser.error(f"--{clash[0]} is not for a server; leave out --port and --host, or it")
    else:
        options.without_effect += [flag for flag in _SERVER_ONLY if getattr(options, flag) is not None]
