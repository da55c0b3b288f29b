"""A server that answers the chat page as its script says: the page's files, OpenAI's stream, the statistics."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "hybrimoe_kt/server/page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CSP = "default-src 'self'; frame-ancestors 'none'"  # stricter than the real one, which allows inline styles

Writer = Callable[[Any], None]
Answer = Callable[[Writer], None]
"""Sends the pieces of one answer; what it sends is JSON for an event, or bytes as they are."""


def say(*pieces: str, finish: str = "stop") -> Answer:
    """The usual answer."""

    def answer(send: Writer) -> None:
        for piece in pieces:
            send({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        send({"choices": [{"delta": {}, "finish_reason": finish}]})
        send({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(pieces)}})
        send(b"data: [DONE]\n\n")

    return answer


@dataclass
class Refusal:
    """An error instead of an answer."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


class StubServer(ThreadingHTTPServer):
    """Listens on a free port; `answers` are given one after the other, then `say("fine")`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: deque[Answer | Refusal] = deque()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.api_key: str | None = None
        self.gone = threading.Event()
        """The page has hung up in the middle of an answer."""
        self.model = "stub-moe"
        self.accelerator = "emulated"
        self.num_answering = self.num_elsewhere = self.num_waiting = 0
        """Answers to this page, answers to others, and requests that wait."""
        self.parallel: int | None = None
        """How many answers may be written at once; None leaves it out, as a server that knows one at a time."""
        self.layers, self.experts = 4, 16
        self.num_polls = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that goes away is no error."""

    def stats(self) -> dict[str, Any]:
        """Every look while an answer runs counts one hit and one miss more in every layer, on a diagonal."""
        self.num_polls += self.num_answering > 0
        count = self.num_polls

        def rows(shift: int) -> Iterator[list[int]]:
            for layer in range(self.layers):
                yield [
                    len(range((at - shift - layer) % self.experts, count, self.experts)) for at in range(self.experts)
                ]

        queue = {"active": self.num_answering + self.num_elsewhere, "waiting": self.num_waiting, "limit": 64}
        last = [[count % self.experts]] * self.layers if count else []
        return {
            "model": self.model, "accelerator": self.accelerator,
            "num_layers": self.layers, "num_experts": self.experts, "tokens_per_s": 12.5,
            "hit_rate": 0.5 if count else 0.0, "bytes_moved": 3_400_000_000, "generated_tokens": count,
            "busy_share": {"cpu": 0.5, "gpu": 0.25, "link": 0.75},
            "queue": queue | ({} if self.parallel is None else {"parallel": self.parallel}),
            "heat": {"hits": list(rows(0)), "misses": list(rows(5))}, "last_token": {"hits": last, "misses": []},
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: StubServer

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _begin(self, status: int, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", CSP)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._begin(status, "application/json", headers)
        self.wfile.write(json.dumps(content).encode())

    def _refuse(self, refusal: Refusal) -> None:
        self._json(refusal.status, {"error": {"message": refusal.message, "code": refusal.code}}, refusal.headers)

    def _is_let_in(self) -> bool:
        key = self.server.api_key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._refuse(Refusal(401, "the API key is missing or wrong", "invalid_api_key"))
        return False

    def do_GET(self) -> None:
        if self.path == "/hybrimoe/stats":
            if self._is_let_in():
                self._json(200, self.server.stats())
            return
        file = PAGE / (self.path.partition("?")[0].lstrip("/") or "index.html")
        if not file.is_file():
            self._json(404, {"error": {"message": "nothing there"}})
            return
        self._begin(200, TYPES[file.suffix])
        self.wfile.write(file.read_bytes())

    def do_POST(self) -> None:
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_let_in():
            return
        server.keys.append(self.headers.get("Authorization"))
        server.asked.append(asked)
        answer = server.answers.popleft() if server.answers else say("fine")
        if isinstance(answer, Refusal):
            self._refuse(answer)
            return
        self._begin(200, "text/event-stream")
        server.num_answering += 1
        try:
            answer(self._send)
        except OSError:
            server.gone.set()
        finally:
            server.num_answering -= 1

    def _send(self, content: Any) -> None:
        self.wfile.write(content if isinstance(content, bytes) else f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()
