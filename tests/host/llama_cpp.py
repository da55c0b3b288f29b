"""llama.cpp (the prebuilt xllamacpp) as an oracle: greedy tokens and the margin each was chosen by."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from gguf import GGUFReader  # not the package's own reader, which imports torch

__all__ = ["PRINTABLE", "LlamaCpp", "next_tokens_apart"]

_ROOT = Path(__file__).parents[2]
_ANSWER, _END = "ANSWER ", "END"
_LIMIT_S = 60.0
_SPARSE_BY_FLASH = {"minimax-m3"}
"""Families that llama.cpp lets attend to everything where it has no flash attention."""
PRINTABLE = range(32, 127)
_UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
"""Of vocabularies that begin with all bytes."""
_OTHERS = range(256, 300)
"""What follows the bytes in the tests' vocabularies, some of which end an answer."""
_UNSURE = [token for token in range(300) if token not in range(32, 94)]
"""What is no printable character where all bytes come first, or where the characters of byte-level BPE are sorted."""


class LlamaCpp:
    """One model, one thread, F32 KV cache, no flash attention but where it must be: as plain as arithmetic gets."""

    def __init__(self, path: Path, context: int = 512) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp (test extra) is not installed")
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.verbosity = str(path), -1
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = context, 1, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash = "ENABLED" if _architecture(path) in _SPARSE_BY_FLASH else "DISABLED"
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{flash}"]
        parameters.use_jinja = True
        self._server = xllamacpp.Server(parameters)
        self._client = httpx.Client(base_url=self._server.listening_address, timeout=60)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text as a prompt: with BOS, and with special tokens where they are written."""
        return list(self._post("/tokenize", content=text, add_special=True)["tokens"])

    def complete(self, prompt: str, num_tokens: int, biases: Mapping[int, float]) -> str:
        """The text after a prompt."""
        answer = self._post("/v1/completions", prompt=prompt, **_request(num_tokens, biases))
        return str(answer["choices"][0]["text"])

    def chat(self, messages: Sequence[Mapping[str, Any]], num_tokens: int, biases: Mapping[int, float]) -> Any:
        """The answer to a conversation, in OpenAI's shape."""
        return self._post("/v1/chat/completions", messages=messages, **_request(num_tokens, biases))

    def rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as the file's chat template writes it."""
        return str(self._post("/apply-template", messages=messages)["prompt"])

    def _post(self, path: str, **body: Any) -> Any:
        answer = self._client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """Tokens, and per token the log-probability by which it beat the second choice."""
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "n_probs": 2, "cache_prompt": False}
        )
        steps = answer["choices"][0]["logprobs"]["content"]
        margins = [step["top_logprobs"][0]["logprob"] - step["top_logprobs"][1]["logprob"] for step in steps]
        return [step["id"] for step in steps], margins

    def written(self, prompt: list[int], num_tokens: int) -> list[tuple[int, float]]:
        """Greedy tokens, printable characters alone, and the log-probability of each."""
        answer: dict[str, Any] = self._server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": num_tokens,
                "temperature": 0,
                "n_probs": 1,
                "cache_prompt": False,
                "ignore_eos": True,
                "logit_bias": [[token, -1000.0] for token in (*_UNPRINTABLE, *_OTHERS)],
            }
        )
        return [(step["id"], step["logprob"]) for step in answer["choices"][0]["logprobs"]["content"]]

    def next_token(self, prompt: list[int], unwanted: Sequence[int] = ()) -> dict[int, float]:
        """Log-probabilities of the likeliest next tokens; empty where the drawn one is no whole UTF-8 character.

        Tokens that are `unwanted` are not drawn; what the others are likely by does not change.
        """
        biases = [[token, -1000.0] for token in unwanted]
        answer: dict[str, Any] = self._server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": 1,
                "temperature": 0,
                "n_probs": 4,
                "cache_prompt": False,
                "logit_bias": biases,
            }
        )
        steps = (answer["choices"][0]["logprobs"] or {}).get("content")
        return {choice["id"]: choice["logprob"] for choice in steps[0]["top_logprobs"]} if steps else {}


def next_tokens_apart(path: Path, prompts: Sequence[list[int]]) -> list[dict[int, float]] | None:
    """Return each prompt's next token as `LlamaCpp.next_token` does, of a process that may abort over the file.

    Printable characters alone are drawn, so that none is empty; None where the file is refused, answers no numbers or
    does not answer within a minute.
    """
    answers = _Oracles.shared().ask(path, prompts)
    if not answers or any(value is None for answer in answers for value in answer.values()):
        return None
    return [{int(token): float(value) for token, value in answer.items()} for answer in answers]


def _request(num_tokens: int, biases: Mapping[int, float]) -> dict[str, Any]:
    return {"max_tokens": num_tokens, "temperature": 0, "logit_bias": [[token, bias] for token, bias in biases.items()]}


def _architecture(path: Path) -> str:
    return str(GGUFReader(str(path)).fields["general.architecture"].contents())


class _Oracles:
    """A process that forks one of its own for each file, so that imports are paid for once."""

    _shared: _Oracles | None = None

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=_ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    @classmethod
    def shared(cls) -> _Oracles:
        """This process's; it ends with its standard input, so with this process."""
        if cls._shared is None or cls._shared._process.poll() is not None:
            cls._shared = cls()
        return cls._shared

    def ask(self, path: Path, prompts: Sequence[list[int]]) -> list[dict[str, float | None]]:
        """What `_answer` printed, empty where it did not come to that."""
        given, printed = self._process.stdin, self._process.stdout
        assert given and printed
        given.write(json.dumps([str(path), prompts]) + "\n")
        given.flush()
        found: list[dict[str, float | None]] = []
        for line in printed:
            if line.startswith(_ANSWER):
                found = json.loads(line.removeprefix(_ANSWER))
            if line.rstrip() == _END:
                return found
        raise AssertionError(f"the process that starts llama.cpp ended with code {self._process.wait()}")


def _answer(job: str) -> None:
    file, texts = json.loads(job)
    oracle = LlamaCpp(Path(file), 256)
    print(_ANSWER + json.dumps([oracle.next_token(text, _UNSURE) for text in texts]), flush=True)


def _serve() -> None:
    """Answer each line of standard input in a process of its own, which may abort."""
    with contextlib.suppress(ImportError):
        import xllamacpp  # noqa: F401  # starts no thread yet
    for job in sys.stdin:
        child = os.fork()
        if not child:
            try:
                _answer(job)
            finally:
                os._exit(0)  # its threads need not end
        deadline = time.monotonic() + _LIMIT_S
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        print("\n" + _END, flush=True)


if __name__ == "__main__":
    _serve()
