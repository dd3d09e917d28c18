"""Intervals over seeds, and what a target that was never reached does to them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper.evaluation.statistics import estimate
from esper.evaluation.summary import reached


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        e = estimate(rng.normal(3.0, 2.0, size=20).tolist())
        assert e.low is not None and e.high is not None and e.count == 20
        inside += e.low <= 3.0 <= e.high
    assert 0.88 <= inside / 300 <= 0.98  # the percentile bootstrap is a little narrow at twenty


def test_too_few_values_have_no_interval_and_none_have_no_estimate() -> None:
    one = estimate([2.0])
    assert (one.value, one.low, one.high, one.count) == (2.0, None, None, 1)
    assert estimate([]).value is None


def test_who_never_reached_the_target_is_later_than_all_who_did() -> None:
    e = estimate([10.0, 20.0, 30.0, math.inf, math.inf], np.median)
    assert e.value == 30.0 and e.low is not None and e.high is None
    assert estimate([10.0, math.inf, math.inf], np.median).value is None


@pytest.mark.parametrize(("higher", "expected"), [(True, 200.0), (False, 100.0)])
def test_the_target_is_reached_at_the_end_of_the_first_epoch_that_has_it(
    higher: bool, expected: float
) -> None:
    run = {"rows": [{"flops": 100, "metric": 0.4}, {"flops": 200, "metric": 0.6},
                    {"flops": 300, "metric": None}]}
    assert reached(run, 0.5, higher) == expected
    assert reached(run, 0.7 if higher else 0.3, higher) == math.inf
