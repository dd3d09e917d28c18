"""The format on disk: what goes in comes out, and nothing that is torn or foreign is trusted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import esper
from esper.errors import CheckpointError, ContractError
from esper.tolaria import checkpoint
from esper.tolaria.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    checkpoints_in,
    newest_good,
    read_checkpoint,
    write_checkpoint,
)
from esper.tolaria.keeper import Checkpoints
from esper.tolaria.trees import pack, unpack

VALUES: dict[str, Any] = {
    "none": None, "yes": True, "int": -(2**70), "float": 0.1 + 0.2, "text": "\u00fc\n",
    "inf": [math.inf, -math.inf], "tuple": (1, (2.5, "x")), "set": {3, 1}, "empty": [{}, (), []],
    "int keys": {1: "a", (2, 3): "b"}, "dollar": {"$": 1}, "counter": Counter({3: 2}),
    "deque": deque([1.0, 2.0], maxlen=50), "python": random.Random(3).getstate(),
}


def write(path: Path, value: Any, step: int = 1) -> Path:
    tensors: dict[str, Tensor] = {}
    state = pack(value, tensors)
    return write_checkpoint(path, state=state, tensors=tensors, run_id="r", step=step, epoch=0,
                            taken=time.time())


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    write(tmp_path / "a", VALUES)
    back = read_checkpoint(tmp_path / "a").state
    assert back == VALUES
    assert {k: type(v) for k, v in back.items()} == {k: type(v) for k, v in VALUES.items()}
    assert back["deque"].maxlen == 50
    write(tmp_path / "nan", {"nan": math.nan})
    assert math.isnan(read_checkpoint(tmp_path / "nan").state["nan"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool,
                                   torch.uint8, torch.float64, torch.complex64])
def test_tensors_come_out_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    given = [torch.randn(3, 4).to(dtype), torch.randn(()).to(dtype), torch.empty(0, 2, dtype=dtype),
             torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last),
             torch.randn(4, 6).to(dtype).t()]
    write(tmp_path / "a", {"a": given, "b": {"a/0": given[0]}, "b/a": given[0]})
    back = read_checkpoint(tmp_path / "a").state
    assert all(a.dtype == b.dtype and torch.equal(a, b)
               for a, b in zip(back["a"], given, strict=True))
    assert torch.equal(back["b"]["a/0"], given[0]) and torch.equal(back["b/a"], given[0])
    assert load_file(tmp_path / "a" / TENSORS), "any other reader of safetensors can open it"


def test_numpy_comes_out_as_numpy(tmp_path: Path) -> None:
    state = np.random.RandomState(4).get_state(legacy=False)
    write(tmp_path / "a", {"state": state, "table": np.arange(6, dtype=">u2").reshape(2, 3),
                           "one": np.float32(0.1)})
    back = read_checkpoint(tmp_path / "a").state
    other = np.random.RandomState()
    other.set_state(back["state"])
    assert other.rand() == np.random.RandomState(4).rand()
    assert back["table"].dtype == ">u2" and back["table"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert back["one"] == float(np.float32(0.1))


@pytest.mark.parametrize("value", [object(), lambda: 0, b"bytes", torch.eye(2).to_sparse(),
                                   np.array([object()])])
def test_what_cannot_be_kept_is_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match="optimizer/x"):
        pack({"optimizer": {"x": value}}, {})


@pytest.mark.parametrize("value", [
    {"$": "object", "v": []}, {"$": "tensor", "v": "gone"}, {"$": "tensor", "v": []},
    {"$": "float", "v": "1"}, {"$": "map", "v": [[[], 1]]}, {"$": "map", "v": [1]}, {"$": "tuple"},
    {"$": "deque", "v": []}, {"$": ["tuple"], "v": []},
    {"$": "array", "v": "t", "dtype": "O", "shape": [1]},
    {"$": "array", "v": "t", "dtype": "<u2", "shape": [9]},
])
def test_entries_of_no_known_form_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        unpack({"x": value}, {"t": torch.zeros(2, dtype=torch.uint8)})
    nested: Any = 1
    for _ in range(100):
        nested = [nested]
    with pytest.raises(CheckpointError, match="nested"):
        unpack(nested, {})


def cut(path: Path) -> None:
    content = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(content[:-1])


def flip(name: str) -> Any:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    return damage


def without(name: str) -> Any:
    return lambda path: (path / name).unlink()


def rewritten(**changes: Any) -> Any:
    def damage(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**manifest, **changes}))
    return damage


def with_state(content: bytes) -> Any:
    """Foreign, and honest about its digest."""
    def damage(path: Path) -> None:
        (path / STATE).write_bytes(content)
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["size"][STATE] = len(content)
        manifest["sha256"][STATE] = hashlib.sha256(content).hexdigest()
        (path / MANIFEST).write_text(json.dumps(manifest))
    return damage


def a_fifo(path: Path) -> None:
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"\x80\x04K\x00.")  # a pickle


@pytest.mark.parametrize(("damage", "says"), [
    (cut, "it is torn"), (flip(TENSORS), "it is damaged"), (flip(STATE), "it is damaged"),
    (without(TENSORS), "torn"), (without(STATE), "torn"),
    (rewritten(format=2), "not of a checkpoint of format 1"), (rewritten(more=1), "format 1"),
    (rewritten(size={}), "speaks of"), (a_file, "not a checkpoint"), (a_fifo, "format 1"),
    (lambda p: (p / MANIFEST).write_bytes(b" " * (1 << 20)), "more than"),
    (with_state(b"[" * 100_000), "cannot be read"), (with_state(b"[]"), "holds a list"),
    (with_state(b"{'pickle'}"), "cannot be read"), (with_state(b"\xff"), "cannot be read"),
])
def test_torn_and_foreign_ones_are_refused_and_a_good_one_is_named(
    tmp_path: Path, damage: Any, says: str
) -> None:
    for n in (1, 2, 3):
        write(tmp_path / f"{n:06d}-step-{n}", {"n": n, "t": torch.zeros(10)}, n)
    damage(tmp_path / "000003-step-3")
    with pytest.raises(CheckpointError, match=says) as e:
        read_checkpoint(tmp_path / "000003-step-3")
    assert str(tmp_path / "000002-step-2") in str(e.value)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path)
    assert newest_good(tmp_path) in (tmp_path / "000002-step-2", tmp_path / "000003-step-3")
    shutil.rmtree(tmp_path / "000001-step-1")
    shutil.rmtree(tmp_path / "000002-step-2")
    with pytest.raises(CheckpointError, match="there is no good one"):
        read_checkpoint(tmp_path / "000003-step-3")


def test_a_state_too_large_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_STATE_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100"):
        write(tmp_path / "a", {"x": "y" * 200})
    assert not list(tmp_path.iterdir())


def test_one_never_takes_the_place_of_another(tmp_path: Path) -> None:
    write(tmp_path / "a", {"x": 1})
    with pytest.raises(CheckpointError, match="exists"):
        write(tmp_path / "a", {"x": 2})
    assert read_checkpoint(tmp_path / "a").state == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_last_few_stay_and_a_failure_does_not_end_the_run(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "kept", every_steps=2, keep=2)
    assert [s for s in range(1, 7) if kept.falls(s)] == [2, 4, 6]
    for step in (2, 4, 6):
        kept.submit(lambda path, step=step: write(path, {"step": step}), step).result()
    assert [p.name for p in checkpoints_in(kept.folder)] == ["000002-step-4", "000003-step-6"]

    def full(path: Path) -> Path:
        raise CheckpointError("no space left")

    with pytest.raises(CheckpointError):
        kept.submit(full, 8).result()
    kept.submit(lambda path: write(path, {"step": 8}), 8).result()
    assert read_checkpoint(kept.folder).state == {"step": 8}
    # Gone back to an older one, what is newest is what was written last.
    kept.submit(lambda path: write(path, {"step": 5}), 5).result()
    assert read_checkpoint(kept.folder).state == {"step": 5}
    kept.close()
    with pytest.raises(ContractError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


WRITER = """
import sys, time, torch
from pathlib import Path
from esper.tolaria.checkpoint import write_checkpoint
folder, n = Path(sys.argv[1]), 0
while True:
    n += 1
    write_checkpoint(folder / f"{n:06d}-step-{n}", state={"t": {"$": "tensor", "v": "t"}},
                     tensors={"t": torch.full((1 << 20,), float(n))}, run_id="r", step=n, epoch=0,
                     taken=time.time())
    print(n, flush=True)
"""


def test_killed_while_writing_it_leaves_whole_ones_only(tmp_path: Path) -> None:
    root = str(Path(esper.__file__).parents[1])
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE,
                             text=True, env={**os.environ, "PYTHONPATH": root})
    assert child.stdout is not None
    while int(child.stdout.readline()) < 3:
        pass
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".partial-*")) and time.monotonic() < deadline:
        pass  # in the middle of writing one
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(tmp_path.glob(".partial-*")), "it was killed between two"
    for path in checkpoints_in(tmp_path):
        held = read_checkpoint(path)
        assert torch.equal(held.state["t"], torch.full((1 << 20,), float(held.manifest.step)))
    Checkpoints(tmp_path).close()
    assert not list(tmp_path.glob(".partial-*")), "what the dead left is swept"
