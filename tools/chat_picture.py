"""Take `docs/images/chat-page.png` anew: `python -m tools.chat_picture`.

Starts the server of the embedded model with a quarter of its experts in an emulated accelerator's slots, has a short
conversation with it in a browser without a window, and takes the picture in the middle of the last answer. Wants what
`make browser` installs. Look at the picture before it is committed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from tests.page.browser import HOW, find_browser

ROOT = Path(__file__).parents[1]
SERVER = ["--port", "0", "--accelerator", "emulated", "--cache_size", "25%", "--temperature", "0"]
SIZE = {"width": 1280, "height": 760}
SAID = ("Hello! How are you today?", "Why is the sky blue?", "Tell me a short story about a cat.")
MIDDLE = 28
"""Words of the last answer that are there when the picture is taken."""


def served(process: subprocess.Popen[str]) -> str:
    """Return the server's address, as it says it."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"serving at (\S+) ", line):
            return found[1]
    raise SystemExit("".join(said))


def converse(page: Any, said: tuple[str, ...], words: int) -> None:
    """Say everything, and return in the middle of the last answer."""
    for number, text in enumerate(said):
        page.get_by_label("Message", exact=True).fill(text)
        page.keyboard.press("Enter")
        if number < len(said) - 1:
            page.locator("article.model[aria-busy=false]").nth(number).wait_for()
    last = "[...document.querySelectorAll('article.model .text')].at(-1)"
    page.wait_for_function(f"words => {last}?.innerText.split(/\\s+/).length >= words", arg=words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/chat-page.png")
    parser.add_argument("--words", type=int, default=MIDDLE, help="of the last answer, when the picture is taken")
    parser.add_argument("said", nargs="*", default=SAID, help="what is said, one message after the other")
    options = parser.parse_args()
    browser = find_browser()
    if browser is None:
        parser.error(f"there is no browser; {HOW}")
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrimoe_kt", *SERVER],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = served(process)
        with sync_playwright() as playwright:
            window = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = window.new_page(viewport=SIZE)
            page.set_default_timeout(120_000)
            page.goto(url)
            page.get_by_text("Settings").click()
            page.get_by_label("Temperature").fill("0")
            page.keyboard.press("Escape")
            page.mouse.move(0, 0)  # nothing is pointed at
            converse(page, tuple(options.said), options.words)
            page.screenshot(path=options.out)
            window.close()
    finally:
        process.terminate()
        process.wait(60)
    print(options.out)


if __name__ == "__main__":
    main()
