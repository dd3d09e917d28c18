"""`esper library ls`, `query` and `show`: what Urza holds, for people."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from statistics import median
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.errors import NotInLibrary
from esper.leyline.library import BlueprintRecord, KernelRecord, Library
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.signature import SiteSignature

Record = TypeVar("Record", KernelRecord, BlueprintRecord)
STATUSES = (*KernelStatus, *BlueprintStatus)
_STYLES = {
    "VALIDATED": "green", "REJECTED": "red", "INVALID": "red", "QUARANTINED": "bold red",
    "RETIRED": "dim", "ARCHIVED": "dim",
}


def fits(wanted: str, signature: SiteSignature) -> bool:
    """`wanted` is the start of a signature's id, or words of its text: "map[8] float32"."""
    shown = str(signature).split()
    return signature.id.startswith(wanted) or all(
        any(have.startswith(word) for have in shown) for word in wanted.split()
    )


def styled_status(value: str) -> Text:
    return Text(value, style=_STYLES.get(value, "yellow"))


def age(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def short(identifier: str) -> str:
    return identifier[:14]


def list_library(
    library: Library,
    console: Console,
    *,
    signature: str | None = None,
    status: str | None = None,
    tag: str | None = None,
    blueprints: bool = False,
) -> None:
    """Print kernels, or blueprints; a status of blueprints' own asks for those as well."""
    if blueprints or (status is not None and status not in list(KernelStatus)):
        _list_blueprints(library, console, signature, status)
        return
    wanted = KernelStatus(status) if status is not None else None
    found = [k for k in library.kernels(status=wanted, tags=[tag] if tag else ())
             if signature is None or fits(signature, k.manifest.signature)]
    _table(found, library, console)


def _table(found: Sequence[KernelRecord], library: Library, console: Console) -> None:
    names = {b.blueprint_id: b.ir.name for b in library.blueprints()}
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("kernel", "blueprint", "site", "pipeline", "status"):
        table.add_column(heading, no_wrap=True)
    table.add_column("speedup", justify="right", no_wrap=True)
    table.add_column("tags", overflow="fold")
    table.add_column("age", justify="right", no_wrap=True)
    for k in found:
        speedup = k.report.speedup if k.report is not None else None
        table.add_row(
            short(k.kernel_id), names.get(k.blueprint_id) or short(k.blueprint_id),
            str(k.manifest.signature), k.manifest.pipeline, styled_status(k.status),
            "-" if speedup is None else f"{speedup:.2f}",
            ", ".join(t.name for t in k.report.tags) if k.report is not None else "-",
            age(k.created),
        )
    console.print(table if found else "no kernel matches")
    if found:
        console.print(f"{len(found)} kernels; esper library show ID tells all of one",
                      style="dim", highlight=False)


def _list_blueprints(
    library: Library, console: Console, signature: str | None, status: str | None
) -> None:
    found = [b for b in library.blueprints()
             if (signature is None or fits(signature, b.signature))
             and (status is None or b.status == status)]
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("blueprint", "name", "site", "author", "status"):
        table.add_column(heading, no_wrap=True)
    table.add_column("interest", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold")
    for b in found:
        table.add_row(short(b.blueprint_id), b.ir.name or "-", str(b.signature), b.author,
                      styled_status(b.status), f"{b.interest:.2f}", _first_line(b.reason))
    console.print(table if found else "no blueprint matches")


def _first_line(reason: str) -> str:
    """A reason may bring a compiler's output with it; `show` has the whole of it."""
    lines = reason.splitlines()
    return lines[0][:160] if lines else "-"


def _one(kind: str, wanted: str, records: Sequence[Record], ids: Sequence[str]) -> Record | None:
    """The record whose id starts with `wanted`; several that share a start are refused."""
    by_id = {i: r for i, r in zip(ids, records, strict=True) if i.startswith(wanted)}
    if len(by_id) > 1:
        raise NotInLibrary(
            f"{wanted!r} is the start of {len(by_id)} {kind} ids; give more of it: "
            + ", ".join(list(by_id)[:4])
        )
    return next(iter(by_id.values()), None)


def find(library: Library, wanted: str) -> KernelRecord | BlueprintRecord:
    """The kernel, or else the blueprint, whose id is or starts with `wanted`.

    Raises:
        NotInLibrary: no id starts so, or several do.
    """
    kernels = library.kernels()
    kernel = _one("kernel", wanted, kernels, [k.kernel_id for k in kernels])
    if kernel is not None:
        return kernel
    blueprints = library.blueprints()
    blueprint = _one("blueprint", wanted, blueprints, [b.blueprint_id for b in blueprints])
    if blueprint is None:
        raise NotInLibrary(
            f"no kernel or blueprint has an id that starts with {wanted!r}; the library holds "
            f"{len(kernels)} kernels and {len(blueprints)} blueprints, see: esper library ls"
        )
    return blueprint


def show(library: Library, console: Console, wanted: str, as_json: bool = False) -> None:
    """Print all that is known of one kernel or blueprint, by its id or a start of it.

    Raises:
        NotInLibrary: no id starts so, or several do.
    """
    record = find(library, wanted)
    if as_json:
        print(json.dumps(record.model_dump(mode="json"), indent=2))
    elif isinstance(record, KernelRecord):
        _show_kernel(record, console)
        made_from = [b for b in library.blueprints() if b.blueprint_id == record.blueprint_id]
        if made_from:
            console.print()
            _show_blueprint(made_from[0], console)
    else:
        _show_blueprint(record, console)


def query(
    library: Library, console: Console, tags: Sequence[str], signature: str | None, as_json: bool
) -> None:
    """Print the VALIDATED kernels that have every tag, the fastest first: what a run could
    choose from. Kernels that were not measured come last."""
    found = [k for k in library.kernels(status=KernelStatus.VALIDATED, tags=tags)
             if signature is None or fits(signature, k.manifest.signature)]
    found.sort(key=lambda k: -((k.report and k.report.speedup) or 0.0))
    if as_json:
        print(json.dumps([k.model_dump(mode="json") for k in found], indent=2))
    else:
        _table(found, library, console)


def _facts(console: Console, facts: Sequence[tuple[str, str | Text]]) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, value)
    console.print(grid)


def _show_kernel(k: KernelRecord, console: Console) -> None:
    m, r = k.manifest, k.report
    facts: list[tuple[str, str | Text]] = [
        ("kernel", k.kernel_id), ("status", styled_status(k.status)), ("reason", k.reason or "-"),
        ("blueprint", k.blueprint_id), ("site", str(m.signature)), ("pipeline", m.pipeline),
        ("built for", f"torch {m.toolchain.torch}, {m.toolchain.isa}, {m.toolchain.compiler}"),
        ("compiled in", f"{m.compile_seconds:.1f} s"),
        ("artifact", f"{k.size:,} bytes, sha256 {k.digest}"),
        ("parameters", ", ".join(f"{p.name} {list(p.shape)}" for p in m.parameters) or "none"),
        ("FLOPs", f"{m.flops:,} forward, one sample at space 8"),
    ]
    if r is None:
        _facts(console, [*facts, ("report", "not examined yet")])
        return
    passed = sum(c.passed for c in r.proof)
    facts += [
        ("verdict", Text("accepted", style="green") if r.accepted
         else Text(f"refused: {r.reason}", style="red")),
        ("proof", f"{passed} of {len(r.proof)} cases passed" if r.proof else "not made"),
        ("peak memory", "not measured" if r.peak_memory_bytes is None
         else f"{r.peak_memory_bytes:,} bytes"
         + ("" if r.eager_peak_memory_bytes is None
            else f", eager {r.eager_peak_memory_bytes:,}")),
        ("risk", "not known" if r.risk is None else f"{r.risk.score:.2f}, by {r.risk.basis}"),
        ("drift", ", ".join(f"{d.dtype} {d.kernel:.2g} (eager {d.eager:.2g})" for d in r.drift)
         or "not measured"),
        ("hardware", "not noted" if r.hardware is None else
         f"{r.hardware.cpu}, {r.hardware.isa}, {r.hardware.threads} of {r.hardware.cores} cores"),
    ]
    _facts(console, facts)
    if r.measurements:
        table = Table(box=None, header_style="dim", pad_edge=False, title_justify="left")
        for heading in ("batch", "space", "speedup", "95 %", "verdict", "kernel", "eager",
                        "samples"):
            table.add_column(heading, justify="right", no_wrap=True)
        for x in r.measurements:
            table.add_row(
                str(x.batch), str(x.space), f"{x.speedup:.3f}", f"{x.low:.3f} to {x.high:.3f}",
                x.verdict, _micro(x.kernel_seconds), _micro(x.eager_seconds),
                str(len(x.kernel_seconds)))
        console.print()
        console.print(table)
    for tag in r.tags:
        console.print(f"  {tag.name} {tag.value:g}: {tag.evidence}", highlight=False, markup=False)
    for case in (c for c in r.proof if not c.passed):
        console.print(f"  failed: {case.name}, batch {case.batch}, space {case.space}: "
                      f"{case.worst_ratio:g} times eager's error. {case.detail}",
                      style="red", highlight=False, markup=False)


def _micro(seconds: Sequence[float]) -> str:
    return f"{1e6 * median(seconds):.1f} us" if seconds else "-"


def _show_blueprint(b: BlueprintRecord, console: Console) -> None:
    _facts(console, [
        ("blueprint", b.blueprint_id), ("name", b.ir.name or "-"), ("site", str(b.signature)),
        ("status", styled_status(b.status)), ("reason", b.reason or "-"), ("author", b.author),
        ("interest", f"{b.interest:.2f}, priority {b.priority.name}"),
        ("parents", ", ".join(b.parents) or "none"),
    ])
    for n in b.ir.nodes:
        extras = [f"out={n.out}" if n.out is not None else "",
                  *(f"{f}={getattr(n, f)}" for f in ("kernel", "groups", "heads", "init")
                    if getattr(n, f) is not None)]
        console.print(f"  {n.id} = {n.op}({', '.join([*n.inputs, *filter(None, extras)])})",
                      highlight=False, markup=False)
    console.print(f"  return {b.ir.output}", highlight=False, markup=False)
