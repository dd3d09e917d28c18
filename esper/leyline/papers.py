"""What an artifact says of itself: taken out of its zip, and compared with itself.

Whoever takes artifacts in (the library) and whoever opens them asks for the same. Nothing of the
code is looked at.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

from pydantic import ValidationError

from esper.errors import ArtifactCorrupt, BlueprintError
from esper.leyline.artifact import (
    BLUEPRINT,
    CAPS,
    LAYOUTS,
    MANIFEST,
    Manifest,
    ParameterSpec,
    kernel_id,
)
from esper.leyline.base import first_fault
from esper.leyline.blueprint import BlueprintIR, parse_blueprint
from esper.leyline.shapes import infer

AGAIN = "fetch it again, or compile the blueprint again"


def read_members(path: object, content: bytes) -> dict[str, bytes]:
    """The four members; the list and all sizes are checked before one is read.

    Args:
        path: names the artifact in messages.

    Raises:
        ArtifactCorrupt: not a zip of exactly the members of a layout, stored, with nothing beside.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            names = tuple(i.filename for i in infos)
            if names not in LAYOUTS:
                shown = ", ".join(repr(n) for n in names[:8])
                raise ArtifactCorrupt(
                    f"{path}: the members are [{shown}] ({len(names)} in all), expected exactly "
                    f"{' or '.join(str(list(layout)) for layout in LAYOUTS)}; this is not an "
                    "esper artifact"
                )
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
                    raise ArtifactCorrupt(
                        f"{path}: {info.filename} is compressed or encrypted; artifacts are "
                        f"stored as they are: {AGAIN}"
                    )
                if info.file_size > CAPS[info.filename] or info.file_size != info.compress_size:
                    raise ArtifactCorrupt(
                        f"{path}: {info.filename} claims {info.file_size} bytes "
                        f"({info.compress_size} stored), at most {CAPS[info.filename]} are allowed"
                    )
            # Nothing before, between or behind the members but the headers that zip itself needs.
            size = 22 + sum(30 + 46 + 2 * len(i.filename) + i.file_size for i in infos)
            if len(content) != size:
                raise ArtifactCorrupt(
                    f"{path}: {len(content)} bytes, its members and their headers take {size}; "
                    f"something is hidden between them: {AGAIN}"
                )
            return {i.filename: archive.read(i) for i in infos}
    # zipfile reports a damaged file through whatever its parser ran into.
    except (zipfile.BadZipFile, EOFError, ValueError, OverflowError, NotImplementedError,
            RuntimeError, OSError, LookupError) as e:
        raise ArtifactCorrupt(f"{path}: not a readable zip ({e}); {AGAIN}") from e


def check_papers(
    path: object, manifest_json: bytes, blueprint_json: bytes, digests: Mapping[str, str]
) -> tuple[Manifest, BlueprintIR]:
    """What an artifact says of itself, if it agrees with itself.

    Args:
        path: names the artifact in messages.
        digests: SHA-256 of every member but the manifest, as found.

    Raises:
        ArtifactCorrupt: a member is of another digest than the manifest says, a part cannot be
            read, or the parts contradict each other.
    """
    manifest = _manifest(path, manifest_json, digests)
    try:
        ir = parse_blueprint(blueprint_json)
        _consistent(path, manifest, ir)
    except BlueprintError as e:
        raise ArtifactCorrupt(f"{path}: {BLUEPRINT} is not a blueprint: {e}; {AGAIN}") from e
    return manifest, ir


def _manifest(path: object, manifest_json: bytes, digests: Mapping[str, str]) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(manifest_json, strict=True)
    except ValidationError as e:
        raise ArtifactCorrupt(f"{path}: {MANIFEST}: {first_fault(e)}; {AGAIN}") from e
    if set(manifest.sha256) != set(digests):
        raise ArtifactCorrupt(
            f"{path}: {MANIFEST} has digests of {sorted(manifest.sha256)}, expected of "
            f"{sorted(digests)}; {AGAIN}"
        )
    for name, found in digests.items():
        if found != manifest.sha256[name]:
            raise ArtifactCorrupt(
                f"{path}: {name} has SHA-256 {found}, {MANIFEST} says {manifest.sha256[name]}; "
                f"{AGAIN}"
            )
    return manifest


def _consistent(path: object, manifest: Manifest, ir: BlueprintIR) -> None:
    """The manifest must describe this blueprint: ids, parameters and the calling plan."""
    if manifest.blueprint_id != ir.id:
        raise ArtifactCorrupt(
            f"{path}: the blueprint inside is {ir.id}, {MANIFEST} says {manifest.blueprint_id}"
        )
    expected = kernel_id(ir.id, manifest.signature, manifest.toolchain, manifest.pipeline)
    if manifest.kernel_id != expected:
        raise ArtifactCorrupt(
            f"{path}: {MANIFEST} names kernel {manifest.kernel_id}, its own fields give {expected}"
        )
    parameters = tuple(
        ParameterSpec(name=p.name, shape=p.shape) for p in infer(ir, manifest.signature).parameters
    )
    if manifest.parameters != parameters:
        raise ArtifactCorrupt(
            f"{path}: {MANIFEST} lists the parameters "
            f"{[(p.name, p.shape) for p in manifest.parameters]}, the blueprint has "
            f"{[(p.name, p.shape) for p in parameters]}"
        )
    inputs = 2 + len(parameters)  # h, alpha and the parameters
    for source in manifest.backward_inputs:
        kind, _, index = source.partition(":")
        number = int(index) if index.isascii() and index.isdigit() and len(index) < 6 else -1
        if source != "grad" and not (
            (kind == "in" and 0 <= number < inputs) or (kind == "out" and number >= 0)
        ):
            raise ArtifactCorrupt(
                f"{path}: backward input {source!r} is none of 'grad', 'in:0' to "
                f"'in:{inputs - 1}', 'out:K'"
            )
    if len(manifest.gradients) != inputs - 1 or min(manifest.gradients) < 0:
        raise ArtifactCorrupt(
            f"{path}: {MANIFEST} maps {len(manifest.gradients)} gradients "
            f"{manifest.gradients}, expected {inputs - 1} indices from 0"
        )
