"""How often Urabrask's bench calls a difference that is not there: an A/A run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper.urabrask.bench import self_test


@pytest.mark.slow
def test_false_verdicts(benchmark: Any) -> None:
    torch.set_num_threads(1)
    found = benchmark.pedantic(lambda: self_test(200), rounds=1)
    benchmark.extra_info.update(
        target="<= 5 % false FAST", untimed=True, runs=found.runs, false_fast=found.false_fast,
        false_slow=found.false_slow, at_most=found.at_most, widest_interval=found.widest,
    )
    print(f"\n{found.false_fast} false FAST (95 %: below {found.at_most:.1%}) and "
          f"{found.false_slow} false SLOW in {found.runs}, widest interval {found.widest:.3f}")
