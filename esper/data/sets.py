"""From a configuration to a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from esper.data.config import DataConfig
from esper.data.digits import digits
from esper.data.fashion_mnist import fashion_mnist
from esper.data.mnist1d import mnist1d
from esper.data.splits import DataSet
from esper.data.teacher_student import teacher_student
from esper.data.text import text

_MAKERS: Mapping[str, Callable[[DataConfig, Path], DataSet]] = {
    "digits": digits, "mnist1d": mnist1d, "fashion_mnist": fashion_mnist, "text": text,
    "teacher_student": teacher_student,
}


def load_data(config: DataConfig, config_path: Path) -> DataSet:
    """The data set of a configuration; its `path` is relative to the configuration file.

    Raises:
        DataMissing: it is not on this machine or damaged; names the two ways to get it.
    """
    return _limited(_MAKERS[config.name](config, config_path.parent), config)


def _limited(data: DataSet, config: DataConfig) -> DataSet:
    holdout = config.holdout_limit
    if holdout is None and config.limit is not None:
        holdout = max(64, config.limit // 4)  # it is measured at every epoch
    return DataSet(data.name, data.task, data.train.first(config.limit),
                   data.holdout.first(holdout), data.eval.first(config.eval_limit), data.example,
                   data.classes)
