"""Compiles every Triton kernel, in every form that is launched, for GPUs that need not be here."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from esper.triton_kernels import blend, gated_mlp, low_rank

FLOATS = {"fp32": "ieee", "bf16": "ieee", "fp16": "ieee"}


def forms() -> list[tuple[Any, str, dict[str, str], dict[str, Any]]]:
    """(kernel, what form, types of the arguments, constants)"""
    found: list[tuple[Any, str, dict[str, str], dict[str, Any]]] = []
    for dtype in (*FLOATS, "fp64"):
        wide = {"WIDE": dtype == "fp64", "BLOCK": blend.BLOCK}
        for kernel in (blend.blend_forward, blend.blend_backward):
            names = kernel.arg_names[:5]
            types = [f"*{dtype}"] * 3 + ["i64", "i32"]
            found.append((kernel, dtype, dict(zip(names, types, strict=True)), wide))
    for dtype in FLOATS:
        precisions = ("ieee", "tf32") if dtype == "fp32" else ("ieee",)
        for precision in precisions:
            tiles = {"PRECISION": precision, "ROWS": 64, "COLUMNS": 64, "INNER": 32}
            for on in (True, False):
                names = gated_mlp.gate_forward.arg_names[:11]
                types = [f"*{dtype}"] * 8 + ["i32"] * 3
                flags = {"HAS_BG": on, "HAS_BU": on, "SAVE": on, **tiles}
                found.append((gated_mlp.gate_forward, f"{dtype} {precision} {on}",
                              dict(zip(names, types, strict=True)), flags))
                names = low_rank.low_rank_map.arg_names[:14]
                types = [f"*{dtype}"] * 6 + ["i32"] * 8
                flags = {"HAS_BIAS": on, "RANK": low_rank.MAX_RANK if on else 16, **tiles}
                found.append((low_rank.low_rank_map, f"{dtype} {precision} {on}",
                              dict(zip(names, types, strict=True)), flags))
        names = gated_mlp.gate_backward.arg_names[:6]
        types = [f"*{dtype}"] * 5 + ["i32"]
        found.append((gated_mlp.gate_backward, dtype, dict(zip(names, types, strict=True)),
                      {"BLOCK": gated_mlp.BLOCK}))
    return found


if __name__ == "__main__":
    for arch in (80, 90):
        for kernel, form, types, constants in forms():
            signature = {**types, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(kernel, signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
            code = compiled.asm["cubin"]
            assert code[:4] == b"\x7fELF", code[:4]
            shared = compiled.metadata.shared
            # What one block may have, by the CUDA programming guide: 163 KiB, 227 KiB.
            assert shared <= {80: 163, 90: 227}[arch] << 10, (kernel.__name__, form, shared)
            print(f"sm_{arch} {kernel.__name__} {form}: {len(code)} bytes, {shared} shared")
