"""Compile one blueprint, from analysis to artifact, for those who need just one."""

from __future__ import annotations

from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature
from esper.tezzeret.analysis import analyse
from esper.tezzeret.worker import Forge


def compile_artifact(
    ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline = Pipeline.FAST
) -> bytes:
    """The artifact of `ir` at `signature`, in a child process that is gone afterwards.

    Raises:
        BlueprintError: static analysis refuses the blueprint, naming the node.
        CompileError: it could not be compiled.
    """
    analyse(ir, signature)
    with Forge() as forge:
        return forge.compile(ir, signature, pipeline)
