"""A Python as Windows or macOS has it, played on Linux: what they lack is gone for this package and whom it calls.

`become("win32")` changes the running interpreter, so it belongs into a process of its own. Foreign libraries that are
loaded by then keep the platform they were built for; this package is forgotten, to be imported anew.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.abc
import importlib.machinery
import mmap
import os
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDERS = tuple(str(Path(__file__).parents[2] / name) + os.sep for name in ("hybrimoe_kt", "kernels"))
LINUX_ONLY = ("triton", "kt_kernel", "cpuinfer_ext", "cpufeature")
"""Packages that other systems, or newer Pythons, have no build of."""
MODULES = {
    "win32": ("fcntl", "resource", "termios", "tty", "pty", "readline", "pwd", "grp", "curses", "syslog"),
    "darwin": (),
}
NAMES: dict[str, dict[ModuleType, Sequence[str]]] = {
    "win32": {
        os: ("fork", "forkpty", "getuid", "geteuid", "getgid", "getloadavg", "getpriority", "setpriority", "nice",
             "sched_getaffinity", "sched_setaffinity", "sched_yield", "sysconf", "sysconf_names", "uname", "wait",
             "statvfs", "pread", "preadv", "posix_fadvise", "mkfifo", "setsid", "killpg", "PRIO_PROCESS", "WNOHANG",
             "memfd_create", "eventfd", "sendfile", "chown", "fchmod", "O_NONBLOCK", "O_DIRECTORY", "O_CLOEXEC"),
        signal: ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGTSTP",
                 "SIGWINCH", "alarm", "setitimer", "pause", "pthread_kill", "pthread_sigmask", "sigwait",
                 "sigpending", "siginterrupt", "sigtimedwait"),
        socket: ("AF_UNIX", "SO_REUSEPORT", "SO_REUSEADDR"),
        mmap: ("MAP_PRIVATE", "MAP_SHARED", "MAP_ANONYMOUS", "MAP_ANON", "MAP_POPULATE", "PROT_READ", "PROT_WRITE"),
    },
    "darwin": {
        os: ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "memfd_create", "eventfd"),
        signal: ("sigtimedwait", "SIGRTMIN", "SIGRTMAX"),
        mmap: ("MAP_POPULATE", "MADV_HUGEPAGE", "MADV_POPULATE_READ", "MADV_DONTFORK"),
    },
}  # fmt: skip
_FILES_OF_LINUX = ("/proc/", "/sys/", "/dev/shm", "/etc/")
_FUNCTIONS_OF_LINUX = ("prctl", "malloc_trim", "mallopt", "sched_setaffinity", "gettid", "memfd_create")


def become(platform: str) -> None:
    """Take away what `platform`, "win32" or "darwin", lacks; cannot be undone."""
    _forget_this_package()
    sys.meta_path.insert(0, _Missing((*LINUX_ONLY, *MODULES[platform])))
    for name in (*LINUX_ONLY, *MODULES[platform]):
        for loaded in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
            if platform == "win32" or name in LINUX_ONLY:
                del sys.modules[loaded]
    for module, names in NAMES[platform].items():
        for name in (*names, *(name for name in dir(module) if platform == "win32" and name.startswith("MADV_"))):
            if hasattr(module, name):
                delattr(module, name)
    _without_own_symbols(platform)
    if platform == "win32":
        asyncio.events.AbstractEventLoop.add_signal_handler = _not_there  # type: ignore[method-assign]
        asyncio.SelectorEventLoop.add_signal_handler = _not_there  # type: ignore[method-assign]
    sys.addaudithook(_refuse_files_of_linux)
    warnings.filterwarnings("error", category=EncodingWarning, module="hybrimoe_kt")  # with -X warn_default_encoding
    sys.platform = platform


def _forget_this_package() -> None:
    from transformers.quantizers import auto

    for name in [name for name in sys.modules if name.partition(".")[0] == "hybrimoe_kt"]:
        del sys.modules[name]
    for registry in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        for name in [name for name, cls in registry.items() if cls.__module__.startswith("hybrimoe_kt.")]:
            del registry[name]


class _Missing(importlib.abc.MetaPathFinder):
    """Finds that modules are not there, before others can find them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def _not_there(*_: Any) -> Any:
    raise NotImplementedError


def _without_own_symbols(platform: str) -> None:
    """`CDLL(None)`, the process's own symbols, is a TypeError on Windows, and lacks Linux's functions on macOS."""
    real = ctypes.CDLL

    class Library(real):  # type: ignore[valid-type, misc]
        def __init__(self, name: Any, *args: Any, **options: Any) -> None:
            if name is None and platform == "win32":
                raise TypeError("bad argument type for built-in operation")
            super().__init__(name, *args, **options)

        def __getattr__(self, name: str) -> Any:
            if name in _FUNCTIONS_OF_LINUX:
                raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
            return super().__getattr__(name)

    ctypes.CDLL = Library  # type: ignore[misc]


def _refuse_files_of_linux(event: str, arguments: tuple[Any, ...]) -> None:
    """To this package; foreign libraries ask the system they run on."""
    if event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], str):
        return
    if arguments[0].startswith(_FILES_OF_LINUX) and _asked_by_us():
        # Path.glob() of a folder that it has just seen lets only the former pass, as it would one that is not there.
        raise (PermissionError if event == "os.scandir" else FileNotFoundError)(2, "not on this system", arguments[0])


def _asked_by_us() -> bool:
    """Whether this package comes before any foreign one on the stack, the standard library aside."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(FOLDERS):
            return True
        if "-packages" in file:  # Debian calls the folder dist-packages
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
