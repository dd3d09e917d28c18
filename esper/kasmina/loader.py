"""Fetching, verifying and opening kernels away from the training thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.errors import ArtifactError
from esper.kasmina import native
from esper.kasmina.artifact import OpenedKernel, check_runs_here, open_artifact
from esper.leyline.library import Library
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.mode import FULL
from esper.leyline.reference import initial_parameters
from esper.leyline.signature import SiteSignature


@dataclass(frozen=True)
class Ready:
    """An opened kernel with fresh parameters, which may be still on their way to its device.

    `upload` is an `esper._C.Upload` where they are.
    """

    kernel: OpenedKernel
    tensors: list[Tensor]
    upload: Any | None = None

    def params(self) -> list[Tensor]:
        """The parameters, for use on the device's current stream. The host does not wait."""
        if self.upload is not None:
            self.upload.join()
        return self.tensors


class Loader:
    """One background thread that turns kernel ids into opened kernels with fresh parameters."""

    def __init__(self, library: Library) -> None:
        self._library = library
        # Asked for it, torch tells a new thread the number of threads it was set to. Untold, a
        # kernel's matrix products start one per core there, which wait for each other by spinning,
        # beside a training run: a pause of several steps.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="esper-loader",
                                        initializer=torch.get_num_threads)

    def prefetch(self, kernel_id: str, signature: SiteSignature, seed: int) -> Future[Ready]:
        """Start loading. The future raises NotInLibrary, ArtifactError or CacheFull where it is
        refused."""
        return self._pool.submit(self._load, kernel_id, signature, seed)

    def _load(self, kernel_id: str, signature: SiteSignature, seed: int) -> Ready:
        record = self._library.kernel(kernel_id)
        if record.status is not KernelStatus.VALIDATED:
            raise ArtifactError(f"kernel {kernel_id} is {record.status}, not VALIDATED")
        check_runs_here(record.manifest, signature)  # before anything is fetched
        path = self._library.fetch(record.digest)
        opened = open_artifact(path, record.digest, signature, record.manifest)
        generator = torch.Generator().manual_seed(seed)
        params = initial_parameters(opened.ir, signature, generator=generator)
        ready = _send(opened, params, signature.device)
        _warm(opened, ready.params(), signature)
        return ready

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _send(opened: OpenedKernel, params: list[Tensor], device: str) -> Ready:
    if device == "cpu":
        return Ready(opened, params)
    extension = native.extension()
    if extension is None:
        return Ready(opened, [p.to(device) for p in params])
    upload = extension.Upload(params, torch.device(device))
    return Ready(opened, upload.tensors, upload)


def _warm(opened: OpenedKernel, params: list[Tensor], signature: SiteSignature) -> None:
    """Run both halves once on zeros, so that the first real step pages in no code."""
    dtype = getattr(torch, signature.dtype)
    h = torch.zeros(signature.shape(2, 4), dtype=dtype, device=signature.device)
    leaves = [p.clone().requires_grad_(True) for p in params]
    with torch.enable_grad():
        out = opened.kernel(h.requires_grad_(True), leaves, 0.5, FULL)
        out.sum().backward()
