"""From the runs of an experiment to its figures: what `results.json` holds and the page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from esper.evaluation.experiment import ARMS
from esper.evaluation.statistics import Estimate, estimate

Run = dict[str, Any]
MATCHED = "big_matched"  # the arm whose usual end is the target, where none is named


@dataclass(frozen=True)
class Subject:
    """What was evaluated. `not_run` says of arms why they are not there."""

    name: str
    data: str
    metric: str
    higher_is_better: bool
    budget: int
    seeds: tuple[int, ...]
    tuning: bool
    target: float | None
    config: Mapping[str, Any]
    kernels: Mapping[str, Any] | None
    not_run: Mapping[str, str]


def summarise(subject: Subject, runs: Mapping[str, Mapping[int, Run]]) -> dict[str, Any]:
    """`runs` by arm and seed, failed ones included. Estimates are over seeds; differences are
    esper's value minus the other arm's, seed by seed."""
    finals = {arm: _finals(runs.get(arm, {})) for arm in ARMS}
    target, whence = subject.target, "the configuration"
    if target is None and finals[MATCHED]:
        target = float(np.median(list(finals[MATCHED].values())))
        whence = f"the median end of {MATCHED}"
    made = {
        "name": subject.name, "data": subject.data, "metric": subject.metric,
        "higher_is_better": subject.higher_is_better, "budget": subject.budget,
        "seeds": list(subject.seeds), "tuning": subject.tuning,
        "target": None if target is None else {"value": target, "whence": whence},
        "kernels": subject.kernels, "config": dict(subject.config),
        "versions": _distinct(runs, "versions"), "hardware": _distinct(runs, "hardware"),
        "arms": [
            _arm(subject, arm, runs.get(arm, {}), finals, target) for arm in ARMS
        ],
    }
    return made


def sound(runs: Mapping[int, Run]) -> dict[int, Run]:
    """Those that came to their end."""
    return {seed: run for seed, run in runs.items() if run["failure"] is None}


def _finals(runs: Mapping[int, Run]) -> dict[int, float]:
    return {seed: run["rows"][-1]["metric"] for seed, run in sound(runs).items()}


def _arm(
    subject: Subject, arm: str, runs: Mapping[int, Run], finals: Mapping[str, Mapping[int, float]],
    target: float | None,
) -> dict[str, Any]:
    own, esper, ended = finals[arm], finals["esper"], sound(runs)
    pairs = [esper[seed] - own[seed] for seed in own if seed in esper]
    values = list(own.values())
    made: dict[str, Any] = {
        "arm": arm, "label": ARMS[arm], "not_run": subject.not_run.get(arm),
        "runs": len(ended), "missing": [s for s in subject.seeds if s not in runs],
        "failures": {str(s): r["failure"] for s, r in runs.items() if r["failure"] is not None},
        "final": {
            "by_seed": {str(s): v for s, v in own.items()},
            "mean": asdict(estimate(values)), "median": asdict(estimate(values, np.median)),
        },
        "esper_minus": None, "to_target": None,
        "flops": _spread([r["rows"][-1]["flops"] for r in ended.values()]),
        "flops_by": {
            what: _mean([r["flops"].get(what, 0) for r in ended.values()])
            for what in sorted({w for r in ended.values() for w in r["flops"]})
        },
        "seconds": _spread([r["rows"][-1]["seconds"] for r in ended.values()]),
        "longest_boundary": _spread([max(r["boundary_seconds"], default=0.0)
                                     for r in ended.values()]),
        "parameters": _spread([r["rows"][-1]["parameters"] for r in ended.values()]),
        "peak_parameters": _spread([r["peak_parameters"] for r in ended.values()]),
    }
    if arm != "esper" and pairs:
        better = sum((d > 0) == subject.higher_is_better for d in pairs if d)
        made["esper_minus"] = {
            **asdict(estimate(pairs)), "better": better, "ties": sum(d == 0 for d in pairs)}
    if target is not None and ended:
        made["to_target"] = _to_target(ended, target, subject.higher_is_better)
    return made


def reached(run: Run, target: float, higher_is_better: bool) -> float:
    """FLOPs at the end of the first epoch with the target's metric; infinite where there is none.
    """
    for row in run["rows"]:
        value = row["metric"]
        if value is not None and (value >= target if higher_is_better else value <= target):
            return float(row["flops"])
    return math.inf


def _to_target(runs: Mapping[int, Run], target: float, higher_is_better: bool) -> dict[str, Any]:
    found = {s: reached(r, target, higher_is_better) for s, r in runs.items()}
    median: Estimate = estimate(list(found.values()), np.median)
    return {
        "reached": sum(math.isfinite(v) for v in found.values()), "of": len(found),
        # Who never got there has spent more than anybody who did: None stands for that.
        "by_seed": {str(s): v if math.isfinite(v) else None for s, v in found.items()},
        "median": asdict(median),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": float(np.median(values)), "low": float(min(values)),
            "high": float(max(values))}


def _distinct(runs: Mapping[str, Mapping[int, Run]], key: str) -> list[Any]:
    found: list[Any] = []
    for by_seed in runs.values():
        for run in by_seed.values():
            if run.get(key) is not None and run[key] not in found:
                found.append(run[key])
    return found
