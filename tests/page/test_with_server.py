"""The chat page and the real server with the embedded model, on an emulated accelerator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("hybrimoe_kt.server.run")

from hybrimoe_kt.engine.build import build_engine
from tests.server.serving import Serving, serving

SETTLE_S = 20


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Any:
    return build_engine(
        embedded_model, progress=False, option_overrides={"accelerator": "emulated", "cache_size": "25%"}
    )


@pytest.fixture(scope="module")
def running(engine: Any, browser: Any) -> Iterator[Serving]:
    with serving(engine) as found:
        yield found


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    context.set_default_timeout(60_000)
    made = context.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
    yield made
    context.close()
    assert problems == []


def send(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def done(page: Any, number: int = 0) -> Any:
    page.locator("article.model[aria-busy=false]").nth(number).wait_for()
    return page.locator("article.model").nth(number)


def test_the_page_shows_what_the_model_says(running: Serving, page: Any) -> None:
    page.goto(running.url)
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.keyboard.press("Escape")
    send(page, "Hello! How are you today?")
    wanted = running.ask("Hello! How are you today?", temperature=0).json()
    shown = done(page)
    assert " ".join(wanted["choices"][0]["message"]["content"].split()) in " ".join(shown.inner_text().split())
    assert f"{wanted['usage']['completion_tokens']} tokens" in shown.inner_text()
    assert "of experts at hand" in shown.inner_text()
    stats = running.http.get("/hybrimoe/stats").json()
    size = f"Map of {stats['num_layers']} layers by {stats['num_experts']} experts"
    assert page.locator("#heat").get_attribute("aria-label").startswith(size)
    send(page, "Tell me more.")
    assert done(page, 1).locator(".note").is_visible()


def test_stopping_stops_the_model(running: Serving, page: Any) -> None:
    page.goto(running.url)
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("2")  # so that it hardly ever ends by itself
    page.keyboard.press("Escape")
    send(page, "Tell me a long story.")
    page.locator("article.model .text p").first.wait_for()
    page.keyboard.press("Escape")
    assert "stopped" in done(page).inner_text() or "token" in done(page).inner_text()
    deadline = time.monotonic() + SETTLE_S
    while (queue := running.http.get("/hybrimoe/stats").json()["queue"])["active"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert queue["active"] == queue["waiting"] == 0


def test_a_key_is_asked_for(engine: Any, browser: Any, page: Any) -> None:
    with serving(engine, api_key="sesame") as closed:
        page.goto(closed.url)
        page.get_by_label("API key").fill("sesame")
        page.keyboard.press("Enter")
        page.get_by_text("emulated GPU").wait_for()
        send(page, "Hello!")
        assert done(page).locator(".note").is_visible()


def test_a_refusal_is_shown(running: Serving, page: Any) -> None:
    page.goto(running.url)
    send(page, "word " * 3000)
    assert "Start a new conversation" in page.get_by_role("alert").inner_text()
