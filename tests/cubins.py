"""Cubins and plans put together by hand, apart from the compilers that make real ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from esper.leyline.blueprint import BlueprintIR
from esper.leyline.launch import CubinKernel, Plan
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.programs import Form, Program, program
from tests.tezzeret.templates import low_rank

SITE = SiteSignature(kind=SiteKind.FEATURES, channels=8, device="cuda")
IR: BlueprintIR = low_rank(SiteKind.FEATURES)
HIDDEN = 2


def cubin(
    name: str, sizes: Sequence[int], *, sm: int = 80, abi: int = 7, threads: int = 128,
    registers: int = 32, stack: int = 0, shared: int = 0, **broken: int,
) -> bytes:
    """A cubin of one kernel with no code, laid out as ptxas does; `broken` overrides fields of
    the ELF header: machine, sections (their count), at (where they begin)."""
    def attribute(kind: int, payload: bytes) -> bytes:
        return struct.pack("<BBH", 4, kind, len(payload)) + payload

    whole = attribute(0x2F, struct.pack("<II", 7, registers))
    whole += attribute(0x11, struct.pack("<II", 7, stack))
    own, offset = b"", 0
    for ordinal, size in enumerate(sizes):
        offset += -offset % size
        own = attribute(0x17, struct.pack("<IHHI", 0, ordinal, offset, size << 18)) + own
        offset += size
    own += struct.pack("<BBH", 3, 0x1B, 255) + attribute(0x10, struct.pack("<III", threads, 1, 1))
    made = [("", 0, b"", 0), (".shstrtab", 3, b"", 0), (".nv.info", 0x70000000, whole, None),
            (f".nv.info.{name}", 0x70000000, own, None), (f".text.{name}", 1, b"code", None),
            (f".nv.shared.{name}", 8, b"", shared)]
    names = b"".join(n.encode() + b"\0" for n, *_ in made)
    body, table, place = b"", b"", 0
    for title, kind, content, size in made:
        content = names if title == ".shstrtab" else content
        at = 64 + len(body)
        body += content
        table += struct.pack("<IIQQQQIIQQ", place, kind, 0, 0, at,
                             len(content) if size is None or not size else size, 0, 0, 0, 0)
        place += len(title) + 1
    flags = sm | 0x500 | sm << 16 if abi <= 7 else 0x6000004 | sm << 8
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01\x33" + bytes([abi]) + bytes(7), 2,
        broken.get("machine", 190), 2, 0, 0, broken.get("at", 64 + len(body)), flags, 64, 0, 0, 64,
        broken.get("sections", len(made)), 1)
    return header + body + table


def described(form: Form, offset: int, code: bytes) -> CubinKernel:
    return CubinKernel(
        name=form.function.partition(".")[2], offset=offset, bytes=len(code),
        parameters=form.types, hidden=HIDDEN, warps=form.warps, shared=0,  # type: ignore[arg-type]
        registers=32, stack=0)


def plan_and_code(what: Program, arch: str = "sm_80") -> tuple[Plan, bytes]:
    """A plan of `what` and cubins without code that agree with it."""
    kernels: list[CubinKernel] = []
    cubins = b""
    for form in what.forms:
        sizes = [4 if t == "i32" else 8 for t in form.types] + [8] * HIDDEN
        code = cubin(form.function.partition(".")[2], sizes, sm=int(arch[3:]),
                     threads=32 * form.warps)
        kernels.append(described(form, len(cubins), code))
        cubins += code
    return Plan(arch=arch, kernels=tuple(kernels), forward=what.forward,
                backward=what.backward), cubins


def low_rank_program() -> Program:
    from esper.leyline.artifact import Pipeline

    return program(IR, SITE, Pipeline.FAST)
