"""From a blueprint to two graphs, forward and backward, ready for ahead-of-time compilation.

The blend is part of what is traced, so the compiler fuses it into the seed's last loop. One
joint graph is cut in two by the min-cut partitioner, which recomputes what is cheap. Batch
and space stay symbolic; symbolic sizes that a half needs are read off its tensor inputs, so
both halves take and return tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from esper.errors import CompileError
from esper.leyline.blueprint import BlueprintIR
from esper.leyline.reference import apply, blend, initial_parameters
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.convolutions import SPELLED_OUT

# Hints, not limits: what the compiler tunes for. None of them is 0, 1 or equal to another,
# for sizes that look alike would be taken for the same size.
HINT_BATCH, HINT_SPACE = 16, (8, 9)


class _Tensors(torch.nn.Module):
    """Calls a partitioned graph with sizes taken from the tensors; keeps some outputs."""

    def __init__(
        self, graph: fx.GraphModule, plan: Sequence[int | tuple[int, int]], keep: Sequence[int]
    ) -> None:
        super().__init__()
        self.graph, self.plan, self.keep = graph, tuple(plan), tuple(keep)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = [
            tensors[p] if isinstance(p, int) else tensors[p[0]].shape[p[1]] for p in self.plan
        ]
        outputs = self.graph(*inputs)
        return tuple(outputs[i] for i in self.keep)


@dataclass(frozen=True)
class Half:
    """One half: a module of tensors to tensors, example inputs, and which axes are symbolic."""

    module: _Tensors
    examples: tuple[Tensor, ...]
    dynamic: tuple[dict[int, Any] | None, ...]

    def export(self) -> torch.export.ExportedProgram:
        return torch.export.export(
            self.module, self.examples, dynamic_shapes=(self.dynamic,), strict=False
        )


@dataclass(frozen=True)
class Lowered:
    """Both halves and how they are called; see `leyline.artifact` for the two tables."""

    forward: Half
    backward: Half
    backward_inputs: tuple[str, ...]
    gradients: tuple[int, ...]

    @property
    def code(self) -> tuple[str, str]:
        """Both graphs in words; two lowerings with the same code compile to the same."""
        return self.forward.module.graph.code, self.backward.module.graph.code


def trace_joint(
    ir: BlueprintIR, signature: SiteSignature, *, spelled_out: bool = False
) -> fx.GraphModule:
    """Forward and backward of blend(h, f(h), alpha) in one graph of ATen operations.

    For a standalone signature it is f(h) alone, and alpha an input that nothing reads. With
    `spelled_out`, convolutions become what `convolutions` makes of them.
    """
    dtype = getattr(torch, signature.dtype)
    shape = list(signature.shape(HINT_BATCH, HINT_SPACE[0]))
    dynamic = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (len(shape) - 1)
    if signature.kind is SiteKind.TOKENS:
        dynamic[1] = DimDynamic.DYNAMIC
    elif signature.kind is SiteKind.MAP:
        shape[3] = HINT_SPACE[1]
        dynamic[2] = dynamic[3] = DimDynamic.DYNAMIC
    device = signature.device
    params = initial_parameters(ir, signature, device=device)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    h = mode.from_tensor(
        torch.zeros(shape, dtype=dtype, device=device, requires_grad=True),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic),
    )
    alpha = mode.from_tensor(torch.tensor(0.5, device=device))
    fakes = [mode.from_tensor(p.requires_grad_(), static_shapes=True) for p in params]

    def blended(h: Tensor, alpha: Tensor, *params: Tensor) -> tuple[Tensor]:
        out = apply(ir, signature, h, params)
        if not signature.standalone:
            out = blend(h, out, alpha)
        # The clone keeps attention's output from being an alias, which the trace refuses.
        return (out.clone(),)

    table = {**select_decomp_table(), **(SPELLED_OUT if spelled_out else {})}
    return aot_export_joint_simple(  # type: ignore[return-value]
        blended, (h, alpha, *fakes), trace_joint=True, decompositions=table
    )


def _undo_double_permutes(graph: fx.GraphModule) -> None:
    """permute(permute(x)) that ends where it began is x.

    The derivative of a linear layer transposes the transposed weight. Left alone, that view
    would be saved for the backward as a tensor of its own; as the weight itself it is an
    input, and costs nothing.
    """
    permute = torch.ops.aten.permute.default
    for node in graph.graph.find_nodes(op="call_function", target=permute):
        inner = node.args[0]
        if inner.op == "call_function" and inner.target is permute:
            composed = [inner.args[1][axis] for axis in node.args[1]]
            if composed == list(range(len(composed))):
                node.replace_all_uses_with(inner.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "placeholder"]


def _outputs(graph: fx.GraphModule) -> list[Any]:
    return list(next(n for n in graph.graph.nodes if n.op == "output").args[0])


def _sizes(tensor: Tensor) -> list[Any]:
    """Its extents, symbolic ones included, which torch's type stubs do not know of."""
    return list(tensor.shape)


def _plan(nodes: Sequence[fx.Node]) -> tuple[list[int | tuple[int, int]], list[Tensor]]:
    """Where each input of a graph comes from: a tensor's index, or (tensor, axis) for a size."""
    tensors = [n.meta["val"] for n in nodes if isinstance(n.meta["val"], Tensor)]
    sizes: dict[Any, tuple[int, int]] = {}
    for index, tensor in enumerate(tensors):
        for axis, size in enumerate(_sizes(tensor)):
            if isinstance(size, torch.SymInt):
                sizes.setdefault(size.node.expr, (index, axis))
    plan: list[int | tuple[int, int]] = []
    count = 0
    for node in nodes:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            plan.append(count)
            count += 1
        elif value.node.expr in sizes:
            plan.append(sizes[value.node.expr])
        else:
            raise CompileError(
                f"size {value.node.expr} is needed and is no axis of any tensor; the graph "
                "computes a shape that it does not keep, which esper cannot lower"
            )
    return plan, tensors


def _dimension(size: Any, named: dict[Any, Any]) -> Any:
    """What torch.export is told of a size: a multiple of a named one, and so many more (what was
    padded is longer than its input); AUTO for what it has no words for, batch times length say."""
    if len(size.free_symbols) != 1:
        return Dim.AUTO
    (symbol,) = size.free_symbols
    factor = size.coeff(symbol)
    more = size - factor * symbol
    if not (factor.is_Integer and more.is_Integer):
        return Dim.AUTO
    dimension = named.setdefault(symbol, Dim(f"size{len(named)}", min=1))
    if factor != 1:
        dimension = int(factor) * dimension
    return dimension + int(more) if more != 0 else dimension


def _half(graph: fx.GraphModule, keep: Sequence[int]) -> Half:
    plan, tensors = _plan(_placeholders(graph))

    def concrete(size: Any) -> int:
        value: Any = size.node.hint if isinstance(size, torch.SymInt) else size
        return int(value)

    # Axes that were one symbol in the joint graph must stay one in each half: a convolution's
    # backward checks nothing, and would be compiled for sizes that never meet.
    named: dict[Any, Any] = {}
    examples, dynamic = [], []
    for tensor in tensors:
        shape = [concrete(s) for s in tensor.shape]
        stride = [concrete(s) for s in tensor.stride()]
        example = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
        examples.append(example.zero_())
        axes: dict[int, Any] = {}
        for axis, size in enumerate(_sizes(tensor)):
            if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
                continue
            axes[axis] = _dimension(size.node.expr, named)
        dynamic.append(axes or None)
    return Half(_Tensors(graph, plan, keep), tuple(examples), tuple(dynamic))


def lower(ir: BlueprintIR, signature: SiteSignature, *, spelled_out: bool = False) -> Lowered:
    """Trace (see `trace_joint`), differentiate and partition a blueprint at a signature.

    Raises:
        CompileError: a half needs a size that none of its tensors has.
    """
    joint = trace_joint(ir, signature, spelled_out=spelled_out)
    _undo_double_permutes(joint)
    inputs = _placeholders(joint)
    fake_mode = inputs[0].meta["val"].fake_mode
    with fake_mode:
        forward, backward = min_cut_rematerialization_partition(
            joint, None, num_fwd_outputs=1, compiler="inductor"
        )

    # Forward: the result, and those saved tensors that are not inputs anyway.
    names = [n.name for n in _placeholders(forward) if isinstance(n.meta["val"], Tensor)]
    source = {name: f"in:{i}" for i, name in enumerate(names)}
    keep = [0]
    for index, node in enumerate(_outputs(forward)[1:], start=1):
        if isinstance(node.meta["val"], Tensor) and node.name not in source:
            source[node.name] = f"out:{len(keep)}"
            keep.append(index)

    # Backward: gradients in the order h, alpha, parameters; alpha's is not wanted.
    wanted = [i for i, node in enumerate(_outputs(backward)) if i != 1 and node is not None]
    position = {i: p for p, i in enumerate(wanted)}
    total = len(names)
    gradients = tuple(position.get(i, -1) for i in range(total) if i != 1)
    backward_inputs = tuple(
        "grad" if str(n.target).startswith("tangents") else source[n.name]
        for n in _placeholders(backward) if isinstance(n.meta["val"], Tensor)
    )
    return Lowered(_half(forward, keep), _half(backward, wanted), backward_inputs, gradients)
