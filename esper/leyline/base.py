"""What all contracts share: frozen models, canonical JSON and content ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


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


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of dicts within dicts, by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {
            f"{prefix}{key}": value}
    return leaves


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values are not the same in both, or that one of them lacks."""
    return [k for k in {**before, **now} if before.get(k, ...) != now.get(k, ...)]


def first_fault(error: ValidationError) -> str:
    """What pydantic says first, and where."""
    first = error.errors()[0]
    return f"{first['msg']} (at {'.'.join(map(str, first['loc'])) or 'the whole'})"
