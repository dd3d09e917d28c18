"""MNIST-1D (Greydanus and Kobak 2024): ten shapes in sequences of forty numbers, with noise.

The package `mnist1d` makes it from a fixed seed, the official 4,000 sequences to train on and
1,000 to test on. Its way to download the same data is not used.
"""

from __future__ import annotations

from pathlib import Path

import torch

from esper.data.config import DataConfig
from esper.data.splits import DataSet, Split
from esper.errors import DataMissing
from esper.kasmina.rng import rng_state, set_rng_state

HELD_OUT = 400  # of the sequences to train on: for decisions


def mnist1d(config: DataConfig, base: Path) -> DataSet:
    if config.path is not None:
        raise DataMissing("data.path: mnist1d is made and not read; leave path out")
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as e:
        raise DataMissing(
            f"MNIST-1D is made by the package mnist1d, which is not here ({e}); install mnist1d "
            "(pip install 'esper[evaluate]'), or take another data set, such as digits"
        ) from e
    before = rng_state()  # it seeds everybody's random numbers
    try:
        made = make_dataset(get_dataset_args())
    finally:
        set_rng_state(before)
    full, test = (
        Split(torch.tensor(made[x], dtype=torch.float32), torch.tensor(made[y]).long())
        for x, y in (("x", "y"), ("x_test", "y_test"))
    )
    cut = len(full) - HELD_OUT  # they are shuffled
    train = Split(full.inputs[:cut], full.targets[:cut])
    holdout = Split(full.inputs[cut:], full.targets[cut:])
    return DataSet("mnist1d", "classification", train, holdout, test, full.inputs[:2].clone(), 10)
