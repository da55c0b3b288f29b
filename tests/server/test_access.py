"""Who may ask: the key, the origin of a web page, the name the server is called by; and the page itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import openai
import pytest

from hybrimoe_kt.cli.options import parse
from hybrimoe_kt.cli.serve import server_settings
from hybrimoe_kt.server.origins import parse_origin

from .scripted import ScriptedEngine
from .serving import Serving, serving
from .test_refusals import shape

OPEN = ("/", "/index.html", "/health")
CLOSED = ("/v1/models", "/metrics", "/hybrimoe/stats", "/api/tags", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def locked() -> Iterator[Serving]:
    with serving(ScriptedEngine(), api_key="sésame") as running:
        yield running


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Bearer s\u00e9same", "Basic x", "s\u00e9same"])
def test_without_the_key_only_the_page_and_health_answer(locked: Serving, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in OPEN:
        assert locked.http.get(path, headers=headers).status_code == 200
    for path in CLOSED:
        answer = locked.http.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        if path.startswith("/api/"):
            assert "API key" in answer.json()["error"]
        else:
            assert shape(answer)["code"] == "invalid_api_key"


def test_with_the_key_everything_answers(locked: Serving) -> None:
    headers = {"Authorization": "Bearer sésame".encode()}
    for path in (*OPEN, *CLOSED[:-1]):
        assert locked.http.get(path, headers=headers).status_code == 200
    assert locked.http.get("/nothing", headers=headers).status_code == 404


def test_openais_client_sends_the_key_it_is_given() -> None:
    with serving(ScriptedEngine(), api_key="secret") as running:
        for key in ("secret", "wrong"):
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0) as client:
                if key == "secret":
                    assert client.models.list().data[0].id == "scripted"
                else:
                    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                        client.models.list()


def test_web_pages_of_other_origins_are_refused(echoing: Serving) -> None:
    foreign = {"Origin": "http://evil.example"}
    for path in ("/v1/models", "/"):
        assert echoing.http.get(path, headers=foreign).status_code == 403
    answer = echoing.http.post("/v1/completions", content=b'{"prompt":"x"}', headers=foreign)
    assert answer.status_code == 403
    assert shape(answer)["code"] == "foreign_origin"
    assert echoing.http.get("/v1/models", headers={"Origin": "null"}).status_code == 403
    assert echoing.http.get("/v1/models", headers={"Origin": echoing.url}).status_code == 200


def test_an_origin_that_is_allowed_gets_what_a_browser_asks_for() -> None:
    origin = "https://chat.example"
    with serving(ScriptedEngine(), origins=(origin,), api_key="k") as running:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
        preflight = running.http.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        answer = running.http.get("/v1/models", headers={"Origin": origin, "Authorization": "Bearer k"})
        assert answer.headers["access-control-allow-origin"] == origin
        without_the_key = running.http.get("/v1/models", headers={"Origin": origin})
        assert without_the_key.status_code == 401
        assert without_the_key.headers["access-control-allow-origin"] == origin
        behind_a_proxy = {"Host": "chat.example", "Origin": origin}
        assert running.http.get("/health", headers=behind_a_proxy).status_code == 200
        refused = running.http.get("/v1/models", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_a_loopback_server_is_called_by_its_own_name(echoing: Serving) -> None:
    for name, status in (
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("[", 403),
    ):
        assert echoing.http.get("/health", headers={"Host": name}).status_code == status, name
    with serving(ScriptedEngine(), host="0.0.0.0") as running:
        url = running.url.replace("0.0.0.0", "127.0.0.1")
        assert running.http.get(f"{url}/health", headers={"Host": "box.example"}).status_code == 200


def test_the_page_is_served_and_nothing_foreign_runs_in_it(echoing: Serving) -> None:
    page = echoing.http.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert "<html" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert echoing.http.get("/index.html").text == page.text


def test_files_of_the_page_are_what_they_are_on_any_system(echoing: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' registry may have another type for a suffix, and `nosniff` makes browsers believe it."""
    monkeypatch.setattr("starlette.responses.guess_type", lambda *_: ("text/plain", None))
    sources = re.findall(r'(?:src|href)="/?([\w./-]+\.(?:js|css|svg))"', echoing.http.get("/index.html").text)
    types = {source.rpartition(".")[2]: echoing.http.get(f"/{source}").headers["content-type"] for source in sources}
    assert types["js"].startswith("text/javascript") and types["css"].startswith("text/css")


def test_programs_see_that_it_runs_as_ollama_does(echoing: Serving) -> None:
    for accept in ("*/*", "application/json", ""):
        answer = echoing.http.get("/", headers={"Accept": accept})
        assert answer.text == "Ollama is running"
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.headers["vary"] == "Accept"


@pytest.mark.parametrize("path", [*OPEN, *CLOSED, "/v1/models/scripted", "/api/version", "/api/ps", "/app.js"])
def test_head_answers_like_get(echoing: Serving, path: str) -> None:
    told, answer = echoing.http.head(path), echoing.http.get(path)
    assert told.status_code == answer.status_code
    assert told.content == b""
    assert told.headers["content-type"] == answer.headers["content-type"]
    if path not in ("/metrics", "/hybrimoe/stats"):
        assert told.headers["content-length"] == str(len(answer.content))


def test_head_needs_the_key_and_a_place_that_get_knows(locked: Serving) -> None:
    assert locked.http.head("/api/tags").status_code == 401
    answer = locked.http.head("/v1/chat/completions", headers={"Authorization": "Bearer sésame".encode()})
    assert answer.status_code == 405


APPS = ("app://obsidian.md", "chrome-extension://abcdefghijklmnop", "moz-extension://1-2", "tauri://localhost",
        "capacitor://localhost", "vscode-webview://1a2b", "file://", "null", "https://chat.example",
        "http://localhost:3000", "http://evil.example:8080")  # fmt: skip


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ((), ()),
        (("app://obsidian.md",), APPS[:1]),
        (("chrome-extension://abcdefghijklmnop/",), APPS[1:2]),
        (("chrome-extension://another",), ()),
        (("app://*", "chrome-extension://*", "moz-extension://"), APPS[:3]),
        (("TAURI://LocalHost", "capacitor://", "vscode-webview://*"), APPS[3:6]),
        (("file://",), APPS[6:8]),
        (("null",), APPS[7:8]),
        (("https://chat.example:443",), APPS[8:9]),
        (("https://chat.example:8443",), ()),
        (("http://localhost:*",), APPS[9:10]),
        (("http://*",), APPS[9:]),
        (("*",), APPS),
    ],
    ids=" ".join,
)
def test_apps_and_extensions_are_let_in_by_their_origin(given: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    settings = server_settings(parse(["--port", "0", *(f"--cors_origin={origin}" for origin in given)]))
    with serving(ScriptedEngine(), origins=settings.origins) as running:
        for origin in APPS:
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            preflight = running.http.options("/api/chat", headers=asked)
            answer = running.http.post("/api/chat", content=b'{"model": "scripted"}', headers={"Origin": origin})
            assert answer.status_code == (200 if origin in allowed else 403), origin
            for response in (preflight, answer):
                shown = response.headers.get("access-control-allow-origin")
                assert shown == (origin if origin in allowed else None)
            if origin not in allowed:
                assert origin in shape_of_ollama(answer)


def shape_of_ollama(answer: httpx.Response) -> str:
    assert answer.json().keys() == {"error"}
    return str(answer.json()["error"])


@pytest.mark.parametrize(
    "text", ["", "chat.example", "https://", "https://a b", "https://u@h", "https://h/path", "app://a/b", "://x",
             "file:///home/x", "http://*.example", "app://obsidian.md?x", "https://h:port", "*://h"],
)  # fmt: skip
def test_what_is_no_origin_is_refused(text: str) -> None:
    assert parse_origin(text) is None


def test_an_apps_name_is_no_name_of_the_server() -> None:
    """Or a page of that name would pass for the server's own."""
    with serving(ScriptedEngine(), origins=("app://obsidian.md", "*", "http://*")) as running:
        for name in ("obsidian.md", "evil.example", "*"):
            assert running.http.get("/health", headers={"Host": name}).status_code == 403
    with serving(ScriptedEngine()) as running:
        own = running.url.removeprefix("http://")
        for origin in (f"app://{own}", f"chrome-extension://{own}"):
            assert running.http.get("/health", headers={"Origin": origin}).status_code == 403
