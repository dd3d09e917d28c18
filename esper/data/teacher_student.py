"""Regression on what a random two-layer network says of Gaussian inputs.

The task by which GradMax is introduced (Evci et al. 2022, section 4.1): a teacher with one hidden
ReLU layer and no biases, its weights uniform within -1 and 1, inputs from a standard normal
distribution, and a student too small for it. Here the teacher is wider (32 hidden units for
their 10, on 20 inputs and 10 outputs), and there are more samples of which some are held out,
for what counts is the loss on samples that were not trained on. Targets are divided by their
standard deviation over the training samples, so that 1 is the error of who knows the mean only.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from esper.data.config import DataConfig
from esper.data.splits import DataSet, Split
from esper.errors import DataMissing

INPUTS, HIDDEN, OUTPUTS = 20, 32, 10
TRAIN, HOLDOUT, EVAL = 4000, 500, 4000


def teacher_student(config: DataConfig, base: Path) -> DataSet:
    if config.path is not None:
        raise DataMissing("data.path: teacher_student is made and not read; leave path out")
    generator = torch.Generator().manual_seed(0)

    def weights(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns).uniform_(-1, 1, generator=generator)

    first, second = weights(INPUTS, HIDDEN), weights(HIDDEN, OUTPUTS)
    inputs = torch.randn(TRAIN + HOLDOUT + EVAL, INPUTS, generator=generator)
    targets = torch.relu(inputs @ first) @ second
    known = targets[:TRAIN]
    targets = (targets - known.mean(0)) / known.std(0)
    train, holdout, test = (
        Split(x, y) for x, y in zip(*(t.split([TRAIN, HOLDOUT, EVAL]) for t in (inputs, targets)),
                                    strict=True)
    )
    return DataSet("teacher_student", "regression", train, holdout, test, inputs[:2].clone(),
                   OUTPUTS)
