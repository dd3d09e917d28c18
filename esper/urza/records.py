"""Rows of the database as the records of `esper.leyline.library`."""

from __future__ import annotations

import json
import sqlite3

from esper.leyline.artifact import Manifest, Pipeline
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.events import Priority
from esper.leyline.library import BlueprintRecord, Change, KernelRecord, Lease
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus
from esper.leyline.signature import SiteSignature
from esper.leyline.verdict import ValidationReport


def blueprint_record(row: sqlite3.Row) -> BlueprintRecord:
    return BlueprintRecord(
        blueprint_id=row["blueprint_id"],
        signature=SiteSignature.model_validate_json(row["signature"]),
        ir=BlueprintIR.model_validate_json(row["ir"]),
        author=row["author"],
        parents=tuple(json.loads(row["parents"])),
        interest=row["interest"],
        priority=Priority(row["priority"]),
        pipeline=None if row["pipeline"] is None else Pipeline(row["pipeline"]),
        status=BlueprintStatus(row["status"]),
        reason=row["reason"],
        submitted=row["submitted"],
        updated=row["updated"],
    )


def kernel_record(row: sqlite3.Row) -> KernelRecord:
    report = row["report"]
    return KernelRecord(
        kernel_id=row["kernel_id"],
        blueprint_id=row["blueprint_id"],
        manifest=Manifest.model_validate_json(row["manifest"]),
        digest=row["digest"],
        size=row["size"],
        status=KernelStatus(row["status"]),
        reason=row["reason"],
        report=None if report is None else ValidationReport.model_validate_json(report),
        created=row["created"],
        updated=row["updated"],
    )


def change(row: sqlite3.Row) -> Change:
    return Change(
        sequence=row["seq"],
        time=row["time"],
        item=row["item"],
        signature_id=row["signature_id"],
        before=row["before"],
        after=row["after"],
        reason=row["reason"],
    )


def lease(row: sqlite3.Row) -> Lease:
    """The lease of a row that is being worked on, of blueprints or of kernels."""
    of_kernel = "manifest" in row.keys()  # noqa: SIM118  a Row iterates over its values
    if of_kernel:
        signature = Manifest.model_validate_json(row["manifest"]).signature
    else:
        signature = SiteSignature.model_validate_json(row["signature"])
    return Lease(
        item=row["kernel_id" if of_kernel else "blueprint_id"],
        signature=signature,
        worker=row["worker"],
        since=row["updated"],
        expires=row["expires"],
    )
