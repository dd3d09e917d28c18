"""Fetching, verifying and opening kernels away from the training thread."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from esper.errors import ArtifactError
from esper.kasmina.artifact import OpenedKernel, open_artifact
from esper.leyline.library import Library
from esper.leyline.lifecycle import KernelStatus
from esper.leyline.reference import initial_parameters
from esper.leyline.signature import SiteSignature

Ready = tuple[OpenedKernel, list[torch.Tensor]]


class Loader:
    """One background thread that turns kernel ids into opened kernels with fresh parameters."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="esper-loader")

    def prefetch(self, kernel_id: str, signature: SiteSignature, seed: int) -> Future[Ready]:
        """Start loading; the future raises NotInLibrary or ArtifactError where it is refused."""
        return self._pool.submit(self._load, kernel_id, signature, seed)

    def _load(self, kernel_id: str, signature: SiteSignature, seed: int) -> Ready:
        record = self._library.kernel(kernel_id)
        if record.status is not KernelStatus.VALIDATED:
            raise ArtifactError(f"kernel {kernel_id} is {record.status}, not VALIDATED")
        opened = open_artifact(self._library.fetch(record.digest), record.digest, signature)
        generator = torch.Generator().manual_seed(seed)
        params = initial_parameters(
            opened.ir, signature, generator=generator, device=signature.device
        )
        _warm(opened, params, signature)
        return opened, params

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _warm(opened: OpenedKernel, params: list[torch.Tensor], signature: SiteSignature) -> None:
    """Run both halves once on zeros, so that the first real step pages in no code."""
    dtype = getattr(torch, signature.dtype)
    h = torch.zeros(signature.shape(2, 4), dtype=dtype, device=signature.device)
    leaves = [p.clone().requires_grad_(True) for p in params]
    with torch.enable_grad():
        out = opened.kernel(h.requires_grad_(True), leaves, 0.5, 2)
        out.sum().backward()
