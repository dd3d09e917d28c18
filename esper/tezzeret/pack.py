"""Packing: an artifact's bytes, the same for the same content."""

from __future__ import annotations

import io
import zipfile

from esper.leyline.artifact import BACKWARD, BLUEPRINT, FORWARD, MANIFEST, Manifest
from esper.leyline.base import sha256
from esper.leyline.blueprint import BlueprintIR

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say; a real time would change the digest


def pack(manifest: Manifest, ir: BlueprintIR, forward: bytes, backward: bytes) -> bytes:
    """The artifact's zip; `manifest.sha256` is filled in here."""
    members = {BLUEPRINT: ir.to_json().encode(), FORWARD: forward, BACKWARD: backward}
    digests = {name: sha256(content) for name, content in members.items()}
    manifest = manifest.model_copy(update={"sha256": digests})
    whole = {MANIFEST: manifest.model_dump_json().encode(), **members}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in whole.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)
    return buffer.getvalue()
