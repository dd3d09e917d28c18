"""What the library checks before it takes an artifact in. Nothing in it is opened or run."""

from __future__ import annotations

import io
import zipfile

from pydantic import ValidationError

from esper.errors import ArtifactCorrupt, ArtifactMismatch, BlueprintError
from esper.leyline.artifact import (
    BLUEPRINT,
    CAPS,
    LAYOUTS,
    MANIFEST,
    Manifest,
    kernel_id,
)
from esper.leyline.base import sha256
from esper.leyline.blueprint import parse_blueprint
from esper.leyline.library import BlueprintRecord


def _members(artifact: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(artifact)) as archive:
            infos = archive.infolist()
            names = tuple(i.filename for i in infos)
            if names not in LAYOUTS:
                raise ArtifactCorrupt(
                    f"the artifact has members {list(names)[:8]}, expected exactly "
                    f"{' or '.join(str(list(layout)) for layout in LAYOUTS)}"
                )
            for info in infos:
                # Stored means that the file is as large as it says: no bomb can hide in it.
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ArtifactCorrupt(
                        f"member {info.filename} is compressed; artifacts are uncompressed zips"
                    )
                if info.file_size > CAPS[info.filename]:
                    raise ArtifactCorrupt(
                        f"member {info.filename} has {info.file_size} bytes, at most "
                        f"{CAPS[info.filename]} are allowed"
                    )
            return {i.filename: archive.read(i) for i in infos}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as e:
        raise ArtifactCorrupt(
            f"the artifact of {len(artifact)} bytes is not a readable zip: {e}; pack it again"
        ) from e


def read_manifest(artifact: bytes) -> Manifest:
    """The manifest of a whole artifact: members, caps, digests and kernel id are checked.

    Raises:
        ArtifactCorrupt: not an artifact, or its parts contradict each other.
    """
    members = _members(artifact)
    try:
        manifest = Manifest.model_validate_json(members[MANIFEST])
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "its top"
        raise ArtifactCorrupt(
            f"{MANIFEST} is not a manifest: {first['msg']} (at {where}); pack the artifact again"
        ) from e
    digests = {name: sha256(members[name]) for name in members if name != MANIFEST}
    if manifest.sha256 != digests:
        wrong = [n for n in digests if manifest.sha256.get(n) != digests[n]]
        raise ArtifactCorrupt(
            f"the manifest's digests do not fit the members {wrong or sorted(manifest.sha256)}; "
            "pack the artifact again"
        )
    expected = kernel_id(
        manifest.blueprint_id, manifest.signature, manifest.toolchain, manifest.pipeline
    )
    if manifest.kernel_id != expected:
        raise ArtifactCorrupt(
            f"the manifest calls itself kernel {manifest.kernel_id}, but describes {expected}; "
            "pack the artifact again"
        )
    try:
        inside = parse_blueprint(members[BLUEPRINT]).id
    except BlueprintError as e:
        raise ArtifactCorrupt(f"{BLUEPRINT} is not a blueprint: {e}") from e
    if inside != manifest.blueprint_id:
        raise ArtifactCorrupt(
            f"{BLUEPRINT} holds blueprint {inside}, the manifest says {manifest.blueprint_id}"
        )
    return manifest


def check_artifact(artifact: bytes, record: BlueprintRecord) -> Manifest:
    """The manifest of `artifact`, if it is a kernel for what `record` asks.

    Raises:
        ArtifactCorrupt: see `read_manifest`.
        ArtifactMismatch: made for another blueprint or another signature.
    """
    manifest = read_manifest(artifact)
    if manifest.blueprint_id != record.blueprint_id:
        raise ArtifactMismatch(
            f"the artifact was made from blueprint {manifest.blueprint_id}, the claim is on "
            f"{record.blueprint_id}"
        )
    if manifest.signature != record.signature:
        raise ArtifactMismatch(
            f"the artifact was made for {manifest.signature}, the claim is for {record.signature}"
        )
    return manifest
