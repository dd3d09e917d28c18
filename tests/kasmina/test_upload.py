"""Uploads to a device. What needs a GPU is marked so, and has never run on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.kasmina.loader import Ready, _send

ROOT = Path(__file__).parents[2]


def test_on_the_cpu_nothing_is_copied(extension: Any) -> None:
    tensors = [torch.randn(3), torch.randn(2, 2)]
    upload = extension.Upload(tensors, torch.device("cpu"))
    upload.join()
    assert [t.data_ptr() for t in upload.tensors] == [t.data_ptr() for t in tensors]
    assert Ready(None, tensors).params() is tensors  # type: ignore[arg-type]


def test_a_device_that_this_torch_has_not_is_refused(extension: Any) -> None:
    if torch.xpu.is_available():
        pytest.skip("needs a machine without an XPU")
    with pytest.raises(RuntimeError, match=r"xpu|XPU"):
        extension.Upload([torch.randn(3)], torch.device("xpu"))


def test_only_what_is_on_the_cpu_is_taken(extension: Any) -> None:
    with pytest.raises(ValueError, match="uploads start on the CPU"):
        extension.Upload([torch.empty(3, device="meta")], torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_compute_stream_waits_and_the_host_does_not(extension: Any) -> None:
    tensors = [torch.randn(1 << 22) for _ in range(16)]
    compute = torch.cuda.Stream()
    with torch.cuda.stream(compute):
        upload = extension.Upload(tensors, torch.device("cuda"))
        busy = torch.cuda.Event()
        torch.cuda._sleep(500_000_000)  # clock cycles of a kernel that does nothing
        busy.record()
        upload.join()
        sums = torch.stack([t.sum() for t in upload.tensors])
        assert not busy.query()  # Upload, join and sums came back while the device was busy
    torch.testing.assert_close(sums.cpu(), torch.stack([t.sum() for t in tensors]),
                               rtol=1e-4, atol=1e-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_loader_sends_parameters_over_a_stream_of_their_own(extension: Any) -> None:
    params = [torch.randn(1000), torch.randn(3, 3)]
    ready = _send(None, params, "cuda")  # type: ignore[arg-type]
    with torch.cuda.stream(torch.cuda.Stream()):
        for here, there in zip(params, ready.params(), strict=True):
            assert there.is_cuda
            torch.testing.assert_close(there.cpu(), here)


_FAKE = """
import sys, torch
from torch.utils.cpp_extension import load
from esper.kasmina import native
device = load("esper_fake_device", [sys.argv[1]], extra_cflags=["-O0"], build_directory=sys.argv[2])
torch.utils.rename_privateuse1_backend("fake")
tensors = [torch.randn(3), torch.randn(2, 2)]
upload = native.extension().Upload(tensors, torch.device("fake"))
each = ["allocate on stream 7", "pin", "copy on stream 7"]
assert (log := device.take_log()) == [*each, *each, "record on stream 7"], log
device.set_stream(3)
upload.join()
assert (log := device.take_log()) == ["block on stream 3"] + ["keep on stream 3"] * 2, log
assert all(torch.equal(device.read(t), s) for t, s in zip(upload.tensors, tensors, strict=True))
"""


@pytest.mark.slow
def test_what_an_upload_asks_of_a_device(extension: Any, tmp_path: Path) -> None:
    """A device made of numbers (tests/native/fake_device.cc) writes down all that is asked of it:
    copies from pinned memory on one stream, an event that the other waits for, and never the
    host. In a process of its own, for torch takes one such device only."""
    done = subprocess.run(
        [sys.executable, "-c", _FAKE, ROOT / "tests/native/fake_device.cc", tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
        capture_output=True, text=True, timeout=600, check=False,
    )
    assert done.returncode == 0, done.stderr
