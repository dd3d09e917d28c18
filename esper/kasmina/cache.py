"""The process's one cache of opened kernels, where there is an extension to keep it.

All models of a process share it: a kernel that two of them grow is mapped once. Seeds pin what
they run; what no seed holds stays until its place is needed, so that a kernel that comes back is
there at once. The limits are read from the environment when the cache is first needed:

    ESPER_CACHE_BYTES     bytes of machine code, 1073741824 by default
    ESPER_CACHE_KERNELS   kernels, 256 by default

A kernel that left the cache has been handed back to the system, with one exception that is not
ours: code that Inductor compiled keeps its last error per thread, and glibc leaves a library
mapped until every thread that ran such code has ended. It is unmapped with the next library
that is closed after that.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import Any

from esper.errors import ConfigError
from esper.kasmina import native

BYTES, KERNELS = "ESPER_CACHE_BYTES", "ESPER_CACHE_KERNELS"
DEFAULTS = {BYTES: 1 << 30, KERNELS: 256}


_first = threading.Lock()


def kernel_cache() -> Any | None:
    """`esper._C.KernelCache`; None without the extension.

    Raises:
        ConfigError: a limit in the environment is not a positive number.
    """
    with _first:  # lru_cache alone would let threads that come first make one each
        return _made()


@lru_cache(maxsize=1)
def _made() -> Any | None:
    extension = native.extension()
    if extension is None:
        return None
    return extension.KernelCache(max_bytes=_limit(BYTES), max_count=_limit(KERNELS))


def _limit(name: str) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return DEFAULTS[name]
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**63):
        raise ConfigError(
            f"{name} is {text!r}; it must be a whole number from 1 on, or not be set (then it is "
            f"{DEFAULTS[name]})"
        )
    return int(text)
