"""Blueprints that Triton templates compute whole: which they are, and what is launched for them.

Nothing here imports Triton. A program says which kernels (`Form`) are launched on what; `cubins`
compiles the forms, and the tests run them interpreted, by the same launches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from esper.errors import CompileError
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import INPUT, BlueprintIR, Node, Op
from esper.leyline.launch import ALIGNMENT, TYPES, Buffer, Extent, Half, Launch
from esper.leyline.shapes import infer
from esper.leyline.signature import DType, SiteKind, SiteSignature

Constant = bool | int | float | str
MAX_RANK = 64  # of the fused low-rank map; its code is kept in registers
BLOCK = 1024
NORM_ROWS, NORM_COLUMNS = 16, 128


@dataclass(frozen=True)
class Tiles:
    """How a pipeline cuts matrix products: the tile, its step along the inner axis, and how many
    warps and how many loads in flight work on it."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# More registers and shared memory for fewer visits to memory. None was ever timed on a GPU; they
# were chosen by what ptxas spills, which is little or nothing. In float32 a product is made of
# single multiplications, and takes more registers.
NARROW = {
    Pipeline.FAST: Tiles(32, 32, 32, 4, 2),
    Pipeline.STANDARD: Tiles(64, 64, 32, 4, 3),
    Pipeline.AGGRESSIVE: Tiles(128, 64, 32, 8, 4),
}
FLOAT32 = {
    Pipeline.FAST: Tiles(32, 32, 16, 4, 2),
    Pipeline.STANDARD: Tiles(64, 32, 16, 4, 3),
    Pipeline.AGGRESSIVE: Tiles(64, 64, 16, 8, 3),
}


@dataclass(frozen=True)
class Form:
    """One kernel as it is compiled: "module.function" of `esper.triton_kernels`, the types of its
    arguments, which of them are known to be multiples of 16, and its constants."""

    function: str
    types: tuple[str, ...]
    aligned: tuple[bool, ...]
    constants: tuple[tuple[str, Constant], ...]
    warps: int
    stages: int


@dataclass(frozen=True)
class Program:
    """A blueprint's two halves; `Launch.kernel` is an index of `forms`. `backward_inputs` and
    `gradients` are the manifest's."""

    forms: tuple[Form, ...]
    forward: Half
    backward: Half
    backward_inputs: tuple[str, ...]
    gradients: tuple[int, ...]


@dataclass
class _Writer:
    """Collects the launches of one half. `forms` is shared by both."""

    type: str
    tiles: Tiles
    forms: list[Form]
    inputs: list[str]
    buffers: list[Buffer] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def buffer(self, *shape: int, rows: bool = False, type_: str | None = None) -> str:
        self.buffers.append(Buffer(shape=shape, rows=rows, type=type_ or self.type))
        return f"buf:{len(self.buffers) - 1}"

    def launch(
        self, function: str, grid: Sequence[Extent], arguments: Sequence[str | Extent | int],
        constants: Mapping[str, Constant], warps: int | None = None,
    ) -> None:
        given = [Extent(plus=a) if isinstance(a, int) else a for a in arguments]
        form = Form(
            function, tuple(map(self._type, given)), tuple(map(_aligned, given)),
            tuple(constants.items()), warps or self.tiles.warps, self.tiles.stages,
        )
        if form not in self.forms:
            self.forms.append(form)
        x, y, z = (*grid, Extent(plus=1), Extent(plus=1))[:3]
        self.launches.append(
            Launch(kernel=self.forms.index(form), grid=(x, y, z), arguments=tuple(given))
        )

    def _type(self, argument: str | Extent) -> str:
        if isinstance(argument, Extent):
            return "i64" if argument.times > 1 else "i32"  # elements may be more than 2^31
        kind, _, index = argument.partition(":")
        return f"*{self.inputs[int(index)] if kind == 'in' else self.buffers[int(index)].type}"

    # The kernels of esper.triton_kernels, with what they are launched on.

    def combine(self, how: str, a: str, b: str, alpha: str, channels: int) -> str:
        out = self.buffer(channels, rows=True)
        self.launch("seeds.combine", [Extent(times=channels, over=BLOCK)],
                    [a, b, alpha, out, Extent(times=channels)], {"HOW": how, "BLOCK": BLOCK}, 4)
        return out

    def product(
        self, a: str, b: str, out: str, sizes: tuple[Extent | int, Extent | int, Extent | int],
        strides: tuple[int, int, int, int], bias: str | None = None, add: str | None = None,
    ) -> str:
        """`out` = a b [+ bias] [+ add]; sizes (rows, columns, inner), strides (a's, b's)."""
        tiles = self.tiles
        self.launch(
            "seeds.product", [_tiles(sizes[0], tiles.rows), _tiles(sizes[1], tiles.columns)],
            [a, b, bias or a, add or a, out, *sizes, *strides],
            {"HAS_BIAS": bias is not None, "HAS_ADD": add is not None, **self.steps()},
        )
        return out

    def linear(self, x: str, weight: str, bias: str | None, width: int, out: int) -> str:
        """x [rows, width] times weight' [width, out]."""
        return self.product(x, weight, self.buffer(out, rows=True), (ROWS, out, width),
                            (width, 1, 1, width), bias=bias)

    def through(
        self, grad: str, weight: str, width: int, out: int, add: str | None = None
    ) -> str:
        """The gradient of a linear layer's input: grad [rows, out] times weight [out, width]."""
        return self.product(grad, weight, self.buffer(width, rows=True), (ROWS, width, out),
                            (out, 1, width, 1), add=add)

    def weight_gradient(self, grad: str, x: str, width: int, out: int) -> str:
        """grad' [out, rows] times x [rows, width]."""
        return self.product(grad, x, self.buffer(out, width), (out, width, ROWS),
                            (1, out, width, 1))

    def column_sum(self, x: str, channels: int, weighted: tuple[str, str] | None = None) -> str:
        out = self.buffer(channels)
        y, scale = weighted or (x, x)
        self.launch("seeds.column_sum", [_tiles(channels, NORM_COLUMNS)],
                    [x, y, scale, out, ROWS, channels],
                    {"WEIGHTED": weighted is not None, "ROWS": NORM_ROWS,
                     "COLUMNS": NORM_COLUMNS}, 4)
        return out

    def steps(self) -> dict[str, Constant]:
        # TF32 would be ten bits where the site asks for float32; torch's default is the same.
        return {"PRECISION": "ieee", "ROWS": self.tiles.rows, "COLUMNS": self.tiles.columns,
                "INNER": self.tiles.inner}

    def half(self, like_h: int, outputs: Sequence[str]) -> Half:
        return Half(inputs=tuple(self.inputs), like_h=like_h, buffers=tuple(self.buffers),
                    launches=tuple(self.launches),
                    outputs=tuple(int(o.removeprefix("buf:")) for o in outputs))


ROWS = Extent(times=1)


def _tiles(size: Extent | int, tile: int) -> Extent:
    if isinstance(size, int):
        return Extent(plus=-(-size // tile))
    return Extent(times=size.times, over=tile)


def _aligned(argument: str | Extent) -> bool:
    """What is known when it is compiled: addresses by convention, numbers that do not change."""
    if isinstance(argument, Extent):
        return argument.times == 0 and argument.plus % ALIGNMENT == 0 and argument.plus > 0
    return True


@dataclass(frozen=True)
class _Parts:
    """The nodes of a blueprint that a template computes: h + last(...)."""

    first: tuple[Node, ...]  # (down,) of a low-rank map, (gate, up) of a gated MLP
    last: Node
    norm: Node | None = None


def match(ir: BlueprintIR, signature: SiteSignature) -> _Parts:
    """The parts of `ir`, where a template computes it at `signature`.

    Raises:
        CompileError: none does; says why.
    """
    if signature.standalone or signature.dtype not in TYPES or signature.kind is SiteKind.MAP:
        raise CompileError(
            f"Triton's templates are for seeds at features and tokens in {', '.join(TYPES)}, the "
            f"site is {signature}"
        )
    parts = _low_rank(ir, signature) or _gated(ir)
    if parts is None:
        raise CompileError(
            f"no Triton template computes {ir.name or ir.id}; there are h + a low-rank map (of a "
            f"rank up to {MAX_RANK}, its inner layer without bias), and h + a gated MLP, on an "
            "RMS norm or not"
        )
    return parts


def _branch(ir: BlueprintIR) -> Node | None:
    """The linear node that is added to h, where the output is such a sum."""
    total = ir.node(ir.output)
    branch = next((i for i in total.inputs if i != INPUT), None)
    if total.op is not Op.ADD or INPUT not in total.inputs or branch is None:
        return None
    node = ir.node(branch)
    return node if node.op is Op.LINEAR and node.inputs[0] != INPUT else None


def _low_rank(ir: BlueprintIR, signature: SiteSignature) -> _Parts | None:
    last = _branch(ir)
    if last is None or len(ir.nodes) != 3:
        return None
    down = ir.node(last.inputs[0])
    if down.op is not Op.LINEAR or down.inputs != (INPUT,) or down.has_bias:
        return None
    assert down.out is not None
    return _Parts((down,), last) if down.out.at(signature.channels) <= MAX_RANK else None


def _gated(ir: BlueprintIR) -> _Parts | None:
    last = _branch(ir)
    product = ir.node(last.inputs[0]) if last is not None else None
    if last is None or product is None or product.op is not Op.MUL or INPUT in product.inputs:
        return None
    for a, b in (product.inputs, product.inputs[::-1]):
        silu, up = ir.node(a), ir.node(b)
        gate = None if silu.op is not Op.SILU or silu.inputs == (INPUT,) else ir.node(
            silu.inputs[0])
        if gate is None or gate.op is not Op.LINEAR or up.op is not Op.LINEAR or (
                gate.inputs != up.inputs):
            continue
        norm = None if gate.inputs == (INPUT,) else ir.node(gate.inputs[0])
        if norm is not None and (norm.op is not Op.RMS_NORM or norm.inputs != (INPUT,)):
            return None
        return _Parts((gate, up), last, norm) if len(ir.nodes) == 6 + bool(norm) else None
    return None


def program(ir: BlueprintIR, signature: SiteSignature, pipeline: Pipeline) -> Program:
    """What is launched for `ir`; raises as `match` does."""
    parts = match(ir, signature)
    write = _write_gated if len(parts.first) == 2 else _write_low_rank
    tiles = FLOAT32 if signature.dtype is DType.FLOAT32 else NARROW
    return write(ir, signature, parts, tiles[pipeline])


class _Both:
    """The two halves under way, and how each names h, alpha, the parameters and what is saved."""

    def __init__(self, ir: BlueprintIR, signature: SiteSignature, tiles: Tiles) -> None:
        self.channels = signature.channels
        self.parameters = [p.name for p in infer(ir, signature).parameters]
        self.width = {n: v.channels for n, v in infer(ir, signature).values.items()}
        self.type, forms = TYPES[signature.dtype], list[Form]()
        inputs = [self.type, "fp32", *(self.type for _ in self.parameters)]
        self.forward = _Writer(self.type, tiles, forms, inputs)
        self.backward = _Writer(self.type, tiles, forms, [])
        self.saved: list[str] = []
        self.sources: list[str] = []
        self.gradients: dict[str, str] = {}

    def parameter(self, node: Node, leaf: str) -> str | None:
        """Where the forward finds a parameter; None where the node has none of that name."""
        name = f"{node.id}.{leaf}"
        return f"in:{2 + self.parameters.index(name)}" if name in self.parameters else None

    def weight(self, node: Node) -> str:
        found = self.parameter(node, "weight")
        assert found is not None, "linear layers and norms have one"
        return found

    def recall(self, source: str) -> str:
        """What the forward calls `source`, or "grad", as an input of the backward."""
        if source.startswith("buf:"):
            if source not in self.saved:
                self.saved.append(source)
            source = f"out:{1 + self.saved.index(source)}"
        if source not in self.sources:
            self.sources.append(source)
            kind, _, index = source.partition(":")
            self.backward.inputs.append(
                self.type if kind == "grad" else self.forward.inputs[int(index)] if kind == "in"
                else self.forward.buffers[int(self.saved[int(index) - 1][4:])].type)
        return f"in:{self.sources.index(source)}"

    def linear_gradients(self, node: Node, grad: str, x: str) -> None:
        """Those of a linear layer's parameters; `x` is its input in the backward."""
        width, out = self.width[node.inputs[0]], self.width[node.id]
        made = self.backward.weight_gradient(grad, x, width, out)
        self.gradients[f"{node.id}.weight"] = made
        if node.has_bias:
            self.gradients[f"{node.id}.bias"] = self.backward.column_sum(grad, out)

    def program(self, out: str, grad_h: str) -> Program:
        wanted = [grad_h, *(self.gradients[name] for name in self.parameters)]
        return Program(
            tuple(self.forward.forms), self.forward.half(0, [out, *self.saved]),
            self.backward.half(self.sources.index("grad"), wanted), tuple(self.sources),
            tuple(range(len(wanted))),
        )


def _write_low_rank(
    ir: BlueprintIR, signature: SiteSignature, parts: _Parts, tiles: Tiles
) -> Program:
    both = _Both(ir, signature, tiles)
    forward, backward, c = both.forward, both.backward, both.channels
    (down,), up = parts.first, parts.last
    rank, bias = both.width[down.id], both.parameter(up, "bias")
    branch, code = forward.buffer(c, rows=True), forward.buffer(rank, rows=True)
    forward.launch(
        "low_rank.low_rank_map", [_tiles(ROWS, tiles.rows)],
        ["in:0", both.weight(down), both.weight(up), bias or "in:0", branch, code,
         ROWS, c, rank, c, c, 1, rank, 1],
        {"HAS_BIAS": bias is not None, "RANK": max(16, 1 << (rank - 1).bit_length()),
         **forward.steps()},
    )
    out = forward.combine("graft", "in:0", branch, "in:1", c)

    grad = both.recall("grad")
    part = backward.combine("scale", grad, grad, both.recall("in:1"), c)
    both.linear_gradients(up, part, both.recall(code))
    g_code = backward.through(part, both.recall(both.weight(up)), rank, c)
    both.linear_gradients(down, g_code, both.recall("in:0"))
    g_h = backward.through(g_code, both.recall(both.weight(down)), c, rank, add=grad)
    return both.program(out, g_h)


def _write_gated(
    ir: BlueprintIR, signature: SiteSignature, parts: _Parts, tiles: Tiles
) -> Program:
    both = _Both(ir, signature, tiles)
    forward, backward, c = both.forward, both.backward, both.channels
    (gate, up), down, norm = parts.first, parts.last, parts.norm
    width = both.width[gate.id]
    x, scale = "in:0", ""
    if norm is not None:
        x, scale = forward.buffer(c, rows=True), forward.buffer(rows=True, type_="fp32")
        forward.launch("seeds.rms_norm_forward", [_tiles(ROWS, NORM_ROWS)],
                       ["in:0", both.weight(norm), x, scale, ROWS, c],
                       {"EPS": norm.epsilon, "ROWS": NORM_ROWS, "COLUMNS": NORM_COLUMNS}, 4)
    hidden, g, u = (forward.buffer(width, rows=True) for _ in range(3))
    b_gate, b_up = both.parameter(gate, "bias"), both.parameter(up, "bias")
    forward.launch(
        "gated_mlp.gate_forward", [_tiles(ROWS, tiles.rows), _tiles(width, tiles.columns)],
        [x, both.weight(gate), b_gate or x, both.weight(up), b_up or x, hidden, g, u,
         ROWS, c, width],
        {"HAS_BG": b_gate is not None, "HAS_BU": b_up is not None, "SAVE": True,
         **forward.steps()},
    )
    branch = forward.linear(hidden, both.weight(down), both.parameter(down, "bias"), width, c)
    out = forward.combine("graft", "in:0", branch, "in:1", c)

    grad = both.recall("grad")
    part = backward.combine("scale", grad, grad, both.recall("in:1"), c)
    both.linear_gradients(down, part, both.recall(hidden))
    g_hidden = backward.through(part, both.recall(both.weight(down)), width, c)
    g_gate, g_up = (backward.buffer(width, rows=True) for _ in range(2))
    backward.launch("gated_mlp.gate_backward", [Extent(times=width, over=BLOCK)],
                    [g_hidden, both.recall(g), both.recall(u), g_gate, g_up,
                     Extent(times=width)], {"BLOCK": BLOCK}, 4)
    seen = both.recall(x)
    both.linear_gradients(gate, g_gate, seen)
    both.linear_gradients(up, g_up, seen)
    first = backward.through(g_gate, both.recall(both.weight(gate)), c, width,
                             add=None if norm else grad)
    g_x = backward.through(g_up, both.recall(both.weight(up)), c, width, add=first)
    if norm is None:
        return both.program(out, g_x)
    h, kept = both.recall("in:0"), both.recall(scale)
    g_h = backward.buffer(c, rows=True)
    backward.launch("seeds.rms_norm_backward", [_tiles(ROWS, NORM_ROWS)],
                    [g_x, h, both.recall(both.weight(norm)), kept, grad, g_h, ROWS, c],
                    {"ROWS": NORM_ROWS, "COLUMNS": NORM_COLUMNS}, 4)
    both.gradients[f"{norm.id}.weight"] = backward.column_sum(g_x, c, (h, kept))
    return both.program(out, g_h)
