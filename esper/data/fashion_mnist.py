"""Fashion-MNIST (Xiao et al. 2017), as the Debian package brings it."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import torch

from esper.data.config import DataConfig
from esper.data.splits import DataSet, Split
from esper.errors import DataMissing

MAX_IDX_BYTES = 64 << 20


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


def _folders(config: DataConfig, base: Path) -> list[Path]:
    if config.path is not None:
        return [base / config.path]
    shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [Path(s) / "datasets" / "fashion-mnist" for s in shares.split(":") if s]


def fashion_mnist(config: DataConfig, base: Path) -> DataSet:
    folders = _folders(config, base)

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
