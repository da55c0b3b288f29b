"""A real browser, shared by the tests of a module; each gets a server, a context and a page of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from .browser import HOW, find_browser
from .stub_server import StubServer


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Not for the whole session: while playwright runs, nothing else in this thread can start an event loop."""
    api = pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed; {HOW}")
    path = find_browser()
    if path is None:
        pytest.skip(f"no browser on this machine; {HOW}")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer()
    yield stub
    stub.shutdown()
    stub.server_close()


@dataclass
class Visit:
    """A page and what happened on it; tests end with `check`."""

    page: Any
    server: StubServer
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def open(self) -> Visit:
        self.page.goto(self.server.url)
        self.page.get_by_role("heading", name=self.server.model).wait_for()
        return self

    def send(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def answers(self) -> Any:
        return self.page.locator("article.model")

    def done(self, number: int = 0) -> Any:
        """Wait for an answer's end, and return it."""
        self.page.locator("article.model[aria-busy=false]").nth(number).wait_for()
        return self.answers().nth(number)


@pytest.fixture
def visit(browser: Any, server: StubServer) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(20_000)
    page = context.new_page()
    made = Visit(page, server)
    page.on("request", lambda request: made.requests.append(request.url))
    page.on("pageerror", lambda error: made.problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: made.problems.append(f"dialog: {dialog.message}") or dialog.dismiss())
    page.on("console", lambda line: made.problems.append(line.text) if _is_trouble(line) else None)
    yield made
    context.close()
    assert made.problems == []
    assert [url for url in made.requests if not url.startswith(server.url)] == []


def _is_trouble(line: Any) -> bool:
    """Errors the browser itself reports, but for the failed requests and the looks at pixels that tests ask for."""
    expected = ("Failed to load resource", "Canvas2D: Multiple readback")
    return line.type in ("error", "warning") and not line.text.startswith(expected)
