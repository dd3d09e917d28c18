"""What the library checks before it takes an artifact in. Nothing in it is opened or run."""

from __future__ import annotations

from esper.errors import ArtifactMismatch
from esper.leyline.artifact import BLUEPRINT, MANIFEST, Manifest
from esper.leyline.base import sha256
from esper.leyline.library import BlueprintRecord
from esper.leyline.papers import check_papers, read_members


def check_artifact(artifact: bytes, record: BlueprintRecord) -> Manifest:
    """The manifest of `artifact`, if it is a kernel for what `record` asks.

    Raises:
        ArtifactCorrupt: not an artifact, or its parts contradict each other.
        ArtifactMismatch: made for another blueprint or another signature.
    """
    what = f"the artifact for {record.blueprint_id}"
    members = read_members(what, artifact)
    digests = {name: sha256(content) for name, content in members.items() if name != MANIFEST}
    manifest, _ = check_papers(what, members[MANIFEST], members[BLUEPRINT], digests)
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
