"""State as plain values: trees of Python's containers and tensors, copied, packed and unpacked.

`mirror` copies a tree into the tensors of an older copy of it, where they fit. `pack` takes a tree
apart into JSON and tensors with names, `unpack` puts it together again: what comes out equals what
went in, tuples, sets, integer keys, infinities and all. Nothing in JSON can name a class or code.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from esper.errors import CheckpointError
from esper.tolaria.sharded import part

Pairs = list[tuple[Tensor, Tensor]]
_TAG = "$"
MAX_DEPTH = 32
# By the tag that stands for them.
_SEQUENCES: Mapping[str, Callable[[Any], Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def alike(a: Any, b: Tensor) -> bool:
    """Whether `a` can take the place of `b`: size, type, device, layout, and how it is sharded."""
    return (isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype
            and a.device == b.device and a.stride() == b.stride()
            and getattr(a, "placements", None) == getattr(b, "placements", None))


def mirror(old: Any, source: Any, pairs: Pairs) -> Any:
    """A tree like `source` with tensors of its own: those of `old` where they are alike, fresh ones
    elsewhere. Nothing is copied yet: `pairs` is given (copy, original) of every tensor, for
    `copy_all`. Other leaves are deep copies."""
    if isinstance(source, Tensor):
        held = old if alike(old, source) else torch.empty_like(source, requires_grad=False)
        pairs.append((held, source.detach()))
        return held
    if type(source) is dict:
        held_by = old if type(old) is dict else {}
        return {k: mirror(held_by.get(k), v, pairs) for k, v in source.items()}
    if type(source) in (list, tuple):
        fits = isinstance(old, list | tuple) and len(old) == len(source)
        known = old if fits else [None] * len(source)
        return type(source)(mirror(o, v, pairs) for o, v in zip(known, source, strict=True))
    return copy.deepcopy(source)


def copy_all(pairs: Pairs) -> None:
    """Copy every original into its copy. Each copy runs on torch's threads. Of sharded tensors
    every rank copies its part."""
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([part(h) for h, _ in pairs], [part(s) for _, s in pairs])


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """What JSON can hold of `value`; its tensors go into `tensors`, named by their path.

    Raises:
        CheckpointError: something in it is neither plain value, container, tensor nor array; names
            the path.
    """
    match value:
        case None | bool() | str():
            return value
        case int() if type(value) is int:
            return value
        case float() if type(value) is float:
            return value if math.isfinite(value) else {_TAG: "float", "v": str(value)}
        case Tensor():
            where = {} if value.device.type == "cpu" else {"device": value.device.type}
            return {_TAG: "tensor", "v": _name(value, tensors, path), **where}
        case np.ndarray() if value.dtype.kind in "biuf":
            # As bytes: torch lacks some of numpy's types.
            content = torch.from_numpy(np.frombuffer(value.tobytes(), dtype=np.uint8).copy())
            return {_TAG: "array", "v": _name(content, tensors, path), "dtype": value.dtype.str,
                    "shape": list(value.shape)}
        case np.generic() if value.dtype.kind in "biuf":
            return pack(value.item(), tensors, path)
        case list():
            return [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        case deque():
            items = [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
            return {_TAG: "deque", "v": items, "maxlen": value.maxlen}
        case tuple() if type(value) is tuple:
            return {_TAG: "tuple",
                    "v": [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]}
        case set() | frozenset():
            ordered = sorted(value, key=repr)
            return {_TAG: type(value).__name__,
                    "v": [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(ordered)]}
        case dict():
            return _pack_dict(value, tensors, path)
    raise CheckpointError(
        f"{path or 'the state'}: a {type(value).__module__}.{type(value).__qualname__} cannot be "
        "kept in a checkpoint; state is made of numbers, strings, containers, tensors and arrays"
    )


def _pack_dict(value: dict[Any, Any], tensors: dict[str, Tensor], path: str) -> Any:
    plain = all(type(k) is str for k in value) and _TAG not in value
    if plain and type(value) is not Counter:  # what else a dict may be returns as a dict
        return {k: pack(v, tensors, f"{path}/{k}" if path else k) for k, v in value.items()}
    items = [[pack(k, tensors, f"{path}/{i}"), pack(v, tensors, f"{path}/{k}")]
             for i, (k, v) in enumerate(value.items())]
    return {_TAG: "counter" if type(value) is Counter else "map", "v": items}


def _name(tensor: Tensor, tensors: dict[str, Tensor], path: str) -> str:
    if tensor.layout != torch.strided or type(tensor.detach()) is not Tensor or tensor.is_quantized:
        raise CheckpointError(
            f"{path}: a {type(tensor).__name__} of layout {tensor.layout} cannot be kept in a "
            "checkpoint; only plain dense tensors can"
        )
    name = path or "tensor"
    while name in tensors:
        name += "~"
    tensors[name] = tensor.detach()
    return name


def to_bytes(tree: Any) -> bytes:
    """A tree on its way to another process: eight bytes of length, JSON, safetensors.

    Raises:
        CheckpointError: as `pack`.
    """
    tensors: dict[str, Tensor] = {}
    content = json.dumps(pack(tree, tensors)).encode()
    held = {n: t.cpu().contiguous().clone() for n, t in tensors.items()}
    return len(content).to_bytes(8, "little") + content + save(held)


def from_bytes(content: bytes) -> Any:
    """The tree of which `to_bytes` made this."""
    end = 8 + int.from_bytes(content[:8], "little")
    return unpack(json.loads(content[8:end]), load(content[end:]))


def unpack(value: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """The tree that `pack` took apart.

    Raises:
        CheckpointError: it is not of that form, or names a tensor that is not there.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"the state is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [unpack(v, tensors, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {k: unpack(v, tensors, depth + 1) for k, v in value.items()}
    tag, content = value[_TAG], cast(Any, value.get("v"))
    try:
        match tag:
            case "float":
                return _FLOATS[content]
            case "tensor":
                return tensors[content].to(value.get("device", "cpu"))
            case "array":
                raw, dtype = tensors[content].numpy().tobytes(), np.dtype(value["dtype"])
                return np.frombuffer(raw, dtype=dtype).reshape(value["shape"]).copy()
            case "deque":
                return deque((unpack(v, tensors, depth + 1) for v in content), value["maxlen"])
            case "map" | "counter":
                made = {unpack(k, tensors, depth + 1): unpack(v, tensors, depth + 1)
                        for k, v in content}
                return Counter(made) if tag == "counter" else made
            case _:
                return _SEQUENCES[tag]([unpack(v, tensors, depth + 1) for v in content])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise CheckpointError(
            f"the state has an entry tagged {tag!r} that cannot be read "
            f"({type(e).__name__}: {e})"
        ) from e
