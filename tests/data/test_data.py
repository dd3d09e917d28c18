"""The data sets: what is in them, and what is said when they are not there."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from esper.data.config import DataConfig
from esper.data.fashion_mnist import read_idx
from esper.data.losses import cross_entropy, evaluate, loss_of
from esper.data.sets import load_data
from esper.data.splits import Batches, Split
from esper.errors import DataMissing


def test_digits_are_split_three_ways_without_overlap(tmp_path: Path) -> None:
    data = load_data(DataConfig(name="digits"), tmp_path / "c.yaml")
    sizes = [len(s) for s in (data.train, data.holdout, data.eval)]
    assert sum(sizes) == 1797 and min(sizes) > 200
    assert data.example.shape == (2, 1, 8, 8) and data.classes == 10
    assert float(data.train.inputs.min()) >= 0 and float(data.train.inputs.max()) == 1.0
    again = load_data(DataConfig(name="digits"), tmp_path / "c.yaml")
    assert torch.equal(data.eval.inputs, again.eval.inputs)


def test_digits_can_come_from_a_file(tmp_path: Path) -> None:
    rows = np.column_stack([np.full((20, 64), 16), np.arange(20) % 10])
    np.savetxt(tmp_path / "d.csv", rows, delimiter=",")
    data = load_data(DataConfig(name="digits", path="d.csv"), tmp_path / "c.yaml")
    assert len(data.train) == 12 and float(data.train.inputs.min()) == 1.0
    with pytest.raises(DataMissing, match=r"data\.path other\.csv"):
        load_data(DataConfig(name="digits", path="other.csv"), tmp_path / "c.yaml")


def test_text_is_the_standard_library_shifted_by_one(tmp_path: Path) -> None:
    config = DataConfig(name="text", limit=200, eval_limit=50, context=32)
    data = load_data(config, tmp_path / "c.yaml")
    assert data.train.inputs.shape == (200, 32) and data.task == "language"
    assert torch.equal(data.train.inputs[:, 1:], data.train.targets[:, :-1])
    assert int(data.train.inputs.max()) < data.classes
    assert len(data.eval) == 50 and 16 < len(data.holdout) <= 64
    own = config.model_copy(update={"holdout_limit": 9})
    assert len(load_data(own, tmp_path / "c.yaml").holdout) == 9
    again = load_data(config, tmp_path / "c.yaml")
    assert torch.equal(data.train.inputs, again.train.inputs)


def test_missing_sets_name_both_ways_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    with pytest.raises(DataMissing, match=r"dataset-fashion-mnist.*data\.path"):
        load_data(DataConfig(name="fashion_mnist"), tmp_path / "c.yaml")
    with pytest.raises(DataMissing, match=r"standard library.*data\.path"):
        load_data(DataConfig(name="text", path="nowhere"), tmp_path / "c.yaml")
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataMissing, match=r"scikit-learn.*data\.path"):
        load_data(DataConfig(name="digits"), tmp_path / "c.yaml")


def _idx(array: np.ndarray) -> bytes:
    head = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def test_fashion_mnist_is_read_from_a_given_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 24), ("t10k", 6)):
        images, labels = rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(_idx(labels))
    data = load_data(DataConfig(name="fashion_mnist", path="."), tmp_path / "c.yaml")
    assert (len(data.train), len(data.holdout), len(data.eval)) == (22, 2, 6)
    images_file = tmp_path / "train-images-idx3-ubyte.gz"
    images_file.write_bytes(images_file.read_bytes()[:-20])
    with pytest.raises(DataMissing, match="train-images"):
        load_data(DataConfig(name="fashion_mnist", path="."), tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not an IDX file"),
        (b"\x7fELF....", "not an IDX file"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 60000, 2**31, 28), "expected 1 to"),
        (b"\0\0\x08\x03" + b"\0\0", "expected 1 to"),
        (b"\0\0\x08\x01" + struct.pack(">I", 9) + b"abc", "ends after 3 bytes"),
    ],
)
def test_hostile_idx_files_are_refused_before_they_are_read(content: bytes, why: str) -> None:
    with pytest.raises(DataMissing, match=why):
        read_idx(io.BytesIO(content), "x")


def test_batches_are_shuffled_anew_and_alike_for_one_seed() -> None:
    split = Split(torch.arange(10.0).view(10, 1), torch.arange(10))
    one, two = Batches(split, 4, seed=3), Batches(split, 4, seed=3)
    first = [b[1].tolist() for b in one]
    torch.rand(5)  # what others draw does not matter
    assert first == [b[1].tolist() for b in two]
    assert first != [b[1].tolist() for b in one]
    assert sorted(i for batch in first for i in batch) == list(range(10)) and len(one) == 3


def test_evaluation_is_the_mean_over_samples_whatever_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    split = Split(torch.randn(10, 4), torch.randint(0, 3, (10,)))
    loss, accuracy = evaluate(model, Batches(split, 3))
    whole, same = evaluate(model, Batches(split, 10))
    assert loss == pytest.approx(whole) and accuracy == same
    assert model.training
    direct = cross_entropy(model.eval(), (split.inputs, split.targets)).item()
    assert direct == pytest.approx(loss)


def test_mnist1d_has_its_official_split_and_disturbs_nobody(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    data = load_data(DataConfig(name="mnist1d"), tmp_path / "c.yaml")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert (len(data.train) + len(data.holdout), len(data.eval)) == (4000, 1000)
    assert data.train.inputs.shape[1:] == (40,) and data.example.shape == (2, 40)
    for split in (data.train, data.holdout, data.eval):
        counts = torch.bincount(split.targets, minlength=10) / len(split)
        assert float((counts - 0.1).abs().max()) < 0.06, "every class is in every part"
    rows = torch.cat([data.train.inputs, data.holdout.inputs, data.eval.inputs])
    assert len(torch.unique(rows, dim=0)) == 5000, "no sequence is in two parts"
    again = load_data(DataConfig(name="mnist1d"), tmp_path / "c.yaml")
    assert torch.equal(data.eval.inputs, again.eval.inputs)
    assert not list(tmp_path.iterdir()), "nothing is kept on the disk"


def test_a_student_is_asked_for_what_its_teacher_says(tmp_path: Path) -> None:
    data = load_data(DataConfig(name="teacher_student"), tmp_path / "c.yaml")
    assert data.task == "regression" and data.train.inputs.shape == (4000, 20)
    assert data.train.targets.std(0) == pytest.approx(torch.ones(10), abs=1e-4)
    nothing = nn.Linear(20, 10)
    nn.init.zeros_(nothing.weight)
    nn.init.zeros_(nothing.bias)
    loss, accuracy = evaluate(nothing, Batches(data.eval, 500), data.task)
    assert loss == pytest.approx(1.0, abs=0.05) and accuracy is None
    name, loss_fn = loss_of(data.task)
    assert name == "squared error"
    whole = loss_fn(nothing, (data.eval.inputs, data.eval.targets)).item()
    assert whole == pytest.approx(loss, rel=1e-5)
