"""What all contracts share: frozen models, canonical JSON and content ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Contract(BaseModel):
    """A frozen value object that refuses unknown fields. Its JSON form is the wire form."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


def canonical_json(value: Any) -> bytes:
    """The one JSON spelling of `value`: sorted keys, no spaces, UTF-8, NaN refused.

    Raises:
        ValueError: `value` holds a NaN or an infinity.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def content_id(prefix: str, content: bytes) -> str:
    """`prefix` and the first 128 bits of SHA-256 of `content`, in hexadecimal."""
    return f"{prefix}-{hashlib.sha256(content).hexdigest()[:32]}"


def sha256(content: bytes) -> str:
    """SHA-256 of `content` as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
