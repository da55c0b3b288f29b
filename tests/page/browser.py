"""Finds a browser on this machine, or says why there is none; `python -m tests.page.browser` installs Debian's.

That wants apt, and root or a sudo that asks for no password. Without them it says what is missing and fails nothing:
the tests of the chat page then skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
HOW = "`make browser` lets them run: pip install '.[browser]', and a Chromium (Debian: apt install chromium)"
_LIMIT_S = 300


def find_browser() -> str | None:
    """Return the path of a Chromium: $HYBRIMOE_BROWSER, or one on the PATH."""
    named = os.environ.get("HYBRIMOE_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


def install() -> str | None:
    """Have apt install a Chromium; return why not, None where it did."""
    if shutil.which("apt-get") is None:
        return "there is no apt-get"
    before = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if before and shutil.which("sudo") is None:
        return "this is not root, and there is no sudo"
    apt = [*before, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    wanted = [*apt, "install", "-y", "--no-install-recommends", "chromium"]
    said = ""
    for command in (wanted, [*apt, "update"], wanted):  # lists of packages may be old, or none
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if command is wanted and done.returncode == 0:
            return None
        said = done.stdout.strip().rpartition("\n")[2] or f"apt-get ended with code {done.returncode}"
    return said


if __name__ == "__main__":
    trouble = None if find_browser() else install()
    found = find_browser()
    print(found or f"note: no browser, the tests of the chat page will skip: {trouble or 'apt installed none'}")
