"""Every way an artifact can be wrong, as a real file on disk, and the refusal it meets.

There are two readers, the extension's and the one in Python; both meet every attack.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.errors import ArtifactCorrupt, ArtifactMismatch
from esper.kasmina import artifact as room
from esper.kasmina import native
from esper.kasmina.artifact import (
    Artifact,
    check_runs_here,
    open_artifact,
    read_artifact,
)
from esper.leyline.artifact import MANIFEST, MEMBERS, Manifest
from esper.leyline.base import sha256
from esper.leyline.blueprint import BlueprintIR, C, Node, Op
from esper.leyline.papers import check_papers
from esper.leyline.signature import SiteKind, SiteSignature
from tests.artifacts import members, pack

SITE = SiteSignature(kind=SiteKind.FEATURES, channels=8)
IR = BlueprintIR(
    kind=SiteKind.FEATURES,
    nodes=(
        Node(id="a", op=Op.LINEAR, inputs=("h",), out=C),
        Node(id="b", op=Op.ADD, inputs=("a", "h")),
    ),
    output="b",
)
# Machine code is not looked into before it is opened; these tests never open it.
CODE = {"forward.so": b"\x7fELF" + bytes(range(256)) * 8, "backward.so": b"\x7fELF" + b"b" * 999}


def _members(ir: BlueprintIR = IR, **changes: Any) -> dict[str, bytes]:
    return members(ir, SITE, CODE, **changes)


def _sound() -> bytes:
    return pack(_members().items())


def _write(folder: Path, content: bytes) -> tuple[Path, str]:
    path = folder / "kernel.esper"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


Reader = Callable[[Path, str], Artifact]


def _native_reader(path: Path, digest: str) -> Artifact:
    sealed = native.extension().read_artifact(str(path), digest)
    digests = dict(zip(sealed.members[1:], sealed.digests, strict=True))
    papers = check_papers(path, sealed.manifest, sealed.blueprint, digests)
    return Artifact(*papers, dict(zip(sealed.members[2:], sealed.code, strict=True)))


@pytest.fixture(params=["extension", "python"])
def reader(request: pytest.FixtureRequest) -> Reader:
    if request.param == "python":
        return read_artifact
    if native.extension() is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")
    return _native_reader


def test_a_sound_artifact_is_read(reader: Reader, tmp_path: Path) -> None:
    artifact = reader(*_write(tmp_path, _sound()))
    assert artifact.ir == IR
    assert artifact.code == CODE
    check_runs_here(artifact.manifest, SITE)


def test_truncation_at_any_length_is_refused(reader: Reader, tmp_path: Path) -> None:
    content = _sound()
    digest = hashlib.sha256(content).hexdigest()
    for length in [*range(0, len(content), 97), *range(len(content) - 300, len(content))]:
        path, own = _write(tmp_path, content[:length])
        with pytest.raises(ArtifactCorrupt, match="SHA-256"):
            reader(path, digest)
        with pytest.raises(ArtifactCorrupt, match=r"not a readable zip|the file ends within"):
            reader(path, own)  # even where the digest was taken of the stump


def test_a_flipped_bit_in_any_region_is_refused(reader: Reader, tmp_path: Path) -> None:
    content = _sound()
    digest = hashlib.sha256(content).hexdigest()
    rng = random.Random(0)
    for start in range(0, len(content), 64):
        damaged = bytearray(content)
        damaged[min(start + rng.randrange(64), len(content) - 1)] ^= 1 << rng.randrange(8)
        path, _ = _write(tmp_path, bytes(damaged))
        with pytest.raises(ArtifactCorrupt, match="SHA-256"):
            reader(path, digest)


def _headers(content: bytes) -> list[int]:
    """Every byte of the zip's own: headers, names, directory and end record."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
        found = list(range(archive.start_dir, len(content)))
    for info in infos:
        found += range(info.header_offset, info.header_offset + 30 + len(info.filename))
    return found


def test_behind_a_matching_digest_damage_is_still_refused_or_harmless(
    reader: Reader, tmp_path: Path
) -> None:
    """Whoever damages the file may also forge its digest: no other error may come out, and
    what is accepted must have the right contents. Every byte of a header, and many others."""
    content = _sound()
    sound = reader(*_write(tmp_path, content))
    rng = random.Random(1)
    headers = _headers(content)
    inside = sorted(set(range(len(content))) - set(headers))
    accepted = []
    for position in headers + rng.sample(inside, 800):
        for bit in {rng.randrange(8), 7}:
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            try:
                found = reader(*_write(tmp_path, bytes(damaged)))
            except ArtifactCorrupt:
                continue
            assert found == sound
            accepted.append(position)
    # Time stamps, versions, attributes and the checksums of what has a digest.
    assert set(accepted) < set(headers) and len(set(accepted)) < len(headers) / 2


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_spliced_files_are_refused_or_harmless(
    reader: Reader, tmp_path: Path, data: st.DataObject
) -> None:
    """Pieces of a sound file cut out, doubled, swapped or overwritten, with a digest that fits."""
    content = _sound()
    sound = reader(*_write(tmp_path, content))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), min_size=2, max_size=4)))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    order = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=6))
    filler = data.draw(st.binary(max_size=40))
    spliced = b"".join(pieces[i] for i in order) + filler
    with contextlib.suppress(ArtifactCorrupt):
        assert reader(*_write(tmp_path, spliced)) == sound


def _without_digest() -> dict[str, str]:
    return {name: sha256(content) for name, content in CODE.items()}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a readable zip"),
        (b"#!/bin/sh\nexit 1\n", "not a readable zip"),
        (pack([("archive/data.pkl", b"\x80\x02}.")]), "the members are"),
        (pack([*_members().items(), ("extra.py", b"print()")]), "the members are"),
        (pack(list(_members().items())[:3]), "the members are"),
        (pack(reversed(_members().items())), "the members are"),
        (pack([*_members().items(), (MANIFEST, b"{}")]), "the members are"),
        (pack([("../" + n, c) for n, c in _members().items()]), "the members are"),
        (pack(_members().items(), zipfile.ZIP_DEFLATED), "compressed"),
        (pack({**_members(), MANIFEST: b"{"}.items()), "manifest.json"),
        (pack({**_members(), MANIFEST: b"[]"}.items()), "manifest.json"),
        (pack({**_members(), MANIFEST: b'{"format":2}'}.items()), "manifest.json"),
        (pack({**_members(), MANIFEST: b" " * (1 << 20 | 1)}.items()), "at most 1048576"),
        (pack({**_members(), "blueprint.json": b" " * 65537}.items()), "at most 65536"),
        (pack({**_members(), "forward.so": b"\x7fELF other"}.items()), "forward.so has SHA-256"),
        (pack({**_members(), "blueprint.json": b"{}"}.items()), "blueprint.json has SHA-256"),
        (pack(_members(sha256=_without_digest()).items()), "has digests of"),
        (pack(_members(kernel_id="k-0").items()), "names kernel k-0"),
        (pack(_members(kernel_id="../../x").items()), "names kernel"),
        (pack(_members(blueprint_id="bp-0").items()), "the blueprint inside is"),
        (pack(_members(parameters=()).items()), "lists the parameters"),
        (pack(_members(backward_inputs=("in:4",)).items()), "backward input 'in:4'"),
        (pack(_members(backward_inputs=("out:-1",)).items()), "backward input 'out:-1'"),
        (pack(_members(backward_inputs=("out:" + "9" * 30,)).items()), "backward input"),
        (pack(_members(gradients=(0, 1)).items()), "maps 2 gradients"),
        (pack(_members(gradients=(0, -1, 2)).items()), "maps 3 gradients"),
    ],
)
def test_a_foreign_or_contradictory_file_is_refused(
    reader: Reader, tmp_path: Path, content: bytes, says: str
) -> None:
    # The two take a zip apart in their own ways; what is inside they judge in the same words.
    inside = "manifest.json|SHA-256|digests|names kernel|blueprint|backward input|maps"
    match = says if reader is read_artifact else f"the file ends|the zip's|{inside}"
    with pytest.raises(ArtifactCorrupt, match=match):
        reader(*_write(tmp_path, content))


def test_something_beside_the_members_is_refused(reader: Reader, tmp_path: Path) -> None:
    content, members = _sound(), _members()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, member in members.items():
            info = zipfile.ZipInfo(name)
            info.extra = b"\xfe\xca\x02\x00hi"
            archive.writestr(info, member)
        archive.comment = b"hello"
    for foreign in (b"MZ" + content, content + b"!", content * 2, buffer.getvalue()):
        with pytest.raises(ArtifactCorrupt):
            reader(*_write(tmp_path, foreign))


def test_code_that_is_no_elf_and_a_blueprint_that_is_none_are_refused(
    reader: Reader, tmp_path: Path
) -> None:
    for name, content, says in (
        ("forward.so", b"MZ...", "not an ELF"),
        ("blueprint.json", b"{}", "not a blueprint"),
    ):
        made = _members()
        made[name] = content
        digests = {n: sha256(c) for n, c in made.items() if n != MANIFEST}
        made[MANIFEST] = _members(sha256=digests)[MANIFEST]
        with pytest.raises(ArtifactCorrupt, match=says):
            reader(*_write(tmp_path, pack(made.items())))


def test_a_lying_size_in_the_central_directory_is_refused(
    reader: Reader, tmp_path: Path
) -> None:
    content = bytearray(_sound())
    entry = content.rindex(b"PK\x01\x02")  # of the last member
    content[entry + 24 : entry + 28] = (2**31).to_bytes(4, "little")
    with pytest.raises(ArtifactCorrupt, match=r"claims 2147483648 bytes|contradicts the member"):
        reader(*_write(tmp_path, bytes(content)))


def test_the_wrong_digest_is_refused_and_both_are_named(reader: Reader, tmp_path: Path) -> None:
    path, digest = _write(tmp_path, _sound())
    with pytest.raises(ArtifactCorrupt, match=digest) as refusal:
        reader(path, "0" * 64)
    assert "0" * 64 in str(refusal.value)


def test_an_oversize_file_is_refused_before_it_is_read(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "huge.esper"
    with path.open("wb") as file:
        file.truncate(room.MAX_ARTIFACT_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(ArtifactCorrupt, match="at most"):
        reader(path, "0" * 64)


def test_what_is_no_plain_file_is_refused_without_hanging(reader: Reader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises((ArtifactCorrupt, IsADirectoryError)):
            reader(path, "0" * 64)
    with pytest.raises(FileNotFoundError):
        reader(tmp_path / "nothing", "0" * 64)


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"torch_build": "1.0.0"}, ["1.0.0", str(torch.__version__)]),
        ({"isa": "ALTIVEC"}, ["ALTIVEC", str(torch.backends.cpu.get_cpu_capability())]),
    ],
)
def test_another_torch_or_isa_is_refused_naming_both(
    tmp_path: Path, changes: dict[str, Any], both: list[str]
) -> None:
    path, digest = _write(tmp_path, pack(_members(**changes).items()))
    with pytest.raises(ArtifactMismatch) as refusal:
        open_artifact(path, digest, SITE)
    assert all(side in str(refusal.value) for side in both)


@pytest.mark.parametrize(
    "other",
    [
        SITE.model_copy(update={"channels": 16}),
        SITE.model_copy(update={"dtype": "bfloat16"}),
        SITE.model_copy(update={"device": "cuda"}),
        SiteSignature(kind=SiteKind.TOKENS, channels=8, causal=True),
    ],
)
def test_another_signature_is_refused_naming_both(tmp_path: Path, other: SiteSignature) -> None:
    path, digest = _write(tmp_path, _sound())
    with pytest.raises(ArtifactMismatch) as refusal:
        open_artifact(path, digest, other)
    assert str(SITE) in str(refusal.value) and str(other) in str(refusal.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_cuda_kernel_is_refused_where_there_is_no_gpu() -> None:
    manifest = Manifest.model_validate_json(
        _members(signature=SITE.model_copy(update={"device": "cuda"}))[MANIFEST]
    )
    with pytest.raises(ArtifactMismatch, match="sees none"):
        check_runs_here(manifest)


_OPEN = """
import sys, pathlib, hashlib, tempfile, torch
from esper.kasmina.artifact import open_artifact
from esper.leyline.reference import initial_parameters
path = sys.argv[1]
opened = open_artifact(path, hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest())
site = opened.manifest.signature
h = torch.randn(site.shape(5), requires_grad=True)
params = [p.requires_grad_() for p in initial_parameters(opened.ir, site)]
opened.kernel(h, params, 0.5, 2).sum().backward()
assert h.grad is not None and all(p.grad is not None for p in params)
compilers = [m for m in sys.modules if m.split(".")[:2] in (
    ["torch", "_inductor"], ["torch", "_dynamo"], ["sympy"], ["triton"])]
assert not compilers, compilers
assert not list(pathlib.Path(tempfile.gettempdir()).iterdir())
"""


@pytest.mark.slow
def test_opening_runs_the_kernel_without_a_compiler_and_leaves_no_file(
    feature_artifact: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(feature_artifact)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_member_order_is_the_contract() -> None:
    assert MEMBERS == ("manifest.json", "blueprint.json", "forward.so", "backward.so")


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    extension = native.extension()
    if extension is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")
    rng = random.Random(2)
    for size in [*range(200), 1000, 4095, 4096, 4097, 100_003]:
        content = rng.randbytes(size)
        expected = hashlib.sha256(content).hexdigest()
        assert extension.sha256(content) == extension.sha256_portable(content) == expected
