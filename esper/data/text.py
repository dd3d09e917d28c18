"""Source text, character by character: the standard library's own, or a folder's."""

from __future__ import annotations

import hashlib
import io
import math
import sysconfig
from pathlib import Path

import numpy as np
import torch

from esper.data.config import DataConfig
from esper.data.splits import DataSet, Split
from esper.errors import DataMissing

MAX_TEXT_BYTES = 64 << 20
ASCII = 128


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


def text(config: DataConfig, base: Path) -> DataSet:
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
