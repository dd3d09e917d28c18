"""Compiled kernels for tests of growth, one for each signature, compiled once a session."""

from __future__ import annotations

from pathlib import Path

from esper.kasmina.growth import Growth
from esper.kasmina.loader import Loader
from esper.leyline.artifact import Pipeline
from esper.leyline.command import Action, Command
from esper.leyline.library import KernelRecord
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ValidationReport
from esper.tezzeret.compile import compile_artifact
from esper.urza.library import LocalLibrary
from tests.support import bottleneck


class Kernels:
    """A library that gets a kernel when a signature is first asked for; some ten seconds each.

    Urabrask does not prove them here: what is tested is what becomes of them in a host.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.library = root, LocalLibrary(root)
        self._made: dict[SiteSignature, KernelRecord] = {}

    def kernel(self, signature: SiteSignature) -> KernelRecord:
        if signature not in self._made:
            ir = bottleneck(signature.kind)
            self.library.register_signature(signature)
            self.library.submit(ir, signature, author="test")
            claim = self.library.claim_blueprint("test", lease_seconds=300)
            assert claim is not None
            artifact = compile_artifact(ir, signature, pipeline=Pipeline.FAST)
            made = self.library.complete_blueprint(claim, artifact)
            work = self.library.claim_kernel("test", lease_seconds=300)
            assert work is not None
            self.library.complete_kernel(work, ValidationReport(
                kernel_id=made.kernel_id, accepted=True, seconds=0.0))
            self._made[signature] = made
        return self._made[signature]

    def germinate(self, growth: Growth, *sites: str) -> None:
        """GERMINATED, and loaded: the next tick makes it TRAINING."""
        loader = Loader(self.library)
        try:
            for name in sites:
                made = self.kernel(growth.sites[name].found.signature)
                growth.obey(Command(action=Action.GERMINATE, site=name, kernel_id=made.kernel_id,
                                    blueprint_id=made.blueprint_id, reason="test"), loader)
            for name in sites:
                pending = growth.sites[name].pending
                assert pending is not None
                pending.result(timeout=120)
        finally:
            loader.close()
