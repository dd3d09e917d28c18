"""A run folder: everything a run leaves behind, written as it happens.

    run.json           what was run: configuration, versions, seed, start
    epochs.jsonl       one EpochRow per epoch
    steps.npy          duration of every step in seconds, float64
    growth_steps.npy   completed steps at each transition, int64
    audit.jsonl        see `esper.nissa.audit`
    kernels.json       kernels and blueprints the run considered
    summary.json       both arms of the comparison
    undone.jsonl       what was done after the checkpoint that the run was resumed from
    checkpoints/       see `esper.tolaria.checkpoint`

What was not measured is absent: a file that is not there, a field that is null. Nothing is
ever filled in with zero.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from esper.errors import ContractError
from esper.files import write_whole
from esper.leyline.base import Contract
from esper.leyline.events import new_id
from esper.leyline.library import BlueprintRecord, KernelRecord, QueueDepths
from esper.leyline.verdict import Hardware
from esper.nissa.audit import AuditLog, AuditRecord, read_audit


class BudgetRow(Contract):
    """What all seeds took of one budget; `spent` is None where a part of it was never measured."""

    name: str
    unit: str = ""
    spent: float | None = None
    limit: float

    @property
    def of(self) -> str:
        """Such as "1.2 of 3 ms"."""
        spent, limit = ("not known" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.3g}"
                        for v in (self.spent, self.limit))
        return f"{spent} of {limit} {self.unit}".rstrip()


class EpochRow(Contract):
    """One epoch. Losses in the run's own units, accuracy in [0, 1], `step` completed steps.

    `flops_per_sample` is one forward pass; `seconds` the wall time since training began.
    """

    epoch: int = Field(ge=0)
    step: int = Field(ge=0)
    train_loss: float | None = None
    eval_loss: float
    eval_accuracy: float | None = None
    parameters: int = Field(ge=0)
    flops_per_sample: int | None = None
    seconds: float = Field(ge=0)
    active_sites: tuple[str, ...] = ()
    depths: QueueDepths | None = None
    capacity: float | None = None
    budgets: tuple[BudgetRow, ...] = ()


class RunInfo(Contract):
    """What was run, known before the first step. `started` is in UTC seconds.

    `eval_samples` and `samples_per_epoch` let the report judge noise and count FLOPs; `metric`
    names the loss ("cross entropy", say); `primary` is what the run is judged by; `sites` are
    all that could have grown.
    """

    run_id: str = Field(default_factory=lambda: new_id("run"))
    name: str
    seed: int
    started: float = Field(default_factory=time.time)
    config: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: Hardware | None = None
    sites: tuple[str, ...] = ()
    metric: str = "loss"
    primary: Literal["accuracy", "loss"] = "accuracy"
    samples_per_epoch: int | None = None
    eval_samples: int | None = None


class Arm(Contract):
    """One of the two trainings that are compared."""

    label: str
    epochs: tuple[EpochRow, ...]

    @property
    def last(self) -> EpochRow | None:
        return self.epochs[-1] if self.epochs else None

    def training_flops(self, samples_per_epoch: int | None) -> int | None:
        """Forward and backward of all epochs, a backward counted as two forwards.

        None where a count is missing, so that a sum is never short of an epoch.
        """
        counts = [row.flops_per_sample for row in self.epochs]
        if samples_per_epoch is None or not counts or any(c is None for c in counts):
            return None
        return 3 * samples_per_epoch * sum(c for c in counts if c is not None)


class RunSummary(Contract):
    """What growth bought. `control` is the same host, data, seed and epochs without growth;
    None where no control was trained, with the reason in `no_control`."""

    grown: Arm
    control: Arm | None = None
    no_control: str = ""
    seconds: float = Field(ge=0)
    audit_lost: int = Field(default=0, ge=0)


class KernelBook(Contract):
    """Kernels and blueprints the run considered, the rejected and the invalid ones too."""

    kernels: tuple[KernelRecord, ...] = ()
    blueprints: tuple[BlueprintRecord, ...] = ()


def fresh_folder(wanted: str | Path) -> Path:
    """`wanted`, or `wanted-2`, `wanted-3`, ... where a run is in it already."""
    wanted = Path(wanted)
    folder, n = wanted, 1
    while (folder / "run.json").exists():
        n += 1
        folder = wanted.with_name(f"{wanted.name}-{n}")
    return folder


class RunLog:
    """Writes a run folder. Owned by the training thread; a context manager.

    With `going_on` it writes on where a run in this folder was interrupted; see `undo_after`.

    Raises:
        ContractError: the folder holds a run already, or, to go on, none.
    """

    def __init__(self, folder: str | Path, *, going_on: bool = False) -> None:
        self.folder = Path(folder)
        if going_on:
            read_info(self.folder)
        elif (self.folder / "run.json").exists():
            raise ContractError(
                f"{self.folder} holds a run already; give a folder of its own to every run "
                "(fresh_folder finds the next free one)"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.audit = AuditLog(self.folder / "audit.jsonl")

    def undo_after(self, epoch: int, time: float) -> tuple[EpochRow, ...]:
        """Put aside what the run did after the checkpoint that it goes on from: rows of epochs
        beyond `epoch`, and audit records written after `time` (UTC seconds), move to
        undone.jsonl. Returns the rows that stay."""
        rows = _read_epochs(self.folder / "epochs.jsonl", [])
        stay = tuple(r for r in rows if r.epoch <= epoch)
        self.audit.close()
        undone = [r.model_dump_json() for r in rows if r.epoch > epoch]
        kept: list[bytes] = []
        for line in (self.folder / "audit.jsonl").read_bytes().splitlines():
            try:
                late = json.loads(line)["time"] > time
            except (ValueError, KeyError, TypeError):
                late = True  # torn by what interrupted the run
            if late:
                undone.append(line.decode(errors="replace"))
            else:
                kept.append(line)
        with (self.folder / "undone.jsonl").open("a") as out:
            out.writelines(f"{line}\n" for line in undone)
        write_whole(self.folder / "audit.jsonl", b"".join(line + b"\n" for line in kept))
        write_whole(self.folder / "epochs.jsonl",
                    b"".join(r.model_dump_json().encode() + b"\n" for r in stay))
        self.audit = AuditLog(self.folder / "audit.jsonl")
        return stay

    def begin(self, info: RunInfo) -> None:
        """Write run.json, before the first step."""
        self._write("run.json", info)

    def observe(self, record: Contract) -> None:
        """Audit a Transition, Command, FieldReport or Event: an observer for a `Session`."""
        self.audit.observe(record)

    def epoch(self, row: EpochRow) -> None:
        """Append one epoch."""
        with (self.folder / "epochs.jsonl").open("ab", buffering=0) as out:
            out.write(row.model_dump_json().encode() + b"\n")

    def steps(self, seconds: Sequence[float], growth_steps: Sequence[int]) -> None:
        """Write how long each step took and after how many steps each transition happened.

        `growth_steps` is `Session.growth_steps` as it stands: n means between the step of
        index n - 1, whose time includes what a step boundary costs, and that of index n.
        """
        for name, values in (
            ("steps.npy", np.asarray(seconds, dtype=np.float64)),
            ("growth_steps.npy", np.unique(np.asarray(growth_steps, dtype=np.int64))),
        ):
            partial = self.folder / f"{name}.partial"
            with partial.open("wb") as out:
                np.save(out, values, allow_pickle=False)
            os.replace(partial, self.folder / name)

    def kernels(
        self, kernels: Sequence[KernelRecord], blueprints: Sequence[BlueprintRecord] = ()
    ) -> None:
        """Write what the library offered, as it stands now; later calls replace earlier ones."""
        self._write("kernels.json", KernelBook(kernels=tuple(kernels),
                                               blueprints=tuple(blueprints)))

    def finish(self, summary: RunSummary) -> None:
        """Write summary.json, at the end."""
        lost = {"audit_lost": self.audit.lost}
        self._write("summary.json", summary.model_copy(update=lost))

    def _write(self, name: str, value: Contract) -> None:
        write_whole(self.folder / name, value.model_dump_json(indent=1).encode())

    def close(self) -> None:
        self.audit.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class Run:
    """A run folder as read back. `notes` says what was missing or torn, in words."""

    folder: Path
    info: RunInfo
    epochs: tuple[EpochRow, ...]
    audit: tuple[AuditRecord, ...]
    book: KernelBook | None
    summary: RunSummary | None
    steps: npt.NDArray[np.float64] | None
    growth_steps: npt.NDArray[np.int64] | None
    notes: tuple[str, ...] = field(default=())


_EXPECTED: Mapping[str, str] = {
    "epochs.jsonl": "no epoch was completed",
    "audit.jsonl": "there is no audit trail",
    "kernels.json": "the kernels considered were not written down",
    "summary.json": "the run did not reach its end, or was not summed up",
    "steps.npy": "step times were not kept",
}


def read_info(folder: Path) -> RunInfo:
    """What was run in a folder.

    Raises:
        ContractError: there is no run.json, or it is not what it should be.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise ContractError(
            f"{folder} is not a run folder: it has no run.json; give the folder that "
            "`esper train` named at its end"
        )
    try:
        return RunInfo.model_validate_json(path.read_bytes())
    except ValidationError as e:
        raise ContractError(f"{path} is not a RunInfo: {e}") from e


def _read_epochs(path: Path, notes: list[str]) -> tuple[EpochRow, ...]:
    rows = []
    if not path.exists():
        return ()
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(EpochRow.model_validate_json(line))
        except ValidationError as e:
            if number < len(lines):  # the torn one has no newline behind it
                raise ContractError(f"{path}: line {number} is not an epoch: {e}") from e
            notes.append(f"the last line of {path.name} is torn and was left out")
    return tuple(rows)


def read_run(folder: str | Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        ContractError: there is no run.json, or a file is not what it should be.
    """
    folder = Path(folder)
    info = read_info(folder)
    notes = [f"{name} is missing: {why}" for name, why in _EXPECTED.items()
             if not (folder / name).exists()]

    def load(name: str, contract: type[Any]) -> Any:
        path = folder / name
        if not path.exists():
            return None
        try:
            return contract.model_validate_json(path.read_bytes())
        except ValidationError as e:
            raise ContractError(f"{path} is not a {contract.__name__}: {e}") from e

    def array(name: str) -> Any:
        path = folder / name
        return np.load(path, allow_pickle=False) if path.exists() else None

    epochs, audit = folder / "epochs.jsonl", folder / "audit.jsonl"
    return Run(
        folder=folder,
        info=info,
        epochs=_read_epochs(epochs, notes),
        audit=tuple(read_audit(audit, notes.append)) if audit.exists() else (),
        book=load("kernels.json", KernelBook),
        summary=load("summary.json", RunSummary),
        steps=array("steps.npy"),
        growth_steps=array("growth_steps.npy"),
        notes=tuple(notes),
    )
