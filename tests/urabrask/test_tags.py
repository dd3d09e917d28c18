"""Tags: fixed rules first, then the best quarter of the peers; never without evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from esper.leyline.artifact import Manifest, ParameterSpec, Pipeline, Toolchain
from esper.leyline.signature import SiteKind, SiteSignature
from esper.leyline.verdict import (
    Hardware,
    Measurement,
    ProofCase,
    SpeedVerdict,
    ValidationReport,
)
from esper.urabrask.tags import ENOUGH, Measured, tags

SITE = SiteSignature(kind=SiteKind.FEATURES, channels=16)
HERE = Hardware(cpu="a cpu", isa="AVX2", cores=2, threads=1)
OLD = Path(__file__).parents[1] / "leyline" / "reports"


def manifest(name: str = "k-0", shape: tuple[int, ...] = (16, 16)) -> Manifest:
    return Manifest(
        kernel_id=name, blueprint_id="bp-0", signature=SITE, pipeline=Pipeline.FAST,
        toolchain=Toolchain(torch="2", isa="AVX2", compiler="g++", esper="0"),
        parameters=(ParameterSpec(name="n.weight", shape=shape),),
        backward_inputs=("grad",), gradients=(0, 1), sha256={}, compile_seconds=1.0, flops=1,
    )


def measurement(low: float, verdict: SpeedVerdict = SpeedVerdict.FAST) -> Measurement:
    return Measurement(
        batch=16, space=8, speedup=low * 1.1, low=low, high=low * 1.2, verdict=verdict,
        kernel_seconds=(1e-3, 1e-3), eager_seconds=(1.1e-3, 1.1e-3),
    )


def report(
    lows: Sequence[float] = (1.3,), *, ratio: float = 0.9, peak: int | None = 90,
    eager_peak: int | None = 100, where: Hardware | None = HERE,
) -> ValidationReport:
    proof = tuple(
        ProofCase(name=name, batch=3, space=5, worst_ratio=ratio, passed=True)
        for name in ("batch 3", "batch 9, magnitude 32")
    )
    return ValidationReport(
        kernel_id="k-0", accepted=True, proof=proof,
        measurements=tuple(measurement(low) for low in lows), hardware=where,
        peak_memory_bytes=peak, eager_peak_memory_bytes=eager_peak, seconds=1.0,
    )


def found(own: ValidationReport, peers: Sequence[Measured] = ()) -> dict[str, float]:
    made = tags(manifest(), own, peers)
    assert all("a cpu, AVX2, 1 thread" in t.evidence for t in made)
    return {t.name: t.value for t in made}


def peers(count: int, low: float, **changes: object) -> list[Measured]:
    made = report([low], **changes)  # type: ignore[arg-type]
    return [(manifest(f"k-{i + 1}"), made) for i in range(count)]


def test_high_speed_needs_every_shape_and_quotes_the_lowest_bound() -> None:
    assert found(report([1.3, 1.06]))["high_speed"] == 1.06
    slow = report().model_copy(
        update={"measurements": (measurement(1.3), measurement(0.9, SpeedVerdict.SAME))}
    )
    assert "high_speed" not in found(slow)
    assert "high_speed" not in found(report([]))  # not measured is not fast


def test_memory_is_low_only_where_both_sides_were_measured() -> None:
    assert found(report(peak=70))["low_memory"] == 0.7
    assert "low_memory" not in found(report(peak=90))
    assert "low_memory" not in found(report(peak=None))
    assert "low_memory" not in found(report(peak=70, eager_peak=None))


def test_parameters_precision_and_stability() -> None:
    assert {"few_parameters", "numerically_stable", "high_precision"} <= set(found(report()))
    large = {t.name for t in tags(manifest(shape=(32, 16)), report(), ())}
    assert "few_parameters" not in large
    assert {"numerically_stable", "high_precision"} & set(found(report(ratio=1.2))) == {
        "numerically_stable"
    }


def test_enough_peers_ask_for_the_best_quarter() -> None:
    own = report([1.3])
    assert "high_speed" in found(own, peers(ENOUGH - 1, 1.5))
    assert "high_speed" not in found(own, peers(ENOUGH, 1.5))
    assert "high_speed" in found(own, peers(ENOUGH, 1.2))
    made = tags(manifest(), own, peers(ENOUGH, 1.2))
    assert f"best quarter of {ENOUGH} peers" in made[0].evidence


def test_being_the_best_of_slow_ones_is_not_fast() -> None:
    same = report().model_copy(update={"measurements": (measurement(0.98, SpeedVerdict.SAME),)})
    assert "high_speed" not in found(same, peers(ENOUGH, 0.7))


@pytest.mark.parametrize("elsewhere", [None, HERE.model_copy(update={"threads": 2})])
def test_peers_of_other_hardware_do_not_count(elsewhere: Hardware | None) -> None:
    assert "high_speed" in found(report([1.3]), peers(ENOUGH, 1.5, where=elsewhere))


def test_a_kernel_is_no_peer_of_itself_and_other_signatures_are_none() -> None:
    own = report([1.3])
    other = manifest().model_copy(
        update={"signature": SiteSignature(kind=SiteKind.FEATURES, channels=8)}
    )
    faster = report([1.5])
    assert "high_speed" in found(own, [(manifest(), faster)] * ENOUGH)
    assert "high_speed" in found(
        own, [(other.model_copy(update={"kernel_id": f"k-{i}"}), faster) for i in range(1, 20)]
    )


@pytest.mark.parametrize("path", sorted(OLD.glob("*.json")), ids=lambda p: p.stem)
def test_reports_of_earlier_versions_are_read_and_what_they_lack_is_absent(path: Path) -> None:
    old = ValidationReport.model_validate_json(path.read_bytes())
    assert old.accepted and old.speedup and old.measurements
    assert old.peak_memory_bytes and old.eager_peak_memory_bytes is None
    assert old.roofline is None and old.risk is None and old.drift == ()
    for m in old.measurements:
        assert m.forward is None and m.cost is None and m.compiled_seconds == ()
    assert old.speedup_over_compile is None
    assert "low_memory" not in {t.name for t in tags(manifest(), old, ())}
    assert ValidationReport.model_validate_json(old.model_dump_json()) == old
