"""Coding agents themselves, which `make agents` fetches: they use a tool, and send again what they have sent before."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrimoe_kt.engine.memory.conversation import common_length

from .scripted import ScriptedEngine
from .serving import Serving, serving

BINARIES = Path(__file__).parents[2] / ".cache" / "agents" / "node_modules" / ".bin"
CALLS = {
    "exec_command": {"cmd": "cat note.txt"},
    "shell_command": {"command": "cat note.txt"},
    "Read": {"file_path": "{folder}/note.txt"},
}
"""Of the tools by which the two read files, the first that an agent has."""


def agent(name: str) -> str:
    path = BINARIES / name
    if not path.exists():
        pytest.skip(f"no {name} in {BINARIES}; run make agents")
    return str(path)


def scripted(folder: Path) -> ScriptedEngine:
    """Reads note.txt with whatever tool there is, and says what stands there."""

    def script(prompt: str) -> str:
        asked = prompt.rfind("<|im_start|>user")
        found = re.search(r"MARK-\d+", prompt[asked:])
        if found:
            return f"It says {found[0]}."
        name = next(name for name in CALLS if f'"name": "{name}"' in prompt)
        arguments = {key: text.format(folder=folder) for key, text in CALLS[name].items()}
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    return ScriptedEngine(script, context_tokens=10**6)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "note.txt").write_text("the word is MARK-42\n")
    with serving(scripted(tmp_path / "work")) as running:
        yield running


def told(server: Serving, tmp_path: Path, command: list[str], **environment: str) -> list[str]:
    """What the agent printed last, and the prompts that it has sent."""
    own = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], **environment}
    ran = subprocess.run(
        command, cwd=tmp_path / "work", env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    prompts: list[str] = server.service.engine.prompts  # type: ignore[attr-defined]
    assert ran.stdout.strip().splitlines()[-1] == "It says MARK-42."
    assert len(prompts) >= 2 and prompts[-1].startswith(prompts[-2]), "a kept conversation is gone on from"
    return prompts


def shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return common_length(list(map(ord, one)), list(map(ord, other)))


@pytest.mark.slow
def test_codex_uses_its_tool(server: Serving, tmp_path: Path) -> None:
    """With the configuration of docs/server.md, but for the context: here a byte is a token."""
    (tmp_path / "codex").mkdir()
    (tmp_path / "codex" / "config.toml").write_text(
        f"""
        model = "scripted"
        model_provider = "hybrimoe"
        model_context_window = 1000000
        approval_policy = "never"
        [model_providers.hybrimoe]
        name = "hybrimoe_kt"
        base_url = "{server.url}/v1"
        wire_api = "responses"
        """
    )
    command = [agent("codex"), "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", "Read note.txt"]
    first = list(told(server, tmp_path, command, CODEX_HOME=str(tmp_path / "codex")))
    again = told(server, tmp_path, command, CODEX_HOME=str(tmp_path / "codex"))
    assert shared(first[0], again[len(first)]) > 0.9 * len(first[0]), "another session, too"


@pytest.mark.slow
def test_claude_code_uses_its_tool(server: Serving, tmp_path: Path) -> None:
    """With the environment of docs/server.md."""
    environment = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "scripted",
        "ANTHROPIC_DEFAULT_OPUS_MODEL": "scripted",
        "ANTHROPIC_DEFAULT_SONNET_MODEL": "scripted",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "scripted",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CONFIG_DIR": str(tmp_path / "claude"),
    }
    command = [agent("claude"), "-p", "Read note.txt", "--allowedTools", "Read"]
    first = list(told(server, tmp_path, command, **environment))
    again = told(server, tmp_path, command, **environment)
    assert shared(first[0], again[len(first)]) > 0.9 * len(first[0]), "another session, too"
