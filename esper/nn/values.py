"""What is known of a value while a module is read: its place in the blueprint and its axes.

An axis is named by what it runs over, so that views and permutations are followed by name:
`b` batch, `t` time, `y` and `x` space, `c` channels, `h` and `d` heads and their width (together
`c`), `1` positions that were pooled, `p0`, `p1`, ... positions of any other kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

POSITIONS = frozenset("tyx")


class NoMatch(Exception):
    """A module is not a blueprint; the message says which operation or shape is at fault."""


@dataclass(frozen=True)
class Value:
    """One tensor: the blueprint's node that computes it, and the names of its axes.

    `part` is for the pieces of a normalisation that is written out (see `reader`): "square",
    "mean square", "variance", "rstd" and "normed" of the value `node`.
    """

    node: str
    axes: tuple[str, ...]
    part: str = ""
    eps: float = 0.0

    @property
    def channel_axis(self) -> int:
        if "c" not in self.axes:
            raise NoMatch(f"a value with axes [{', '.join(self.axes)}] has no channel axis")
        return self.axes.index("c")

    @property
    def pooled(self) -> bool:
        return "1" in self.axes and not POSITIONS & set(self.axes)


@dataclass(frozen=True)
class Ref:
    """A parameter of the module by its dotted name, or a view of it that moves nothing."""

    path: str


def permuted(value: Value, order: Sequence[int]) -> Value:
    return replace(value, axes=tuple(value.axes[i] for i in order))


def swapped(value: Value, first: int, second: int) -> Value:
    order = list(range(len(value.axes)))
    order[first], order[second] = order[second], order[first]
    return permuted(value, order)


def reshaped(value: Value, before: Sequence[int], after: Sequence[int]) -> Value:
    """The axes of a view; refused where it does more than split heads or move axes of one."""
    left = [(a, n) for a, n in zip(value.axes, before, strict=True) if a != "1"]
    axes: list[str] = []
    sizes = list(after)
    while sizes:
        size = sizes.pop(0)
        if left and left[0][1] == size:
            axes.append(left.pop(0)[0])
        elif left and left[0][0] == "c" and sizes and size * sizes[0] == left[0][1]:
            left.pop(0)
            sizes.pop(0)
            axes += ["h", "d"]
        elif [a for a, _ in left[:2]] == ["h", "d"] and left[0][1] * left[1][1] == size:
            axes.append("c")
            left = left[2:]
        elif size == 1:
            axes.append("1")
        else:
            break
    if left or sizes or len(axes) != len(after):
        raise NoMatch(
            f"a view of {list(before)} as {list(after)} mixes axes; only splitting channels into "
            "heads, joining them again, and axes of extent 1 are understood"
        )
    return replace(value, axes=tuple(axes))


def joined(a: Value, b: Value, what: str) -> tuple[str, ...]:
    """The axes of an elementwise result; pooled axes broadcast."""
    pairs = list(zip(a.axes, b.axes, strict=False))
    if len(a.axes) != len(b.axes) or any(p != q and "1" not in (p, q) for p, q in pairs):
        raise NoMatch(
            f"{what} of values with axes [{', '.join(a.axes)}] and [{', '.join(b.axes)}]; a "
            "kernel combines values of one layout"
        )
    return tuple(q if p == "1" else p for p, q in pairs)


def pooled(value: Value, dims: Iterable[int], keep: bool, everything: frozenset[str]) -> Value:
    """The axes after a mean over `dims`, which must be all positions of the site."""
    over = {d % len(value.axes) for d in dims}
    names = {value.axes[d] for d in over}
    if names != everything or not names:
        raise NoMatch(
            f"a mean over axes [{', '.join(sorted(names))}]; a kernel pools over all positions "
            f"[{', '.join(sorted(everything))}] or none"
        )
    axes = ["1" if i in over else a for i, a in enumerate(value.axes) if keep or i not in over]
    return replace(value, axes=tuple(axes))


def along_channels(value: Value, parameter: Tensor) -> bool:
    """Whether a parameter broadcasts against `value` as one number per channel."""
    shape = [1] * (len(value.axes) - parameter.dim()) + list(parameter.shape)
    return len(shape) == len(value.axes) and all(
        n == 1 for i, n in enumerate(shape) if i != value.channel_axis
    )
