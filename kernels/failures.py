"""What Triton fails with."""

from __future__ import annotations

import functools
import subprocess

__all__ = ["launch_failures"]


@functools.cache
def launch_failures() -> tuple[type[Exception], ...]:
    """What it raises when it compiles or launches in vain, but for the driver's RuntimeErrors.

    Its own errors are no RuntimeErrors; the tools it calls fail as processes, its cache folder as a file system.
    """
    from triton.errors import TritonError

    return TritonError, subprocess.SubprocessError, OSError
