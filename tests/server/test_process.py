"""`ktransformers --port` as a user runs it: signals, ports, keys and mistakes."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hybrimoe_kt.cli.main import main
from hybrimoe_kt.cli.options import parse
from hybrimoe_kt.cli.serve import server_settings

from .serving import ServerProcess, eventually

STORY = {"messages": [{"role": "user", "content": "Tell me a long story."}], "temperature": 0, "stream": True,
         "logit_bias": {}}  # fmt: skip


@pytest.fixture(scope="module")
def endless() -> dict[str, object]:
    """A request whose answer goes on to the end of the context: the end token is forbidden."""
    from hybrimoe_kt.models import embedded_model
    from hybrimoe_kt.weights.gguf_file import GgufFile

    metadata = GgufFile(embedded_model()).metadata
    ends = {int(metadata[f"tokenizer.ggml.{name}_token_id"]) for name in ("eos", "bos")}
    return STORY | {"logit_bias": {str(end): -100 for end in ends}}


@contextlib.contextmanager
def waiting_behind(
    server: ServerProcess, asked: dict[str, object], headers: dict[str, str] | None = None
) -> Iterator[list[httpx.Response]]:
    """Three more answers in the queue: one alone, of at most a thousand tokens, may be over before it is looked at."""
    with contextlib.ExitStack() as streams, httpx.Client(base_url=server.url, headers=headers, timeout=180) as http:
        yield [streams.enter_context(http.stream("POST", "/v1/chat/completions", json=asked)) for _ in range(3)]


def test_one_server_from_its_start_to_its_end(endless: dict[str, object]) -> None:
    """Killed clients free their place; SIGTERM lets what runs end, refuses what is new, and ends with code 0."""
    with ServerProcess("--model-name", "mine", HYBRIMOE_API_KEY="secret") as server:
        headers = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=180) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "mine"
            assert httpx.get(f"{server.url}/v1/models").status_code == 401

            code = f"""
                import httpx
                asked = httpx.stream("POST", "{server.url}/v1/chat/completions", json={endless!r}, headers={headers!r},
                                     timeout=180)
                with asked as answer:
                    for line in answer.iter_lines():
                        print(line, flush=True)
            """
            victim = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
            assert victim.stdout is not None
            assert victim.stdout.readline().startswith("data: ")
            victim.send_signal(signal.SIGKILL)
            victim.wait(60)

            def active() -> int:
                return int(http.get("/hybrimoe/stats").json()["queue"]["active"])

            assert eventually(lambda: active() == 0, 60)
            told = http.get("/metrics").text
            assert re.search(r'hybrimoe_answers_total\{finish="cancelled"\} 1.0', told)

            lines: list[str] = []
            begun = threading.Event()

            def listen() -> None:
                asked = endless | {"max_tokens": 150}
                with httpx.stream(
                    "POST", f"{server.url}/v1/chat/completions", json=asked, headers=headers, timeout=180
                ) as answer:
                    for line in answer.iter_lines():
                        lines.append(line)
                        begun.set()

            listener = threading.Thread(target=listen)
            listener.start()
            assert begun.wait(60)
            with waiting_behind(server, endless | {"max_tokens": 150}, headers) as others:
                server.process.send_signal(signal.SIGTERM)
                assert eventually(lambda: http.get("/health").status_code == 503, 60)
                assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
                listener.join(60)
                for other in others:
                    assert list(other.iter_lines())[-2] == "data: [DONE]"
            assert sum('"content"' in line for line in lines) > 50
            assert '"finish_reason":"length"' in lines[-4]
            assert lines[-2] == "data: [DONE]"
        assert server.process.wait(60) == 0
        assert not any("Traceback" in line for line in server.log)


def test_the_second_signal_ends_at_once(endless: dict[str, object]) -> None:
    with (
        ServerProcess() as server,
        httpx.Client(base_url=server.url, timeout=180) as http,
        http.stream("POST", "/v1/chat/completions", json=endless) as answer,
        waiting_behind(server, endless),
    ):
        next(answer.iter_lines())
        server.process.send_signal(signal.SIGINT)
        assert eventually(lambda: http.get("/health").status_code == 503, 60)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 1


def test_a_restarted_server_reads_nothing_twice(tmp_path: Path) -> None:
    """Where it ended in order; one that was killed has written nothing, and starts as if it had never been."""
    asked = {"messages": [{"role": "user", "content": "Tell me a long story."}], "temperature": 0, "max_tokens": 8}
    said, cached = [], []
    for ends in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        with ServerProcess("--kept_path", tmp_path) as server:
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=180).json()
            said.append(answer["choices"][0]["message"]["content"])
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            server.process.send_signal(ends)
            assert server.process.wait(60) == (0 if ends == signal.SIGTERM else -signal.SIGKILL)
        assert len(list(tmp_path.glob("*/*"))) == 1
        asked["messages"] += [{"role": "assistant", "content": said[-1]}, {"role": "user", "content": "And then?"}]  # type: ignore[operator]
        if ends == signal.SIGKILL:
            del asked["messages"][-2:]  # type: ignore[attr-defined]
    assert cached[0] == 0 < cached[1] == cached[2]
    assert said[1] == said[2]


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with exit code 2 before it loads anything; return its last line."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith("ktransformers: error: ")
    return printed[-1]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--port", "70000"], "'70000' is not a whole number from 0 to 65535"),
        (["--port", "ten"], "'ten' is not a whole number"),
        (["--port", "1", "--prompt", "hi"], "--prompt is not for a server"),
        (["--port", "0", "--host", "no such host"], "cannot listen on no such host port 0"),
        (["--port", "0", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--port", "0", "--api_key", " "], "the API key is empty"),
        (["--port", "0", "--model_name", ""], "--model_name is empty"),
        (["--port", "0", "--max_request_size", "lots"], "'lots' is not understood"),
        (["--port", "0", "--cors_origin", "chat.example"], "give scheme and host"),
        (["--port", "0", "--ssl_keyfile", "/dev/null"], "--ssl_keyfile /dev/null"),
        (["--port", "0", "--ssl_certfile", "/no/such.pem"], "--ssl_certfile /no/such.pem: no such file"),
        (["--port", "0", "--gguf_path", "/no/such.gguf"], "/no/such.gguf: no such file"),
        (["--port", "0", "--hots", "x"], "did you mean '--host'"),
        (["--port", "0", "--accelerator", "emulatd"], "did you mean 'emulated'"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wanted in failure(capsys, *arguments)


@pytest.mark.parametrize(("origin", "is_wide"), [("*", True), ("null", True), ("https://*", True), ("app://*", False)])
def test_letting_every_page_in_without_a_key_is_warned_of(
    origin: str, is_wide: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--port", "0", f"--cors_origin={origin}", "--gguf_path", "/no/such.gguf"]
    for more, is_warned in (([], is_wide), (["--api_key", "k"], False)):
        assert main([*arguments, *more]) == 2
        assert ("any page that a browser here shows" in " ".join(capsys.readouterr().err.split())) == is_warned


def test_a_port_in_use_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in failure(capsys, "--port", port)


def test_without_the_extra_the_command_to_install_it_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "uvicorn" else find(name))
    said = failure(capsys, "--port", "0")
    assert "needs uvicorn" in said
    assert "pip install 'hybrimoe-kt[serve]'" in said


def test_flags_of_both_spellings_reach_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIMOE_API_KEY", "from outside")
    settings = server_settings(parse(["--host", "::1", "--max-waiting", "3", "--max_request_size", "2MiB"]))
    assert (settings.host, settings.port, settings.api_key) == ("::1", 10002, "from outside")
    assert (settings.max_waiting, settings.max_request_bytes, settings.max_new_tokens) == (3, 2**21, None)
    given = [
        "--port=1",
        "--api-key",
        "k",
        "--cors-origin",
        "http://a",
        "--cors_origin=http://b",
        "--max-new-tokens",
        "7",
    ]
    settings = server_settings(parse(given))
    assert (settings.api_key, settings.origins, settings.max_new_tokens) == ("k", ("http://a", "http://b"), 7)
    plain = parse(["--model_name", "x", "--api_key", "k"])
    assert plain.without_effect == ["model_name", "api_key"]
    assert plain.max_new_tokens == 256
