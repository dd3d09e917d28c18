"""Asking a process of its own for what can only be found out there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from esper.errors import EsperError

T = TypeVar("T")


def ask(module: str, to: str, read: Callable[[bytes], T], seconds: float) -> T:
    """What `python -m module` prints, as `read` understands it, or does not: by a ValueError.

    Raises:
        EsperError: there was no such answer within `seconds`. `to` says what was asked.
    """
    try:
        return read(subprocess.run(
            [sys.executable, "-m", module], stdin=subprocess.DEVNULL, capture_output=True,
            check=True, timeout=seconds,
        ).stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as e:
        heard = getattr(e, "stderr", None) or b""
        raise EsperError(
            f"the process that was to {to} did not ({e}); check that this installation is "
            f"complete: {heard[-400:].decode(errors='replace').strip()}"
        ) from e
