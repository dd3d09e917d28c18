"""What a cubin says of itself: the arch, its kernel, the parameters, what it takes of a GPU.

A cubin is an ELF file of NVIDIA's machine code. Everything here is read from its bytes, with
no CUDA tool or GPU at hand; section and attribute numbers are those that `cuobjdump -elf` names
(EIATTR_REGCOUNT and so on). Only files of one kernel are known, which is what Triton makes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from esper.errors import ArtifactCorrupt

EM_CUDA = 190
_HEADER, _SECTION = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQIIQQ")
_NOBITS = 8  # a section that takes no room in the file
_MAX_SECTIONS = 256
# Attributes of .nv.info (of all functions) and of .nv.info.NAME (of one).
_REGCOUNT, _FRAME_SIZE, _KPARAM_INFO, _REQNTID = 0x2F, 0x11, 0x17, 0x10
_WITH_PAYLOAD = 4  # EIFMT_SVAL; the other formats are four bytes in all


@dataclass(frozen=True)
class Cubin:
    """One kernel. `parameters` are the sizes in bytes of what is passed, each at the first
    multiple of its size after the one before; `shared` the bytes reserved at compile time, to
    which a launch adds; `stack` the bytes of local memory a thread needs, for spills mostly."""

    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    threads: int
    parameters: tuple[int, ...]


def read_cubin(content: bytes) -> Cubin:
    """Read a cubin of exactly one kernel. Never reads outside of `content`.

    Raises:
        ArtifactCorrupt: it is none, or it contradicts itself.
    """
    try:
        return _read(content)
    except (struct.error, ValueError, IndexError, KeyError) as e:
        raise ArtifactCorrupt(f"the cubin of {len(content)} bytes cannot be read: {e!r}") from e


def _read(content: bytes) -> Cubin:
    head = _HEADER.unpack_from(content)
    ident, machine, flags = head[0], head[2], head[7]
    if ident[:6] != b"\x7fELF\x02\x01" or machine != EM_CUDA:
        raise ArtifactCorrupt("not a cubin: no 64-bit ELF file for an NVIDIA GPU")
    # CUDA 13 moved the arch; the ABI's version says where it is.
    arch = flags & 0xFF if ident[8] <= 7 else flags >> 8 & 0xFF
    sections = _sections(content, offset=head[6], count=head[12], names=head[13])
    kernels = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
    if len(kernels) != 1:
        raise ArtifactCorrupt(f"a cubin has one kernel, this one has {kernels[:8]}")
    (name,) = kernels
    whole = dict(_attributes(sections[".nv.info"][0]))
    own = list(_attributes(sections[f".nv.info.{name}"][0]))
    required = [struct.unpack("<III", payload) for kind, payload in own if kind == _REQNTID]
    if len(required) != 1 or required[0][1:] != (1, 1):
        raise ArtifactCorrupt(f"{name} does not say how many threads it is made for")
    return Cubin(
        arch=f"sm_{arch}", name=name,
        registers=struct.unpack("<II", whole[_REGCOUNT])[1],
        stack=struct.unpack("<II", whole[_FRAME_SIZE])[1],
        shared=sections[f".nv.shared.{name}"][1] if f".nv.shared.{name}" in sections else 0,
        threads=required[0][0],
        parameters=_parameters(name, [p for kind, p in own if kind == _KPARAM_INFO]),
    )


def _sections(
    content: bytes, offset: int, count: int, names: int
) -> dict[str, tuple[bytes, int]]:
    """Content and size of every section by its name."""
    if count > _MAX_SECTIONS:
        raise ArtifactCorrupt(f"{count} sections, a cubin of one kernel has a few")
    if offset + count * _SECTION.size > len(content):
        raise ArtifactCorrupt(f"{count} sections from byte {offset} on end beyond the cubin")
    raw = [_SECTION.unpack_from(content, offset + i * _SECTION.size) for i in range(count)]

    def inside(section: tuple[int, ...]) -> bytes:
        start, size = section[4], section[5]
        if section[1] == _NOBITS:
            return b""
        if start + size > len(content):
            raise ArtifactCorrupt(
                f"a section ends at byte {start + size}, the cubin has {len(content)}"
            )
        return content[start : start + size]

    table = inside(raw[names])
    found: dict[str, tuple[bytes, int]] = {}
    for section in raw:
        name = table[section[0] : table.index(b"\0", section[0])].decode("ascii")
        found[name] = inside(section), section[5]
    return found


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(info):
        form, kind, size = struct.unpack_from("<BBH", info, place)
        place += 4
        if form == _WITH_PAYLOAD:
            if place + size > len(info):
                raise ArtifactCorrupt("an attribute of the cubin ends beyond its section")
            yield kind, info[place : place + size]
            place += size


def _parameters(name: str, payloads: list[bytes]) -> tuple[int, ...]:
    # (ordinal, offset, size), in the order in which they are passed.
    found = sorted((ordinal, offset, flags >> 18) for _, ordinal, offset, flags in (
        struct.unpack("<IHHI", payload) for payload in payloads))
    end = 0
    for i, (ordinal, offset, size) in enumerate(found):
        end += -end % size if size in (4, 8) else 0
        if ordinal != i or offset != end or size not in (4, 8):
            raise ArtifactCorrupt(
                f"parameter {ordinal} of {name} has {size} bytes at {offset}, expected 4 or 8 at "
                f"{end}"
            )
        end += size
    return tuple(size for _, _, size in found)
