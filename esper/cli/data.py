"""The data sets that `esper train` knows. Nothing is downloaded.

Every set has three parts: train; holdout, on which decisions about growth are made; and
eval, on which nothing is decided and from which reports take their figures. The splits are
the same for every seed of a run, so that runs can be compared.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.cli.config import DataConfig
from esper.errors import DataMissing
from esper.kasmina.probe import undisturbed

Task = Literal["classification", "language"]
Batch = tuple[Tensor, Tensor]
MAX_IDX_BYTES = 64 << 20
MAX_TEXT_BYTES = 64 << 20
ASCII = 128


@dataclass(frozen=True)
class Split:
    """Inputs and targets, sample by sample along the first axis."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def first(self, limit: int | None) -> Split:
        return Split(self.inputs[:limit], self.targets[:limit])


@dataclass(frozen=True)
class DataSet:
    """`example` is a batch of two inputs; `classes` counts classes, or symbols of a text."""

    name: str
    task: Task
    train: Split
    holdout: Split
    eval: Split
    example: Tensor
    classes: int


class Batches:
    """Iterates a split in batches; anew shuffled at every pass where `seed` is given.

    The order depends on the seed and the number of the pass alone, not on what else draws
    random numbers, so that two runs see the same batches.
    """

    def __init__(self, split: Split, size: int, seed: int | None = None) -> None:
        self.split, self.size, self.seed = split, size, seed
        self._passes = 0  # begun
        self._batch = 0  # of the pass that is going on
        self._start = 0  # of the next pass

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(len(self.split))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._passes)
            order = torch.randperm(len(self.split), generator=generator)
        self._passes += 1
        start, self._start = self._start, 0
        for number, chosen in enumerate(order.split(self.size)):
            if number >= start:
                self._batch = number + 1
                yield self.split.inputs[chosen], self.split.targets[chosen]
        self._batch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self._passes, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict["batch"]
        self._passes = state_dict["passes"] - (1 if self._start else 0)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy in nats; classes are the last axis of the model's output."""
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """(mean cross entropy, accuracy) over a split, in eval mode; the model stays as it was."""
    loss = right = count = 0.0
    with undisturbed(model):
        for inputs, targets in batches:
            logits = model(inputs).flatten(0, -2)
            wanted = targets.flatten()
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right += float((logits.argmax(-1) == wanted).sum())
            count += wanted.numel()
    return loss / count, right / count


def _limited(data: DataSet, config: DataConfig) -> DataSet:
    limit = config.limit
    # The holdout shrinks with the training data: it is measured at every epoch.
    holdout = None if limit is None else max(64, limit // 4)
    return DataSet(data.name, data.task, data.train.first(limit), data.holdout.first(holdout),
                   data.eval.first(config.eval_limit), data.example, data.classes)


# -- digits -------------------------------------------------------------------------------


def _digits(config: DataConfig, base: Path) -> DataSet:
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


# -- Fashion-MNIST ------------------------------------------------------------------------


def read_idx(stream: IO[bytes], name: str) -> npt.NDArray[np.uint8]:
    """An array of unsigned bytes in the IDX format: 0, 0, 8, rank, extents, data.

    Raises:
        DataMissing: another format, an absurd size, or too few bytes; says which.
    """
    head = stream.read(4)
    if len(head) != 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
        raise DataMissing(f"{name}: starts with {head.hex()}, not an IDX file of unsigned bytes")
    sizes = stream.read(4 * head[3])
    whole = len(sizes) == 4 * head[3]
    extents = np.frombuffer(sizes, dtype=">u4").tolist() if whole else []
    size = math.prod(extents) if whole else 0
    if not 0 < size <= MAX_IDX_BYTES:
        raise DataMissing(f"{name}: says it holds {extents}; expected 1 to {MAX_IDX_BYTES} bytes")
    content = stream.read(size)
    if len(content) != size:
        raise DataMissing(f"{name}: says it holds {extents}, and ends after {len(content)} bytes")
    return np.frombuffer(content, dtype=np.uint8).reshape(extents)


def _fashion_folders(config: DataConfig, base: Path) -> list[Path]:
    if config.path is not None:
        return [base / config.path]
    shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [Path(s) / "datasets" / "fashion-mnist" for s in shares.split(":") if s]


def _fashion_mnist(config: DataConfig, base: Path) -> DataSet:
    folders = _fashion_folders(config, base)

    def load(stem: str) -> npt.NDArray[np.uint8]:
        for folder in folders:
            for path in (folder / f"{stem}.gz", folder / stem):
                if path.is_file():
                    raw = path.open("rb")
                    packed = path.suffix == ".gz"
                    with raw:
                        try:
                            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if packed else raw)
                            return read_idx(stream, str(path))
                        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                            raise DataMissing(f"{path}: damaged ({e}); fetch it again") from e
        raise DataMissing(
            f"Fashion-MNIST is not here ({stem}[.gz] is in none of: "
            f"{', '.join(map(str, folders))}). Install the Debian package "
            "dataset-fashion-mnist, or set data.path to a folder with the four idx files"
        )

    def split(prefix: str) -> Split:
        images = load(f"{prefix}-images-idx3-ubyte")
        labels = load(f"{prefix}-labels-idx1-ubyte")
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataMissing(f"Fashion-MNIST {prefix}: images {images.shape} and labels "
                              f"{labels.shape} do not belong together")
        pixels = torch.from_numpy(images.copy()).unsqueeze(1).float() / 255
        return Split(pixels, torch.from_numpy(labels.copy()).long())

    full, test = split("train"), split("t10k")
    cut = len(full) * 11 // 12
    train = Split(full.inputs[:cut], full.targets[:cut])
    holdout = Split(full.inputs[cut:], full.targets[cut:])
    return DataSet("fashion_mnist", "classification", train, holdout, test,
                   full.inputs[:2].clone(), 10)


# -- text ---------------------------------------------------------------------------------


def _sources(config: DataConfig, base: Path) -> list[tuple[str, Path]]:
    """(name, file) in an order that is the same on every machine with the same files."""
    if config.path is not None:
        root = base / config.path
        files = [root] if root.is_file() else [*root.rglob("*.py"), *root.rglob("*.txt")]
    else:
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        files = [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts)]
    named = [(p.relative_to(root).as_posix(), p) for p in files]
    # By the hash of the name: neighbours by subject are spread over both sides of the split.
    return sorted(named, key=lambda n: hashlib.sha256(n[0].encode()).digest())


def _text(config: DataConfig, base: Path) -> DataSet:
    length = config.context + 1
    # 70 % of the rows are trained on and 20 % are for evaluation.
    rows_wanted = max((config.limit or 8000) / 0.7, (config.eval_limit or 1000) / 0.2)
    wanted = math.ceil(rows_wanted) * length
    buffer = io.BytesIO()
    for _, path in _sources(config, base):
        content = path.read_bytes()
        if content.isascii():
            buffer.write(content + b"\n")
        if buffer.tell() >= min(wanted, MAX_TEXT_BYTES):
            break
    rows = buffer.tell() // length
    if rows < 16:
        raise DataMissing(
            f"text: {buffer.tell()} ASCII characters found, too few for sequences of {length}; "
            "use a Python whose standard library has its .py sources installed, or set "
            "data.path to a folder of .py or .txt files"
        )
    symbols = np.frombuffer(buffer.getvalue(), dtype=np.uint8)[: rows * length]
    table = torch.from_numpy(symbols.astype(np.int64)).view(rows, length)
    # Files follow one another, so cutting by rows keeps almost every file on one side.
    a, b = rows * 70 // 100, rows * 80 // 100
    train, holdout, test = (
        Split(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in table.tensor_split([a, b])
    )
    return DataSet("text", "language", train, holdout, test, train.inputs[:2].clone(), ASCII)


_MAKERS = {"digits": _digits, "fashion_mnist": _fashion_mnist, "text": _text}


def load_data(config: DataConfig, config_path: Path) -> DataSet:
    """The data set of a configuration; its `path` is relative to the configuration file.

    Raises:
        DataMissing: it is not on this machine or damaged; names the two ways to get it.
    """
    return _limited(_MAKERS[config.name](config, config_path.parent), config)
