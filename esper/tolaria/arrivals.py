"""Kernels reach every rank before one of them uses it."""

from __future__ import annotations

import json
from concurrent.futures import Future, wait

import torch

from esper import errors
from esper.errors import EsperError
from esper.kasmina.loader import Loader, Ready
from esper.leyline.signature import SiteSignature
from esper.tolaria.ranks import Ranks


class SharedLoader(Loader):
    """A loader whose futures are done at the same step on all ranks, with the same outcome.

    Each rank fetches, verifies and opens by its own loader. `meet` finds out whether all have: a
    future is then given its kernel, with the parameters of rank 0; or the reason of the first rank
    that could not, so that all ranks cull the seed alike. Owned by the training thread.
    """

    def __init__(self, loader: Loader, ranks: Ranks) -> None:
        self._loader, self._ranks = loader, ranks
        self._waiting: list[tuple[Future[Ready], Future[Ready]]] = []  # (own, shared)

    def prefetch(self, kernel_id: str, signature: SiteSignature, seed: int) -> Future[Ready]:
        return self.share(self._loader.prefetch(kernel_id, signature, seed))

    def share(self, own: Future[Ready]) -> Future[Ready]:
        """The future of all ranks for one of this rank's."""
        shared: Future[Ready] = Future()
        self._waiting.append((own, shared))
        return shared

    def meet(self, patiently: bool) -> None:
        """A collective where anything is on its way, nothing else; `patiently` waits for all of it.
        """
        for own, shared in self._waiting:
            if shared.cancelled():  # at the same step everywhere
                own.cancel()
        self._waiting = [pair for pair in self._waiting if not pair[1].cancelled()]
        if not self._waiting:
            return
        if patiently:
            wait([own for own, _ in self._waiting])
        done = [own.done() for own, _ in self._waiting]
        failed = [d and own.exception() is not None
                  for d, (own, _) in zip(done, self._waiting, strict=True)]
        shares = self._ranks.mean(torch.tensor([done, failed])).tolist()
        still = []
        for pair, share_done, share_failed in zip(self._waiting, *shares, strict=True):
            own, shared = pair
            if share_done < 1:
                still.append(pair)
            elif share_failed > 0:
                shared.set_exception(self._why(own))
            else:
                ready = own.result()
                self._ranks.same(ready.params())
                shared.set_result(ready)
        self._waiting = still

    def _why(self, own: Future[Ready]) -> Exception:
        """The reason of the first rank that has one, of its kind where that is one of esper's."""
        error = own.exception()
        told = [] if error is None else [type(error).__name__, str(error) or repr(error)]
        for rank, content in enumerate(self._ranks.gather(json.dumps(told).encode())):
            if heard := json.loads(content):
                kind = getattr(errors, heard[0], EsperError)
                return kind(f"rank {rank}: {heard[1]}")
        return EsperError("a rank failed and does not say why")

    def close(self) -> None:
        self._loader.close()
