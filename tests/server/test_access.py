"""Who may ask: the key, the origin of a web page, the name the server is called by; and the page itself."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

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
    page = echoing.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<html" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert echoing.http.head("/").status_code == 200
