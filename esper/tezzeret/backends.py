"""The one interface behind which blueprints are compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from esper.leyline.artifact import Pipeline, Toolchain
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.signature import SiteSignature


@dataclass(frozen=True)
class Built:
    """What a backend makes of a blueprint: the artifact's members of code by their names (see
    `leyline.artifact.LAYOUTS`), and the manifest's two tables of how they are called."""

    backward_inputs: tuple[str, ...]
    gradients: tuple[int, ...]
    code: Mapping[str, bytes]


class Backend(Protocol):
    """One way to compile blueprints for one kind of device."""

    name: str

    def why_not(self, ir: BlueprintIR, signature: SiteSignature) -> str:
        """Why this backend does not take `ir` at `signature`; empty where it does."""

    def toolchain(self) -> Toolchain:
        """What its kernels are built with and run on: the machine's part of a kernel's id.

        Raises:
            CompileError: a compiler is missing, or does not work.
        """

    def build(
        self, ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline, folder: Path
    ) -> Built:
        """Compile, in a child of the forge that does nothing else; `folder` is its own.

        Raises:
            Exception: whatever went wrong; the forge passes it on as a CompileError.
        """
