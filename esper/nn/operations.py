"""What each operation of torch is in the blueprint's closed set.

A handler is given the reader, the graph's node and what it computed; it writes down the
blueprint's node and returns the `Value`, or raises `NoMatch` with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from esper.leyline.blueprint import Op
from esper.nn.values import (
    NoMatch,
    Ref,
    Value,
    along_channels,
    joined,
    permuted,
    pooled,
    reshaped,
    swapped,
)

if TYPE_CHECKING:
    from esper.nn.reader import Reader

Handler = Callable[["Reader", fx.Node, Any], Value | Ref]
KERNELS = (1, 3, 5, 7)
MAP, POOLED = ("b", "c", "y", "x"), ("b", "c", "1", "1")


def _argument(n: fx.Node, index: int, name: str, default: Any = None) -> Any:
    if name in n.kwargs:
        return n.kwargs[name]
    return n.args[index] if index < len(n.args) else default


# -- elementwise ----------------------------------------------------------------------------


def _unary(op: Op) -> Handler:
    def handler(reader: Reader, n: fx.Node, result: Any) -> Value:
        x = reader.value(n.args[0])
        return Value(reader.emit(op, x.node), x.axes)

    return handler


def _gelu(reader: Reader, n: fx.Node, result: Any) -> Value:
    how = (reader.module_of(n).approximate if n.op == "call_module"
           else _argument(n, 1, "approximate", "none"))
    if how != "none":
        raise NoMatch(f"approximate={how!r}; kernels have the exact GELU")
    return _unary(Op.GELU)(reader, n, result)  # type: ignore[return-value]


def _sum(reader: Reader, n: fx.Node, result: Any) -> Value:
    a, b = (n.args[0], n.args[1])
    if n.kwargs:
        raise NoMatch(f"with {', '.join(n.kwargs)}; kernels have the plain sum")
    for x, y in ((a, b), (b, a)):
        found = reader.known.get(x)
        if isinstance(found, Value) and found.part == "mean square":
            eps = reader.real(y)
            if isinstance(eps, float) and 0 < eps < 1:
                return replace(found, part="variance", eps=eps)
    return _both(reader, Op.ADD, a, b, "a sum")


def _product(reader: Reader, n: fx.Node, result: Any) -> Value:
    a, b = n.args[0], n.args[1]
    for x, y in ((a, b), (b, a)):
        left, right = reader.known.get(x), reader.known.get(y)
        if isinstance(left, Value) and isinstance(right, Ref):
            return _scaled(reader, x, y, right)
        if (isinstance(left, Value) and isinstance(right, Value) and left.part == "rstd"
                and not right.part and left.node == right.node and left.axes == right.axes):
            return replace(left, part="normed")
    return _both(reader, Op.MUL, a, b, "a product")


def _both(reader: Reader, op: Op, a: Any, b: Any, what: str) -> Value:
    for side in (a, b):
        if isinstance(side, int | float):
            raise NoMatch(f"{what} with the number {side:g}; kernels combine tensors")
    x, y = reader.value(a), reader.value(b)
    axes = joined(x, y, what)
    return Value(reader.emit(op, x.node, y.node), axes)


def _scaled(reader: Reader, node: Any, factor: Any, ref: Ref) -> Value:
    x, parameter = reader.whole(node), reader.real(factor)
    channels = reader.channels_of(node)
    if not along_channels(x, parameter) or parameter.numel() != channels:
        raise NoMatch(f"a product with a parameter of {list(parameter.shape)}; kernels have one "
                      "factor per channel")
    if x.part == "normed":
        if x.axes[-1] != "c":
            raise NoMatch("a normalisation over another axis than channels")
        node = reader.emit(Op.RMS_NORM, x.node, weight=ref.path, eps=x.eps)
        return Value(node, x.axes)
    if x.part:
        raise NoMatch(f"it uses the {x.part} inside a normalisation")
    return Value(reader.emit(Op.SCALE, x.node, weight=ref.path), x.axes)


# -- layers ---------------------------------------------------------------------------------


def _linear(reader: Reader, n: fx.Node, result: Any) -> Value:
    weight, bias = _weights(reader, n)
    x = reader.value(n.args[0])
    if x.axes[-1] != "c":
        raise NoMatch(f"a linear layer over axis {x.axes[-1]!r} of [{', '.join(x.axes)}]; kernels "
                      "have them over channels")
    node = reader.emit(Op.LINEAR, x.node, weight=weight, bias=bias,
                       out=reader.width(result.shape[-1]))
    return Value(node, x.axes)


def _weights(reader: Reader, n: fx.Node) -> tuple[str, str | None]:
    """Dotted names of weight and bias, of a module or of a function's arguments 1 and 2."""
    if n.op == "call_module":
        module = reader.module_of(n)
        names = [f"{n.target}.{leaf}" if getattr(module, leaf, None) is not None else None
                 for leaf in ("weight", "bias")]
    else:
        names = [reader.parameter(_argument(n, i, leaf))
                 for i, leaf in ((1, "weight"), (2, "bias"))]
    if names[0] is None:
        raise NoMatch("it has no weight; kernels have layers with one")
    return names[0], names[1]


def _pair(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * dims


def _conv(dims: int) -> Handler:
    def handler(reader: Reader, n: fx.Node, result: Any) -> Value:
        weight, bias = _weights(reader, n)
        x = reader.value(n.args[0])
        if n.op == "call_module":
            m = reader.module_of(n)
            stride, padding, dilation, groups = m.stride, m.padding, m.dilation, m.groups
            if m.padding_mode != "zeros":
                raise NoMatch(f"padding_mode={m.padding_mode!r}; kernels pad with zeros")
            shape = tuple(m.weight.shape)
        else:
            stride, padding, dilation, groups = (
                reader.real(_argument(n, i, name, default)) for i, name, default in
                ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
            )
            shape = tuple(reader.real(_argument(n, 1, "weight")).shape)
        out, _, *window = shape
        k = window[0]
        same = _pair(padding, dims) == (k // 2,) * dims or padding == "same"
        if len(set(window)) > 1 or k not in KERNELS:
            raise NoMatch(f"a window of {window}; kernels have square ones of {KERNELS}")
        if _pair(stride, dims) != (1,) * dims or _pair(dilation, dims) != (1,) * dims or not same:
            raise NoMatch(f"stride {stride}, padding {padding}, dilation {dilation}; kernels have "
                          f"stride 1, dilation 1 and padding {k // 2} for a window of {k}")
        fields: dict[str, Any] = {"weight": weight, "bias": bias}
        channels = reader.channels_of(n.args[0])
        if groups == channels == out and (k > 1 or groups > 1):
            allowed = MAP if dims == 2 else ("b", "c", "t")
            if x.axes != allowed:
                raise NoMatch(f"a depthwise convolution over [{', '.join(x.axes)}]")
            node = reader.emit(Op.DEPTHWISE, x.node, kernel=k, **fields)
        elif groups != 1:
            raise NoMatch(f"{groups} groups; kernels have one, or one per channel")
        elif dims != 2 or x.axes not in ((MAP,) if k > 1 else (MAP, POOLED)):
            raise NoMatch(f"a {dims}-d convolution over [{', '.join(x.axes)}]")
        elif k == 1:
            node = reader.emit(Op.LINEAR, x.node, out=reader.width(out), **fields)
        else:
            node = reader.emit(Op.CONV, x.node, kernel=k, out=reader.width(out), **fields)
        return Value(node, x.axes)

    return handler


def _norm(op: Op) -> Handler:
    """layer_norm and rms_norm, modules or functions (x, shape, weight, bias, eps)."""

    def handler(reader: Reader, n: fx.Node, result: Any) -> Value:
        x = reader.value(n.args[0])
        if n.op == "call_module":
            module = reader.module_of(n)
            shape, eps = tuple(module.normalized_shape), module.eps
            weight, bias = _weights(reader, n)
        else:
            shape = tuple(_pair(reader.real(_argument(n, 1, "normalized_shape")), 1))
            found = [reader.parameter(_argument(n, i, leaf))
                     for i, leaf in ((2, "weight"), (3, "bias"))]
            last = 4 if op is Op.LAYER_NORM else 3
            eps = _argument(n, last, "eps", 1e-5 if op is Op.LAYER_NORM else None)
            if found[0] is None:
                raise NoMatch("it has no weight; kernels have norms with one")
            weight, bias = found[0], (found[1] if op is Op.LAYER_NORM else None)
        if x.axes[-1] != "c" or len(shape) != 1:
            raise NoMatch(f"a norm over the last {len(shape)} of [{', '.join(x.axes)}]; kernels "
                          "have them over channels")
        if op is Op.LAYER_NORM and bias is None:
            raise NoMatch("it has no bias; kernels have layer norms with one")
        if eps is None:
            eps = torch.finfo(result.dtype).eps
        node = reader.emit(op, x.node, weight=weight, bias=bias, eps=eps)
        return Value(node, x.axes)

    return handler


def _group_norm(reader: Reader, n: fx.Node, result: Any) -> Value:
    x = reader.value(n.args[0])
    if n.op == "call_module":
        module = reader.module_of(n)
        groups, eps = module.num_groups, module.eps
        weight, bias = _weights(reader, n)
    else:
        groups, eps = _argument(n, 1, "num_groups"), _argument(n, 4, "eps", 1e-5)
        found = [reader.parameter(_argument(n, i, leaf)) for i, leaf in ((2, "weight"),
                                                                         (3, "bias"))]
        weight, bias = found[0] or "", found[1]
    if not weight or bias is None:
        raise NoMatch("it has no weight or bias; kernels have group norms with both")
    if x.axes != MAP:
        raise NoMatch(f"a group norm over [{', '.join(x.axes)}]; kernels have them on maps")
    node = reader.emit(Op.GROUP_NORM, x.node, weight=weight, bias=bias, groups=groups, eps=eps)
    return Value(node, x.axes)


def skipped(reader: Reader, n: fx.Node, result: Any) -> Value:
    """Dropout and the like: nothing at all, where it is not active."""
    if n.op == "call_module":
        module = reader.module_of(n)
        p, active = module.p, module.training and module.p > 0
    elif getattr(n.target, "__name__", "") == "stochastic_depth":
        p = _argument(n, 1, "p")
        active = p > 0 and _argument(n, 3, "training", True)
    else:
        p = _argument(n, 1, "p", 0.5)
        active = p > 0 and _argument(n, 2, "training", n.target is not F.dropout)
    if active:
        raise NoMatch(f"dropout of {p:g} is active in training")
    return reader.value(n.args[0])


# -- pooling and attention ------------------------------------------------------------------


def _mean(reader: Reader, n: fx.Node, result: Any) -> Value:
    if n.op == "call_module" or n.target is F.adaptive_avg_pool2d:
        size = (reader.module_of(n).output_size if n.op == "call_module"
                else reader.real(_argument(n, 1, "output_size")))
        if _pair(size, 2) != (1, 1):
            raise NoMatch(f"pooling to {size}; kernels pool to one value")
        dims, keep = (-2, -1), True
    else:
        given = reader.real(_argument(n, 1, "dim"))
        if given is None:
            raise NoMatch("a mean over everything; kernels pool over positions")
        dims, keep = _pair(given, 1), bool(_argument(n, 2, "keepdim", False))
    x = reader.whole(n.args[0])
    if x.part == "square" and keep and [d % len(x.axes) for d in dims] == [x.channel_axis]:
        return replace(x, part="mean square")
    x = reader.value(n.args[0])
    return replace(pooled(x, dims, keep, reader.positions),
                   node=reader.emit(Op.MEAN_POOL, x.node))


def _square(reader: Reader, n: fx.Node, result: Any) -> Value:
    x = reader.value(n.args[0])
    if n.target in ("pow", torch.pow, operator.pow) and reader.real(n.args[1]) != 2:
        raise NoMatch(f"the power {reader.real(n.args[1])}; kernels have no powers")
    return replace(x, part="square")


def _rsqrt(reader: Reader, n: fx.Node, result: Any) -> Value:
    x = reader.whole(n.args[0])
    if x.part != "variance":
        raise NoMatch("a square root outside of a normalisation")
    return replace(x, part="rstd")


def _attention(reader: Reader, n: fx.Node, result: Any) -> Value:
    q, k, v = (reader.value(_argument(n, i, name))
               for i, name in enumerate(("query", "key", "value")))
    for i, name, default in ((3, "attn_mask", None), (4, "dropout_p", 0.0), (6, "scale", None),
                             (7, "enable_gqa", False)):
        given = reader.real(_argument(n, i, name, default))
        if given is not None and given != default:
            raise NoMatch(f"attention with {name}; kernels have it plain or causal")
    causal = bool(reader.real(_argument(n, 5, "is_causal", False)))
    if any(x.axes != ("b", "h", "t", "d") for x in (q, k, v)):
        raise NoMatch("attention over axes "
                      + " ".join(f"[{', '.join(x.axes)}]" for x in (q, k, v))
                      + "; kernels have it over [b, h, t, d], heads split off the channels")
    if reader.causal not in (None, causal):
        raise NoMatch("causal and full attention in one module")
    reader.causal = causal
    heads = result.shape[1]
    return Value(reader.emit(Op.ATTENTION, q.node, k.node, v.node, heads=heads), q.axes)


# -- views ----------------------------------------------------------------------------------


def _view(reader: Reader, n: fx.Node, result: Any) -> Value | Ref:
    source = n.args[0]
    before = reader.real(source)
    found = reader.known[source]
    if isinstance(found, Ref):
        kept = [s for s in before.shape if s != 1] == [s for s in result.shape if s != 1]
        if not kept or before.numel() != result.numel():
            raise NoMatch("a parameter is cut or reordered; kernels take them whole")
        return found
    if before.numel() != result.numel():
        raise NoMatch("a part of a tensor is taken; kernels keep them whole")
    return reshaped(reader.value(source), before.shape, result.shape)


def _transpose(reader: Reader, n: fx.Node, result: Any) -> Value:
    first, second = (reader.real(_argument(n, i, f"dim{i - 1}")) for i in (1, 2))
    return swapped(reader.value(n.args[0]), first, second)


def _permute(reader: Reader, n: fx.Node, result: Any) -> Value:
    if n.op == "call_module":
        given = reader.module_of(n).dims
    else:
        given = reader.real(n.args[1:] or n.kwargs["dims"])
        given = given[0] if isinstance(given[0], Sequence) else given
    return permuted(reader.value(n.args[0]), given)


def _same(reader: Reader, n: fx.Node, result: Any) -> Value:
    before = reader.real(n.args[0])
    if result.dtype != before.dtype or result.device != before.device:
        raise NoMatch(f"a conversion from {before.dtype} to {result.dtype}; kernels have one type")
    return reader.whole(n.args[0])


MODULES: Mapping[type[nn.Module], Handler] = {
    nn.Linear: _linear, nn.Conv2d: _conv(2), nn.Conv1d: _conv(1),
    nn.LayerNorm: _norm(Op.LAYER_NORM), nn.RMSNorm: _norm(Op.RMS_NORM),
    nn.GroupNorm: _group_norm,
    nn.ReLU: _unary(Op.RELU), nn.GELU: _gelu, nn.SiLU: _unary(Op.SILU),
    nn.Tanh: _unary(Op.TANH), nn.Sigmoid: _unary(Op.SIGMOID),
    nn.Identity: _same, nn.AdaptiveAvgPool2d: _mean, nn.Flatten: _view,
    nn.Dropout: skipped, nn.Dropout1d: skipped, nn.Dropout2d: skipped,
}

CALLS: Mapping[Any, Handler] = {
    F.linear: _linear, F.conv2d: _conv(2), F.conv1d: _conv(1),
    F.layer_norm: _norm(Op.LAYER_NORM), F.rms_norm: _norm(Op.RMS_NORM),
    F.group_norm: _group_norm,
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), _unary(Op.RELU)),
    F.gelu: _gelu, F.silu: _unary(Op.SILU),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh"), _unary(Op.TANH)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid"), _unary(Op.SIGMOID)),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _sum),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _product),
    **dict.fromkeys((operator.pow, torch.pow, "pow", "square", torch.square), _square),
    **dict.fromkeys((torch.rsqrt, "rsqrt"), _rsqrt),
    **dict.fromkeys((torch.mean, "mean", F.adaptive_avg_pool2d), _mean),
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d), skipped),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
                     torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze,
                     operator.getitem), _view),
    **dict.fromkeys(("transpose", torch.transpose), _transpose),
    **dict.fromkeys(("permute", torch.permute), _permute),
    **dict.fromkeys(("contiguous", "clone", "to", "float", "type_as"), _same),
}

IN_PLACE = frozenset({operator.iadd, operator.imul, "relu_", "add_", "mul_"})
# Give numbers, not tensors; the first gives a tensor of a tensor and a number of a shape.
SIZES: tuple[Any, ...] = (operator.getitem, getattr, "size", "dim")
