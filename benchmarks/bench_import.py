"""How long `import esper` takes, beside a Python that imports nothing."""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from typing import Any

from benchmarks.pairs import alternate


def test_import(benchmark: Any) -> None:
    def start(program: str) -> None:
        subprocess.run([sys.executable, "-c", program], check=True)

    pair = alternate(lambda: start("import esper"), lambda: start("pass"), rounds=20)
    seconds = median(pair.ours) - median(pair.peer)
    benchmark.extra_info.update(
        target="<= 0.15 s", seconds=seconds,
        ours_seconds=list(pair.ours), peer_seconds=list(pair.peer),
    )
    print(f"\nimport esper: {seconds:.4f} s beyond a bare Python; target 0.15 s")
    benchmark.pedantic(start, args=("import esper",), rounds=5)
