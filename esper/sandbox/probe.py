"""Which layers this machine allows, found out by trying: `python -m esper.sandbox.probe`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from esper.sandbox.allowance import Allowance
from esper.sandbox.ask import ask
from esper.sandbox.layers import NEEDS, Layer, enter

START_SECONDS = 120.0  # eight small processes at idle priority beside a busy trainer
_SMALL = Allowance(memory_bytes=1 << 30)


@functools.cache
def available() -> Mapping[Layer, str]:
    """For every layer why it is off on this machine, "" where it is on.

    Raises:
        EsperError: it could not be tried; asked again, it is tried again.
    """
    return ask("esper.sandbox.probe", "try the sandbox", _read, START_SECONDS)


def _read(said: bytes) -> Mapping[Layer, str]:
    return {Layer(name): why for name, why in json.loads(said).items()}


def allowed() -> tuple[Layer, ...]:
    """The layers that are on. Raises as `available` does."""
    return tuple(layer for layer, why in available().items() if not why)


def describe(found: Mapping[Layer, str]) -> str:
    """Which are on, and which are off and why, in one line."""
    on = [layer for layer, why in found.items() if not why]
    off = [f"{layer} ({why})" for layer, why in found.items() if why]
    said = ", ".join(on) or "none of the layers is on"
    return f"{said}; off: {', '.join(off)}" if off else said


def _try_all() -> dict[Layer, str]:
    """Each layer on top of those that worked before it."""
    found: dict[Layer, str] = {}
    for layer in Layer:
        needed = NEEDS.get(layer)
        if sys.platform != "linux":
            found[layer] = "made of what only Linux has"
        elif needed is not None and found[needed]:
            found[layer] = f"needs {needed}"
        else:
            found[layer] = _try([*(on for on, why in found.items() if not why), layer])
    return found


def _try(layers: list[Layer]) -> str:
    """Why a process shut in by `layers` could not be, or could not work in there; or ""."""
    ours, its = os.pipe()
    with tempfile.TemporaryDirectory(prefix="esper-probe-") as folder:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                enter(layers, _SMALL, [Path(folder)])
                # In a user namespace root is root to its own files only.
                Path(folder, "file").write_text("")
                os.listdir(Path(__file__).parent)
                subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
                code = 0
            except Exception as e:
                os.write(its, (str(e) or repr(e)).encode())
            finally:
                os._exit(code)
        os.close(its)
        with os.fdopen(ours, "rb") as heard:
            said = heard.read().decode(errors="replace")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return said or (f"ended with status {status}" if status else "")


def main() -> None:
    print(json.dumps(_try_all()))


if __name__ == "__main__":
    main()
