"""The processes of a data-parallel run: which one this is, and what they say to each other.

Numbers and texts go over a group that speaks between CPUs, so that no device is waited for; only
parameters and gradients go where the model is. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper.errors import RankError

MAX_BYTES = 256 << 20  # of what one rank may tell the others at once


class Ranks:
    """This process's place in torch's default process group; the only one where there is none.

    Every method is a collective: all ranks call it, in the same order, and wait for each other.
    A single process gets back what it gave, at once.

    Raises, in every method:
        RankError: a rank died, or did not come within the group's timeout.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._cpu: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._cpu = _group_between_cpus()

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Element by element, over the ranks; equal on all of them to the last bit, and NaN where
        one of them has NaN. On the CPU, as float64."""
        values = values.detach().to("cpu", torch.float64)
        if self.size == 1:
            return values
        summed = values.clone()
        with _answering("averaging measurements"):
            dist.all_reduce(summed, group=self._cpu)
        return summed / self.size

    def largest(self, values: Sequence[float]) -> list[float]:
        """Place by place, over the ranks. No NaN may be in them."""
        if self.size == 1:
            return list(values)
        held = torch.tensor(values, dtype=torch.float64)
        with _answering("comparing measurements"):
            dist.all_reduce(held, op=dist.ReduceOp.MAX, group=self._cpu)
        return [float(v) for v in held.tolist()]

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on all of them. It is made of what JSON has."""
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.first else b""
        length = torch.tensor([len(content)])
        with _answering("hearing what rank 0 decided"):
            dist.broadcast(length, 0, group=self._cpu)
            held = _tensor(content, int(length))
            dist.broadcast(held, 0, group=self._cpu)
        return json.loads(held.numpy().tobytes())

    def gather(self, content: bytes) -> list[bytes]:
        """What every rank gave, by rank."""
        if self.size == 1:
            return [content]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _answering("gathering"):
            dist.all_gather(lengths, torch.tensor([len(content)]), group=self._cpu)
            longest = max(int(n) for n in lengths)
            if longest > MAX_BYTES:
                raise RankError(f"a rank has {longest} bytes to tell the others, at most "
                                f"{MAX_BYTES} are sent; register less state with the session")
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, _tensor(content, longest), group=self._cpu)
        return [p[: int(n)].numpy().tobytes() for p, n in zip(parts, lengths, strict=True)]

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Give `tensors` the values that they have on the first rank, in place."""
        if self.size == 1:
            return
        with torch.no_grad(), _answering("copying tensors of rank 0"):
            for kind in {(t.device, t.dtype): None for t in tensors}:
                alike = [t for t in tensors if (t.device, t.dtype) == kind]
                flat = torch.cat([t.reshape(-1) for t in alike])
                dist.broadcast(flat, 0)
                parts = flat.split([t.numel() for t in alike])
                for tensor, part in zip(alike, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def average(self, flat: Tensor) -> None:
        """The mean over the ranks, in place, where the tensor is."""
        with _answering("averaging the gradients of seeds"):
            dist.all_reduce(flat)
        flat.div_(self.size)


def _tensor(content: bytes, length: int) -> Tensor:
    held = torch.zeros(length, dtype=torch.uint8)
    if content:
        held[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return held


def _group_between_cpus() -> Any:
    """None, which is the default group, where that serves CPU tensors; else one of gloo beside it.
    (A reference to the default one would keep it alive when it is destroyed.)"""
    world: Any = dist.group.WORLD
    if "cpu:" in dist.get_backend_config(world):
        return None
    options = world._get_backend(torch.device("cuda")).options
    return dist.new_group(backend="gloo", timeout=options._timeout)


@contextmanager
def _answering(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # what torch raises for a lost connection and for a timeout
        raise RankError(
            f"rank {dist.get_rank()} waited in vain for the others while {doing}: {e}. One of them "
            "died, hangs, or has left the loop; its own output says why. Start the run again, "
            "from its newest checkpoint"
        ) from e
