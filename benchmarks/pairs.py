"""Comparing two callables on a noisy machine: in alternation, as a ratio of medians.

The samples are raw: kept as taken, in order, in the benchmark's JSON.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Pair:
    """Seconds per call of ours and of the peer, sample by sample."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    def ratio(self) -> tuple[float, float, float]:
        """median(ours) / median(peer) with its 95 % bootstrap interval."""
        ours, peer = np.array(self.ours), np.array(self.peer)
        rng = np.random.default_rng(0)
        draws = [
            np.median(rng.choice(ours, ours.size)) / np.median(rng.choice(peer, peer.size))
            for _ in range(2000)
        ]
        low, high = np.quantile(draws, [0.025, 0.975])
        return float(np.median(ours) / np.median(peer)), float(low), float(high)


def alternate(
    ours: Callable[[], Any], peer: Callable[[], Any], *, rounds: int = 50, inner: int = 1
) -> Pair:
    """Time both `rounds` times, in random order within a round, after one warm-up round each."""
    order = random.Random(0)
    samples: dict[str, list[float]] = {"ours": [], "peer": []}
    both = [("ours", ours), ("peer", peer)]
    for round_number in range(rounds + 1):
        order.shuffle(both)
        for name, call in both:
            start = time.perf_counter()
            for _ in range(inner):
                call()
            if round_number:
                samples[name].append((time.perf_counter() - start) / inner)
    return Pair(tuple(samples["ours"]), tuple(samples["peer"]))


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Geometric mean with its 95 % interval, by a bootstrap over what is given."""
    logs = np.log(ratios)
    rng = np.random.default_rng(0)
    means = logs[rng.integers(0, len(logs), (5000, len(logs)))].mean(1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return {"ratio": float(np.exp(logs.mean())), "low": float(low), "high": float(high),
            "least": min(ratios), "most": max(ratios)}


def note(benchmark: Any, pair: Pair, *, target: str, unit: str = "ratio to the peer") -> None:
    """Write a pair into the benchmark's JSON and print its ratio."""
    ratio, low, high = pair.ratio()
    benchmark.extra_info.update(
        ratio=ratio, low=low, high=high, target=target, unit=unit,
        ours_seconds=list(pair.ours), peer_seconds=list(pair.peer),
    )
    print(f"\n{benchmark.name}: {ratio:.4f} [{low:.4f}, {high:.4f}] {unit}; target {target}")


def note_speed(benchmark: Any, pair: Pair, *, peer: str, target: str) -> None:
    """As `note`, with the ratio the other way round: how many times as fast as the peer."""
    ratio, low, high = Pair(pair.peer, pair.ours).ratio()
    benchmark.extra_info.update(
        ratio=ratio, low=low, high=high, target=target, unit=f"times as fast as {peer}",
        ours_seconds=list(pair.ours), peer_seconds=list(pair.peer),
    )
    print(f"\n{benchmark.name}: {ratio:.3f} [{low:.3f}, {high:.3f}] times as fast as {peer}"
          + (f"; target {target}" if target else ""))
