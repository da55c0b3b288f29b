"""What a server is told at its start."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of one server; everything a request may leave out gets its value from here."""

    host: str = "127.0.0.1"
    port: int = 10002
    """0 takes a free one."""
    model_name: str | None = None
    """What clients call the model; by default the name in its file."""
    api_key: str | None = field(default=None, repr=False)
    max_new_tokens: int | None = None
    """Longest answer a request can get, tokens; by default what is left of the context."""
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int | None = None
    max_waiting: int = 64
    """Requests that may wait for the one being answered; more are refused with 429."""
    max_per_client: int = 0
    """Requests of one client (a key, or an address) that may wait or be answered at once; 0: no limit of its own."""
    max_request_bytes: int = 0
    """Longest request body, bytes; 0 takes 1 MiB and 128 bytes for every token of the context."""
    origins: tuple[str, ...] = ()
    """Web pages of other origins whose scripts may use this server."""
    shutdown_s: float = 60.0
    """How long accepted requests may go on after SIGTERM, seconds."""
    request_s: float = 60.0
    """How long a client may take to send a request, seconds."""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
