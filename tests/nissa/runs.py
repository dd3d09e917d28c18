"""A run folder as a real run leaves it, with figures made up for the tests of the report."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.command import Action, Command, FieldReport, Transition
from esper.leyline.events import Event, Priority, Topic
from esper.leyline.library import BlueprintRecord, KernelRecord
from esper.leyline.lifecycle import BlueprintStatus, KernelStatus, SeedState
from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import (
    Hardware,
    Measurement,
    ProofCase,
    SpeedVerdict,
    Tag,
    ValidationReport,
)
from esper.nissa.metrics import Arm, EpochRow, RunInfo, RunLog, RunSummary
from tests.artifacts import members

SITE = SiteSignature(kind=SiteKind.MAP, channels=8)
HARDWARE = Hardware(cpu="A Processor 9000", isa="AVX2", cores=2, threads=1)
STEPS_PER_EPOCH, EPOCHS = 17, 120
S = SeedState
# What happened to each seed: site, kernel, (epoch, state, trigger) one after the other.
LIVES = (
    ("tr-1", "blocks.1", 0, 0.061, (
        (11, S.GERMINATED, "schedule: every 10 epochs from 10; gradient signal 3.1"),
        (11.2, S.TRAINING, "kernel fetched, verified and opened"),
        (13, S.GRAFTING, "isolated learning shows a gain of +0.0612"),
        (17, S.STABILIZATION, "alpha reached 1"),
        (19, S.EVALUATING, "settled for 2 epochs"),
        (20, S.FINE_TUNING, "counterfactual gain +0.0583"),
        (23, S.FOSSILIZED, "gain +0.061 kept through fine-tuning"))),
    ("tr-2", "blocks.0", 1, -0.0004, (
        (31, S.GERMINATED, "schedule: every 10 epochs from 10; gradient signal 2.2"),
        (31.2, S.TRAINING, "kernel fetched, verified and opened"),
        (36, S.CULLED, "no signal in 5 epochs: gain -0.0004"),
        (41, S.DORMANT, "embargo is over"))),
    ("tr-3", "blocks.1", 1, 0.0143, (
        (51, S.GERMINATED, "schedule: every 10 epochs from 10; gradient signal 1.6"),
        (51.3, S.TRAINING, "kernel fetched, verified and opened"),
        (54, S.GRAFTING, "isolated learning shows a gain of +0.0143"),
        (58, S.STABILIZATION, "alpha reached 1"),
        (60, S.EVALUATING, "settled for 2 epochs"),
        (61, S.FINE_TUNING, "counterfactual gain +0.0151"),
        (64, S.FOSSILIZED, "gain +0.0143 kept through fine-tuning"))),
    ("tr-4", "blocks.0", 0, None, (
        (81, S.GERMINATED, "schedule: every 10 epochs from 10; gradient signal 0.9"),
        (81.2, S.TRAINING, "kernel fetched, verified and opened"),
        (83, S.GRAFTING, "isolated learning shows a gain of +0.0021"),
        (85, S.ROLLED_BACK, "loss nan at step 1445; recent median 0.1031"),
        (90, S.DORMANT, "embargo is over"))),
)


def blueprint(name: str, act: Op = Op.GELU, kernel: int | None = None) -> BlueprintIR:
    first = (
        Node(id="first", op=Op.CONV, inputs=("h",), out=C, kernel=kernel)
        if kernel else Node(id="first", op=Op.LINEAR, inputs=("h",), out=Width(times=2))
    )
    return BlueprintIR(
        kind=SiteKind.MAP, name=name, output="sum",
        nodes=(
            first,
            Node(id="act", op=act, inputs=("first",)),
            Node(id="up", op=Op.LINEAR, inputs=("act",), out=C, init=Init.ZERO),
            Node(id="sum", op=Op.ADD, inputs=("h", "up")),
        ),
    )


def measurement(speedup: float, spread: float, batch: int, rng: np.random.Generator) -> Measurement:
    low, high = speedup - spread, speedup + spread
    verdict = (SpeedVerdict.FAST if low > 1.05 else SpeedVerdict.SLOW if high < 0.95
               else SpeedVerdict.SAME if spread < 0.05 else SpeedVerdict.AMBIGUOUS)
    base = 4e-5 * batch
    return Measurement(
        batch=batch, space=8, speedup=speedup, low=low, high=high, verdict=verdict,
        kernel_seconds=tuple(base * rng.normal(1, 0.03, 20)),
        eager_seconds=tuple(base * speedup * rng.normal(1, 0.03, 20)))


def kernel(ir: BlueprintIR, report: ValidationReport | None, status: KernelStatus,
           reason: str = "") -> KernelRecord:
    from esper.leyline.artifact import MANIFEST, Manifest

    made = members(ir, SITE, {"forward.so": b"f", "backward.so": b"b"},
                   pipeline=Pipeline.STANDARD)
    manifest = Manifest.model_validate_json(made[MANIFEST])
    if report is not None:
        report = report.model_copy(update={"kernel_id": manifest.kernel_id})
    return KernelRecord(kernel_id=manifest.kernel_id, blueprint_id=ir.id, manifest=manifest,
                        digest="0" * 64, size=1 << 16, status=status, reason=reason,
                        report=report, created=1.7e9, updated=1.7e9)


def _kernels(rng: np.random.Generator) -> tuple[list[KernelRecord], list[BlueprintRecord]]:
    irs = [blueprint("wide inverted bottleneck"), blueprint("gated 3x3", Op.SILU, 3),
           blueprint("tanh mixer", Op.TANH), blueprint("sigmoid 5x5", Op.SIGMOID, 5),
           blueprint("relu <3x3> & more", Op.RELU, 3)]
    case = ProofCase(name="odd", batch=7, space=5, worst_ratio=1.2, passed=True)
    kernels = []
    for ir, speeds in zip(irs[:3], ((1.62, 1.38), (1.21, 1.04), (0.88, 0.91)), strict=True):
        ms = tuple(measurement(s, w, b, rng)
                   for s, w, b in zip(speeds, (0.06, 0.11), (16, 256), strict=True))
        tags = tuple(Tag(name=n, evidence=f"batch {m.batch}, {HARDWARE.cpu}", value=m.speedup)
                     for n, m in (("fast", ms[0]),) if m.low > 1.05)
        kernels.append(kernel(ir, ValidationReport(
            kernel_id="", accepted=True, proof=(case,), measurements=ms,
            tags=(*tags, Tag(name="small", evidence="parameters", value=280)),
            hardware=HARDWARE, seconds=9.5), KernelStatus.VALIDATED))
    why = ("gradient of first.weight is 41 times eager's own error at batch 7, space 5\n"
           "frame #0: what the runtime had to say about it")
    kernels.append(kernel(irs[3], ValidationReport(
        kernel_id="", accepted=False, reason=why, seconds=2.1,
        proof=(case.model_copy(update={"passed": False, "worst_ratio": 41.0}),)),
        KernelStatus.REJECTED, why))
    records = [
        BlueprintRecord(
            blueprint_id=ir.id, signature=SITE, ir=ir, author="karn", interest=0.5,
            priority=Priority.NORMAL, submitted=1.7e9, updated=1.7e9,
            status=BlueprintStatus.INVALID if i == 4 else BlueprintStatus.COMPILED,
            reason="no gradient reaches first.weight: up starts at zero and relu is dead"
            if i == 4 else "")
        for i, ir in enumerate(irs)
    ]
    return kernels, records


def _rows(rng: np.random.Generator, grown: bool) -> list[EpochRow]:
    rows = []
    for epoch in range(1, EPOCHS + 1):
        fossils = sum(epoch >= at for at in (23, 64)) if grown else 0
        better = (1 - math.exp(-max(0, epoch - 14) / 12)) * grown
        loss = 0.30 - 0.13 * better + 1.9 * math.exp(-epoch / 9) + rng.normal(0, 0.008)
        accuracy = 0.905 + 0.052 * better - 0.75 * math.exp(-epoch / 8) + rng.normal(0, 0.003)
        rows.append(EpochRow(
            epoch=epoch, step=epoch * STEPS_PER_EPOCH, train_loss=loss - 0.04, eval_loss=loss,
            eval_accuracy=min(1.0, max(0.1, accuracy)), parameters=1354 + 296 * fossils,
            flops_per_sample=161_000 + 36_000 * fossils,
            seconds=epoch * (0.41 if grown else 0.33)))
    return rows


def write_run(folder: Path, control: bool = True, gain: bool = True) -> Path:
    """A finished run of 120 epochs with two seeds kept, one culled and one rolled back."""
    rng = np.random.default_rng(0)
    kernels, blueprints = _kernels(rng)
    with RunLog(folder) as log:
        log.begin(RunInfo(
            run_id="run-1", name="digits", seed=0, started=1_753_000_000.0,
            config={"name": "digits", "train": {"epochs": EPOCHS}},
            versions={"torch": "2.13.0", "python": "3.11", "esper": "0.1.0"}, hardware=HARDWARE,
            sites=("blocks.0", "blocks.1"), metric="cross entropy", samples_per_epoch=1078,
            eval_samples=450))
        grown, alone = _rows(rng, gain), _rows(rng, False)
        growth_steps = []
        for row in grown:
            log.epoch(row)
        for trace, site, which, gain_of, life in LIVES:
            k, before = kernels[which], S.DORMANT
            for epoch, after, trigger in life:
                step = round(epoch * STEPS_PER_EPOCH)
                growth_steps.append(step)
                action = Action.GERMINATE if after is S.GERMINATED else Action.ADVANCE
                if after is S.DORMANT:  # nobody commands the end of an embargo
                    log.observe(Transition(
                        trace_id=trace, site=site, kernel_id=None, before=before, after=after,
                        trigger=trigger, step=step, epoch=int(epoch)))
                    continue
                log.observe(Command(trace_id=trace, action=action, site=site, reason=trigger,
                                    kernel_id=k.kernel_id, blueprint_id=k.blueprint_id))
                if after is S.ROLLED_BACK:
                    log.observe(Event(topic=Topic.ROLLBACK, sender="tolaria",
                                      body={"reason": trigger, "step": step}))
                log.observe(Transition(
                    trace_id=trace, site=site, kernel_id=k.kernel_id, before=before, after=after,
                    trigger=trigger, step=step, epoch=int(epoch)))
                before = after
                if after in (S.FOSSILIZED, S.CULLED, S.ROLLED_BACK):
                    log.observe(FieldReport(
                        run_id="run-1", trace_id=trace, site=site, kernel_id=k.kernel_id,
                        blueprint_id=k.blueprint_id, outcome=after, reason=trigger,
                        gain=gain_of, epochs=5))
        seconds = 2.1e-3 * rng.lognormal(0, 0.09, EPOCHS * STEPS_PER_EPOCH)
        seconds[rng.integers(0, len(seconds), 9)] *= rng.uniform(2, 9, 9)
        seconds[growth_steps] *= 1.4
        log.steps(seconds, growth_steps)
        log.kernels(kernels, blueprints)
        log.finish(RunSummary(
            grown=Arm(label="with growth", epochs=tuple(grown)),
            control=Arm(label="host alone", epochs=tuple(alone)) if control else None,
            no_control="" if control else "compare: false", seconds=92.0))
    return folder
