"""Packing: an artifact's bytes, the same for the same content."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

from esper.leyline.artifact import BLUEPRINT, LAYOUTS, MANIFEST, Manifest
from esper.leyline.base import sha256
from esper.leyline.blueprint import BlueprintIR

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say; a real time would change the digest


def pack(manifest: Manifest, ir: BlueprintIR, code: Mapping[str, bytes]) -> bytes:
    """The artifact's zip; `manifest.sha256` is filled in here.

    Raises:
        ValueError: `code` is not what one of the layouts has beside manifest and blueprint.
    """
    members = {BLUEPRINT: ir.to_json().encode(), **code}
    if (MANIFEST, *members) not in LAYOUTS:
        raise ValueError(f"code is of {list(code)}, an artifact is one of {list(LAYOUTS)}")
    digests = {name: sha256(content) for name, content in members.items()}
    manifest = manifest.model_copy(update={"sha256": digests})
    whole = {MANIFEST: manifest.model_dump_json().encode(), **members}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in whole.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)
    return buffer.getvalue()
