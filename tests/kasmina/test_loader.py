"""Kernels are opened on a thread of their own, which must not get in the trainer's way."""

from __future__ import annotations

from pathlib import Path

import torch
from threadpoolctl import threadpool_info

from esper.kasmina.loader import Loader
from esper.urza.library import LocalLibrary


def test_its_thread_uses_as_many_cores_as_torch_was_told(tmp_path: Path) -> None:
    """OpenMP keeps the number by thread, and a new one begins with all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loader = Loader(LocalLibrary(tmp_path))
    try:
        pools = loader._pool.submit(threadpool_info).result(timeout=60)
    finally:
        loader.close()
        torch.set_num_threads(before)
    # Only torch's own: a wheel may bring an OpenMP that torch knows nothing of.
    torchs = {p["filepath"]: p["num_threads"] for p in pools
              if p["user_api"] == "openmp" and Path(torch.__file__).parent in
              Path(p["filepath"]).parents}
    assert set(torchs.values()) == {1}, pools
