"""The chat loop with engines that only pretend; one test runs it in a real pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from hybrimoe_kt.cli.chat import run_chat
from hybrimoe_kt.cli.chat_input import MessagePrompt, is_complete, message_of
from hybrimoe_kt.cli.chat_output import StreamPrinter, flatten, short, summary_line, visible
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.errors import CapacityError, KernelError

RUN = {
    "prompt_tokens": 12,
    "new_tokens": 34,
    "prefill_tokens_per_s": 56.78,
    "decode_tokens_per_s": 9.87,
    "hit_rate": 0.714,
    "experts_on_cpu": 123456,
    "experts_on_gpu": 789,
    "transfers": 18,
}
OPTIONS = SimpleNamespace(max_new_tokens=64, temperature=0.5, top_p=0.9, seed=3)


class Parrot:
    """Repeats the last message word by word; some messages make it misbehave."""

    model_name = "parrot [bold]1B"

    def __init__(self):
        self.heard: list[list[str]] = []
        self.asked: list[dict] = []

    def stream(self, messages, *, stop, **how):
        self.heard.append([f"{message['role'][0]}:{message['content']}" for message in messages])
        self.asked.append(how)
        text = messages[-1]["content"]
        if text == "too long":
            raise CapacityError("the conversation has 9 tokens, the context holds 8")
        if text == "too long later":
            yield "so far"
            raise CapacityError("the context is full; use /reset")
        if text == "broken":
            raise KernelError("NaN in layer 3")
        for number, word in enumerate(text.split()):
            if text.startswith("stop") and number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            if stop.is_set():
                return
            yield word + " "

    def last_run(self):
        return RUN

    def statistics(self):
        return {"model": "parrot", "cache": {"hits": 5, "hit_rate": 0.123456}}


class Typed:
    """A user who types the given messages and then presses Ctrl-D; an exception stands for a key."""

    def __init__(self, *messages):
        self.messages = list(messages)

    def read(self):
        if not self.messages:
            raise EOFError
        message = self.messages.pop(0)
        if isinstance(message, type):
            raise message
        return message


def chat(*messages, engine=None, width=80):
    engine = engine or Parrot()
    console = Console(file=io.StringIO(), width=width, highlight=False)
    assert run_chat(engine, OPTIONS, console, messages=Typed(*messages)) == 0
    return engine, console.file.getvalue()


def test_conversation_grows_and_options_reach_the_engine():
    engine, shown = chat("hello", "and now")
    assert engine.heard == [["u:hello"], ["u:hello", "a:hello ", "u:and now"]]
    sampling = Sampling(max_new_tokens=64, temperature=0.5, top_p=0.9, seed=3)
    assert engine.asked[0] == {"sampling": sampling, "as_written": True}
    assert "parrot [bold]1B: type a message" in shown
    assert "12 in at 56.8/s · 34 out at 9.9/s · experts 123.5k CPU 789 GPU · 71% hits" in shown


def test_reset_forgets_and_exit_leaves():
    engine, shown = chat("one", "/reset", "two", "/exit", "three")
    assert engine.heard == [["u:one"], ["u:two"]]
    assert "new conversation" in shown


def test_commands():
    engine, shown = chat("/help", "/rest", "/zzzzzz", "/STATS", "/", "", "/etc/passwd is a file")
    assert "/reset   start a new conversation" in shown
    assert "unknown command /rest, did you mean '/reset'?" in shown
    assert "unknown command /zzzzzz; /help lists" in shown
    assert re.search(r"cache\.hit_rate +0\.1235", shown)
    assert re.search(r"decode_tokens_per_s +9\.87", shown)
    assert engine.heard == [["u:/etc/passwd is a file"]]
    assert max(map(len, shown.splitlines())) <= 80


def test_interrupt_stops_the_answer_and_keeps_what_was_said():
    before = signal.getsignal(signal.SIGINT)
    engine, shown = chat("stop at the third word", "go on")
    assert engine.heard[1] == ["u:stop at the third word", "a:stop at ", "u:go on"]
    assert "stopped" in shown
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_before_the_first_word_forgets_the_message():
    class Slow(Parrot):
        def stream(self, messages, *, stop, **how):
            if messages[-1]["content"] == "first":
                os.kill(os.getpid(), signal.SIGINT)
                return iter(())
            return super().stream(messages, stop=stop, **how)

    engine, shown = chat("first", "second", engine=Slow())
    assert engine.heard == [["u:second"]]
    assert "stopped before the first word" in shown


def test_third_interrupt_leaves_when_the_engine_does_not_listen(capfd):
    class Deaf(Parrot):
        def stream(self, messages, **how):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                yield "la "

    console = Console(file=io.StringIO(), width=80)
    assert run_chat(Deaf(), OPTIONS, console, messages=Typed("sing")) == 130
    assert "Ctrl-C once more leaves" in capfd.readouterr().err


def test_interrupt_at_the_prompt_is_a_hint():
    engine, shown = chat(KeyboardInterrupt, "hello")
    assert "Ctrl-D or /exit leaves" in shown
    assert engine.heard == [["u:hello"]]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("too long", "the context holds 8; /reset starts a new conversation\n"),
        ("too long later", "so far\nthe context is full; use /reset\n"),
        ("broken", "NaN in layer 3 (this message is forgotten)"),
    ],
)
def test_failed_turn_is_one_sentence_and_forgotten(message, sentence):
    engine, shown = chat("hello", message, "again", width=200)
    assert sentence in shown
    assert engine.heard[2] == ["u:hello", "a:hello ", "u:again"]
    assert "Traceback" not in shown


def test_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(chat("hello")[0].heard))
    thread.start()
    thread.join()
    assert results == [[["u:hello"]]]


# ---------------------------------------------------------------- typing


@pytest.mark.parametrize(
    ("text", "complete", "message"),
    [
        ("hello", True, "hello"),
        ("hello\\", False, "hello"),
        ("a \\\nb\\\nc", True, "a \nb\nc"),
        ('"""a', False, "a"),
        ('"""\na\n\n b\\\n"""', True, "a\n\n b\\"),
        ('"""a""" and this', True, "a\nand this"),
        ('say """x', True, 'say """x'),
        ("  ", True, ""),
    ],
)
def test_several_lines(text, complete, message):
    assert is_complete(text) == complete
    assert message_of(text) == message


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("hi\r", ["hi"]),
        ("a\\\rb\r", ["a\nb"]),
        ('"""a\r\rb"""\r', ["a\n\nb"]),
        ("\x1b[200~p\nq\x1b[201~\r", ["p\nq"]),
        ("gone\x03kept\r", ["kept"]),
        ("\x03hi\r", [KeyboardInterrupt, "hi"]),
        ("hi\r\x04", ["hi", EOFError]),
        ("h\udcff\r", ["h\ufffd"]),
    ],
    ids=["line", "backslash", "quotes", "paste", "clear", "interrupt", "end", "ascii terminal"],
)
def test_keys(keys, expected):
    with create_pipe_input() as pipe:
        prompt = MessagePrompt(input=pipe, output=DummyOutput())
        pipe.send_bytes(keys.encode("utf-8", "surrogateescape"))
        for outcome in expected:
            if isinstance(outcome, str):
                assert prompt.read() == outcome
            else:
                with pytest.raises(outcome):
                    prompt.read()


def test_up_walks_through_earlier_messages():
    with create_pipe_input() as pipe:
        prompt = MessagePrompt(input=pipe, output=DummyOutput())
        for keys, expected in (("one\r", "one"), ("two\\\rthree\r", "two\nthree")):
            pipe.send_text(keys)
            assert prompt.read() == expected
        threading.Timer(0.5, pipe.send_text, ["\x1b[A" * 3 + "\r"]).start()  # the editor reads its history first
        assert prompt.read() == "one"


# ---------------------------------------------------------------- showing


def screen(written: str) -> str:
    """Apply what the printer may send: cursor left, erase to the end of the line."""
    lines = [""]
    for text, left in re.findall(r"([^\x1b]+)|\x1b\[(\d+)D\x1b\[K", written):
        if left:
            lines[-1] = lines[-1][: -int(left)]
        else:
            first, *rest = text.split("\n")
            lines[-1] += first
            lines += rest
    return "\n".join(lines)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_words_move_to_the_next_line(size):
    text = "the quick brown fox jumps over an exceptionallylongword\n\n  and 日本語の文 stays"
    out = io.StringIO()
    printer = StreamPrinter(out.write, 20)
    for at in range(0, len(text), size):
        printer.feed(text[at : at + size])
    printer.end_line()
    shown = screen(out.getvalue())
    assert shown == ("the quick brown fox\njumps over an \nexceptionallylongwo\nrd\n\n  and 日本語の文 \nstays\n"), (
        shown
    )
    assert "".join(shown.split()) == "".join(text.split())


def test_without_a_terminal_lines_are_left_alone():
    out = io.StringIO()
    printer = StreamPrinter(out.write, None)
    printer.feed("word " * 40)
    assert out.getvalue() == "word " * 40


def test_control_characters_do_not_reach_the_terminal():
    assert visible("a\x1b[2Jb\x07\r\nc\td\x9b") == "a[2Jb\nc    d"


def test_summary_fits_80_columns():
    big = {"prompt_tokens": 4096, "new_tokens": 512, "prefill_tokens_per_s": 123.4, "decode_tokens_per_s": 12.34}
    assert len(summary_line(RUN | big | {"experts_on_gpu": 10**6, "transfers": 10**5})) <= 80
    worst = {"health": {"word": "abandoned"}}
    assert summary_line(RUN | worst).endswith(" · abandoned")
    assert len(summary_line(RUN | big | worst | {"experts_on_gpu": 10**6, "transfers": 10**5})) <= 92  # and wraps
    assert summary_line(RUN | {"health": {"word": ""}}) == summary_line(RUN)
    assert "hits" not in summary_line(RUN | {"experts_on_gpu": 0, "transfers": 0})


def test_short_numbers():
    assert [short(n) for n in (0, 9999, 10000, 3_450_000, 2 * 10**9)] == ["0", "9999", "10.0k", "3.5M", "2.0G"]
    assert flatten({"a": {"b": 1.0, "c": {}}, "d": "x\x1b"}) == [("a.b", "1"), ("d", "x")]


# ---------------------------------------------------------------- a real terminal

PROGRAM = """
import time
from types import SimpleNamespace
from rich.console import Console
from hybrimoe_kt.cli.chat import run_chat

class Slow:
    model_name = "slow"
    def stream(self, messages, *, stop, **how):
        for n in range(200):
            if stop.is_set():
                return
            yield f"word{n} "
            time.sleep(0.02)
    def last_run(self):
        return dict(prompt_tokens=1, new_tokens=2, prefill_tokens_per_s=3.0, decode_tokens_per_s=4.0, hit_rate=0.0,
                    experts_on_cpu=5, experts_on_gpu=0, transfers=0)
    def statistics(self):
        return {"turns": 1}

raise SystemExit(run_chat(Slow(), SimpleNamespace(max_new_tokens=9, temperature=0, top_p=1, seed=None), Console()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal_control_c_stops_the_answer_and_not_the_program():
    """Types into a pseudo-terminal, so that the key really becomes a signal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "PROMPT_TOOLKIT_NO_CPR": "1"},
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    terminal = Terminal(ours)
    try:
        terminal.wait_for("> ")
        terminal.type(b"hello\r")
        terminal.wait_for("word5")
        terminal.type(b"\x03")
        shown = terminal.wait_for("5 CPU")
        assert "stopped" in shown
        assert "word199" not in shown
        terminal.wait_for("> ")
        terminal.type(b"/stats\r")
        terminal.wait_for("turns")
        terminal.wait_for("> ")
        terminal.type(b"\x04")
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal():
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """Our end of a pseudo-terminal; what was read beyond an awaited text is kept for the next wait."""

    def __init__(self, descriptor: int):
        self.descriptor, self.unread = descriptor, ""

    def type(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    def wait_for(self, text: str, timeout_s: float = 15.0) -> str:
        deadline = time.monotonic() + timeout_s
        while text not in self.unread:
            ready, _, _ = select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not appear in {self.unread!r}"
            self.unread += os.read(self.descriptor, 4096).decode(errors="replace")
        shown, _, self.unread = self.unread.partition(text)
        return shown + text
