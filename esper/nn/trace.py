"""Matching a module by what it computes: its blueprint, its signature, where its weights are.

The forward is traced by torch.fx and read operation by operation (`reader`). What was read is
then compared with the module itself, in its own precision and in float64, at the example's
shape and at another: what does not agree is no match, whatever the graph said.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor, fx, nn

from esper.errors import BlueprintError
from esper.leyline.blueprint import INPUT, MAX_NODES, BlueprintIR, Node, Op
from esper.leyline.reference import apply
from esper.leyline.shapes import infer
from esper.leyline.signature import DType, SiteKind, SiteSignature
from esper.nn.fast import plain_forward
from esper.nn.reader import Reader
from esper.nn.values import NoMatch

_AXES = {SiteKind.FEATURES: ("b", "c"), SiteKind.TOKENS: ("b", "t", "c"),
         SiteKind.MAP: ("b", "c", "y", "x")}
_KINDS = {2: SiteKind.FEATURES, 3: SiteKind.TOKENS, 4: SiteKind.MAP}
_DTYPES = {getattr(torch, d): d for d in DType}


@dataclass(frozen=True)
class Weight:
    """A kernel's parameter: the module's, by its dotted name, seen in `shape`."""

    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """A module as a kernel sees it. `flat`: positions of any rank are folded into the batch.

    `only_eval` says why the kernel cannot stand in while the module trains, or is empty.
    """

    ir: BlueprintIR
    signature: SiteSignature
    weights: tuple[Weight, ...]
    flat: bool
    only_eval: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.ir.id, self.signature.id


class _One(nn.Module):
    """Calls a module's own forward on one tensor; hooks on the module are no part of it."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = plain_forward(self.m)(x)
        return out


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m).__name__ == "Permute" and hasattr(m, "dims"):
            return False
        return super().is_leaf_module(m, module_qualified_name)


@contextlib.contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """`module` and all below it in training or evaluation, and afterwards as they were."""
    before = [(m, m.training) for m in module.modules()]
    for m, _ in before:
        m.training = training
    try:
        yield
    finally:
        for m, was in before:
            m.training = was


def match(module: nn.Module, example: Tensor) -> Match:
    """What `module` computes for inputs like `example`, whose values do not matter.

    Raises:
        NoMatch: with the operation, shape or module at fault.
    """
    _check_hooks(module)
    if example.dim() < 2:
        raise NoMatch(f"its input is of rank {example.dim()}; kernels take [batch, channels] at "
                      "least")
    if example.dtype not in _DTYPES:
        raise NoMatch(f"its input is {example.dtype}; kernels take floating point tensors")
    # A batch of one could be taken for an axis that was pooled.
    shape = (max(2, example.shape[0]), *example.shape[1:])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.randn(shape, dtype=example.dtype).to(example.device)
        try:
            found = _match_as(module, x, _KINDS.get(x.dim()))
        except NoMatch:
            # Over maps or more the last axis may be channels, and all others positions.
            if x.dim() < 4:
                raise
            try:
                found = _match_as(module, x, None)
            except NoMatch:
                if x.dim() > 4:
                    raise
                return _match_as(module, x, SiteKind.MAP)  # its reason is the better one
    return found


def _check_hooks(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if m is not module and (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
                                or m._backward_pre_hooks):
            raise NoMatch(f"{name} has hooks, which a kernel would not call")
        if torch.nn.utils.parametrize.is_parametrized(m):
            raise NoMatch(f"{name or 'it'} has parametrized weights")


def _match_as(module: nn.Module, x: Tensor, kind: SiteKind | None) -> Match:
    """Read as one kind of site; None folds all axes but the last into the batch."""
    with mode(module, False):
        found = _read(module, x, kind)
        _compare(module, found, x)
    try:
        with mode(module, True):
            learning = _read(module, x, kind)
    except NoMatch as e:
        return Match(found.ir, found.signature, found.weights, found.flat, str(e))
    if learning != found:
        return Match(found.ir, found.signature, found.weights, found.flat,
                     "it computes something else in training")
    return found


def _read(module: nn.Module, x: Tensor, kind: SiteKind | None) -> Match:
    graph = _trace(module)
    flat = kind is None
    axes = (*(f"p{i}" for i in range(x.dim() - 1)), "c") if kind is None else _AXES[kind]
    kind = kind or SiteKind.FEATURES
    channels = x.shape[axes.index("c")]
    reader = Reader(graph, axes, channels)
    try:
        reader.run(x)
    except NoMatch:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        raise NoMatch(f"it cannot be run on {list(x.shape)}: {_first_line(e)}") from e
    assert reader.found is not None
    if reader.found.axes != axes:
        raise NoMatch(f"its output has axes [{', '.join(reader.found.axes)}], its input "
                      f"[{', '.join(axes)}]; a kernel's output is shaped as its input")
    nodes = _live(reader)
    if sum(n.op is not Op.ADD for n in nodes) < 2:
        raise NoMatch("a single operation, there is nothing to fuse")
    if len(nodes) > MAX_NODES:
        raise NoMatch(f"{len(nodes)} operations; a blueprint has at most {MAX_NODES}")
    try:
        ir = BlueprintIR(kind=kind, name=type(module).__name__[:80], nodes=nodes,
                         output=reader.found.node)
        signature = SiteSignature(
            kind=kind, channels=channels, dtype=_DTYPES[x.dtype], device=x.device.type,
            causal=bool(reader.causal), standalone=True,
        )
        parameters = infer(ir, signature).parameters
    except BlueprintError as e:
        raise NoMatch(_in_words(e, module)) from e
    except ValidationError as e:
        raise NoMatch(str(e.errors()[0]["msg"])) from e
    of = dict(_One(module).named_parameters(remove_duplicate=False))
    weights = []
    for p in parameters:
        path = reader.weights[p.name]
        if of[path].dtype != x.dtype or of[path].device != x.device:
            raise NoMatch(f"{path.removeprefix('m.')} is {of[path].dtype} on {of[path].device}, "
                          f"the input {x.dtype} on {x.device}")
        weights.append(Weight(path.removeprefix("m."), p.shape))
    return Match(ir, signature, tuple(weights), flat)


def _in_words(e: BlueprintError, module: nn.Module) -> str:
    text = str(e)
    return text.replace("the output has", "its output has") if e.node is None else text


def _live(reader: Reader) -> tuple[Node, ...]:
    assert reader.found is not None
    wanted = {reader.found.node}
    for node in reversed(reader.nodes):
        if node.id in wanted:
            wanted.update(node.inputs)
    if wanted == {INPUT}:
        raise NoMatch("it returns its input")
    return tuple(n for n in reader.nodes if n.id in wanted)


def _trace(module: nn.Module) -> fx.GraphModule:
    signature = inspect.signature(plain_forward(module)).parameters.values()
    needed = [p for p in signature if p.default is p.empty
              and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 1:
        raise NoMatch(f"its forward needs {', '.join(p.name for p in needed)}; a kernel has one "
                      "input")
    root = _One(module)
    try:
        graph = _Tracer().trace(root)
    except Exception as e:  # tracing runs the module's own code, which may raise anything
        raise NoMatch(f"torch.fx cannot trace it: {_first_line(e)}") from e
    traced = fx.GraphModule(root, graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]


def _compare(module: nn.Module, found: Match, x: Tensor) -> None:
    """The module and its blueprint must agree, to their rounding.

    Raises:
        NoMatch: they do not.
    """
    exact = copy.deepcopy(module).double()
    other = x[:1] if found.signature.kind is not SiteKind.FEATURES else x[:-1]
    for m, tolerance, dtype in ((module, 64 * torch.finfo(x.dtype).eps, x.dtype),
                                (exact, 1e-10, torch.float64)):
        params = tensors(m, found.weights)
        for given in (x, other):
            h = given.to(dtype)
            truth = plain_forward(m)(h.clone())
            ours = apply(found.ir, found.signature, fold(h, found.flat), params).view_as(h)
            worst = float((truth - ours).abs().max())
            if not worst <= tolerance * max(1.0, float(truth.abs().max())):
                raise NoMatch(f"what was read of it differs from what it computes, by {worst:.2g}")


def fold(x: Tensor, flat: bool) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if flat else x


def tensors(module: nn.Module, weights: Sequence[Weight]) -> list[Tensor]:
    """The module's parameters as a kernel takes them; views where it wants another shape."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = [(parameters[w.path], w.shape) for w in weights]
    return [p if tuple(p.shape) == shape else p.view(shape) for p, shape in found]
