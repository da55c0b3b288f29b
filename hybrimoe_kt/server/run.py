"""From a loaded model to a server that listens, until a signal ends it."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from hybrimoe_kt.errors import ConfigError

from .app import make_app
from .engine import Engine
from .service import Service
from .settings import Settings

__all__ = ["Server", "address_of", "bind", "serve"]

logger = logging.getLogger(__name__)


def bind(settings: Settings) -> socket.socket:
    """Take the address, before anything is loaded; ConfigError when it cannot be had. Nobody can connect yet."""
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would let two servers take one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}; give another") from None
    return listener


def serve(
    engine: Engine, settings: Settings, listener: socket.socket, *, on_ready: Callable[[str], None] = lambda url: None
) -> bool:
    """Answer requests until SIGTERM or SIGINT; return whether everything accepted was answered.

    The first signal lets what was accepted end, within `settings.shutdown_s`; the second cuts it short.
    `on_ready` gets the server's address once it answers.
    """
    server = Server(Service(engine, settings), lambda: on_ready(address_of(settings, listener)))
    server.run(sockets=[listener])
    return server.has_answered_all


class Server(uvicorn.Server):
    """Uvicorn's server, which on a signal refuses what is new, and ends when what was accepted has ended."""

    def __init__(self, service: Service, on_ready: Callable[[], None] = lambda: None) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_config=None,
                access_log=logger.isEnabledFor(logging.INFO),
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
            )
        )
        self._service, self._on_ready = service, on_ready
        self._num_signals = 0
        self.has_answered_all = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.queue.start()
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._service.is_shutting_down = True
            threading.Thread(target=self.drain, name="shutdown", daemon=True).start()
        else:
            self.has_answered_all = False
            self.should_exit = self.force_exit = True

    def drain(self) -> None:
        """Refuse what is new, wait for what was accepted, and end; blocks."""
        self._service.is_shutting_down = True
        if not self._service.queue.close(self._service.settings.shutdown_s):
            self.has_answered_all = False
        self.should_exit = True


def address_of(settings: Settings, listener: socket.socket) -> str:
    """Return where the server is to be found."""
    scheme = "https" if settings.ssl_certfile else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
