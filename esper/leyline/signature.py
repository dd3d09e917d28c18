"""What a growth site looks like from a kernel's side."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from pydantic import Field, model_serializer, model_validator

from esper.leyline.base import Contract, canonical_json, content_id


class SiteKind(StrEnum):
    """Layout of the tensor at a site. Channels C are fixed; every other extent is symbolic."""

    FEATURES = "features"  # [B, C]
    TOKENS = "tokens"  # [B, T, C]
    MAP = "map"  # [B, C, H, W]


class DType(StrEnum):
    """Element types a kernel can be compiled for, by their torch names."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {DType.FLOAT64: 8, DType.FLOAT32: 4}.get(self, 2)


class SiteSignature(Contract):
    """Everything a kernel must know about the site it is made for.

    `causal` is for token sites of autoregressive models: position t may depend on positions
    up to t only, so operations that mix later positions into earlier ones are refused or
    masked there. `device` is a torch device type, "cpu" or "cuda".

    `standalone` is for kernels that take the place of a whole module (`esper.nn`) instead of
    growing at a site. They need not be the identity at birth, so they have signatures of their
    own: nobody who looks for a seed is ever offered one. Such a kernel has no blend in it: it is
    made for, and proved at, alpha = 1 in mode FULL, and gives the same at any other alpha.
    """

    kind: SiteKind
    channels: int = Field(ge=1, le=65536)
    dtype: DType = DType.FLOAT32
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda)$")
    causal: bool = False
    standalone: bool = False

    @model_serializer(mode="wrap")
    def _as_ever(self, plain: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # Left out where false: ids and files of signatures from before the field stay as they are.
        fields = plain(self)
        if not self.standalone:
            fields.pop("standalone", None)
        return fields

    @model_validator(mode="after")
    def _causal_needs_tokens(self) -> SiteSignature:
        if self.causal and self.kind is not SiteKind.TOKENS:
            raise ValueError(f"causal sites are token sites; this one is {self.kind}")
        return self

    @property
    def id(self) -> str:
        return content_id("sig", canonical_json(self.model_dump(mode="json")))

    def shape(self, batch: int, space: int = 8) -> tuple[int, ...]:
        """A concrete shape: [B, C], [B, space, C] or [B, C, space, space]."""
        match self.kind:
            case SiteKind.FEATURES:
                return (batch, self.channels)
            case SiteKind.TOKENS:
                return (batch, space, self.channels)
            case SiteKind.MAP:
                return (batch, self.channels, space, space)

    def __str__(self) -> str:
        causal = " causal" if self.causal else ""
        alone = " standalone" if self.standalone else ""
        return f"{self.kind}[{self.channels}] {self.dtype} {self.device}{causal}{alone}"
