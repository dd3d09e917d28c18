"""scikit-learn's handwritten digits, 8x8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from esper.data.config import DataConfig
from esper.data.splits import DataSet, Split
from esper.errors import DataMissing


def digits(config: DataConfig, base: Path) -> DataSet:
    if config.path is not None:
        try:
            table = np.loadtxt(base / config.path, delimiter=",", ndmin=2)
        except (OSError, ValueError) as e:
            raise DataMissing(
                f"data.path {config.path}: {e}; expected the digits as CSV, 64 pixels from 0 to "
                "16 and a label per line (.gz is read too)"
            ) from e
        if table.shape[1] != 65 or len(table) < 8:
            raise DataMissing(f"data.path {config.path}: a table of {table.shape}, expected 65 "
                              "columns: 64 pixels and a label")
        pixels, labels = table[:, :64], table[:, 64]
    else:
        try:
            from sklearn.datasets import load_digits
        except ImportError as e:
            raise DataMissing(
                "digits come with scikit-learn, which is not installed; install the package "
                "scikit-learn, or set data.path to a CSV with 64 pixels and a label per line"
            ) from e
        pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(np.asarray(pixels), dtype=torch.float32).view(-1, 1, 8, 8) / 16
    targets = torch.tensor(np.asarray(labels), dtype=torch.int64)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    a, b = len(order) * 60 // 100, len(order) * 75 // 100
    train, holdout, test = (Split(inputs[i], targets[i]) for i in order.tensor_split([a, b]))
    return DataSet("digits", "classification", train, holdout, test, inputs[:2].clone(), 10)
