"""From a traced graph to a blueprint, by running it once.

The graph runs on random numbers of the example's shape, so that every size is a number;
beside it each tensor is followed as a `Value`. An operation that the closed set does not have
ends the reading with `NoMatch`, before it is run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from esper.leyline.blueprint import INPUT, SPECS, C, Node, Op, Width
from esper.nn.operations import CALLS, IN_PLACE, MODULES, SIZES, Handler, skipped
from esper.nn.values import POSITIONS, NoMatch, Ref, Value


def width(n: int, channels: int) -> Width:
    """`n` in terms of C where it is a simple multiple or part of it, else as the number it is."""
    if n == channels:
        return C
    if n % channels == 0 and n // channels <= 64:
        return Width(times=n // channels)
    if channels % n == 0 and channels // n <= 4096:
        return Width(times=1, over=channels // n)
    return Width(plus=n)


class Reader(fx.Interpreter):
    """Runs a graph of one input and writes down its blueprint.

    After `run`: `nodes`, `found` (the output), `causal` (None without attention), and
    `weights`, the dotted name of the module's parameter by the name of the kernel's.
    """

    def __init__(self, graph: fx.GraphModule, axes: tuple[str, ...], channels: int) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.extra_traceback = False  # a reason is one line
        self.axes, self.channels = axes, channels
        self.positions = POSITIONS & set(axes)
        self.nodes: list[Node] = []
        self.weights: dict[str, str] = {}
        self.causal: bool | None = None
        self.found: Value | None = None
        self.known: dict[Any, Value | Ref] = {}
        self._modules = dict(graph.named_modules())
        self._started = False

    # -- walking --------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        try:
            handler = self._handler(n)
            result = super().run_node(n)
            if handler is not None:
                self.known[n] = handler(self, n, result)
            elif n.op == "output":
                self.found = self.value(n.args[0])
            elif isinstance(result, Tensor):
                raise NoMatch("it makes a tensor of its own")
        except NoMatch as e:
            raise NoMatch(f"{self._title(n)}: {e}") from None
        return result

    def _handler(self, n: fx.Node) -> Handler | None:
        target: Any = n.target
        match n.op:
            case "placeholder":
                first, self._started = not self._started, True
                return _input if first else None
            case "get_attr":
                return _parameter
            case "call_module":
                found = MODULES.get(type(self._modules[target]))
            case "call_function" | "call_method":
                if not any(a in self.known for a in n.all_input_nodes):
                    return None  # arithmetic of sizes
                if target in SIZES and not (n.args[0] in self.known and target is SIZES[0]):
                    return None
                found = CALLS.get(target)
                if getattr(target, "__name__", "") == "stochastic_depth":
                    found = skipped
            case _:
                return None
        if found is None:
            raise NoMatch("none of the operations that kernels are made of")
        if self._writes_to_input(n):
            raise NoMatch("it changes the module's input in place")
        return found

    def _writes_to_input(self, n: fx.Node) -> bool:
        source = self.known.get(n.args[0]) if n.args else None
        if not isinstance(source, Value) or source.node != INPUT:
            return False
        if n.op == "call_module":
            return bool(getattr(self._modules[str(n.target)], "inplace", False))
        return n.target in IN_PLACE or bool(n.kwargs.get("inplace", False))

    def _title(self, n: fx.Node) -> str:
        if n.op == "call_module":
            name = str(n.target).removeprefix("m.")
            return f"{name} ({type(self._modules[str(n.target)]).__name__})"
        return str(getattr(n.target, "__name__", n.target)).removeprefix("m.")

    # -- for the handlers -----------------------------------------------------------------

    def module_of(self, n: fx.Node) -> Any:
        return self._modules[str(n.target)]

    def real(self, argument: Any) -> Any:
        """What the graph really computes for an argument."""
        return fx.node.map_arg(argument, lambda n: self.env[n])

    def whole(self, n: Any) -> Value:
        found = self.known.get(n)
        if not isinstance(found, Value):
            raise NoMatch(f"its operand {n} is not computed from the module's input alone")
        return found

    def value(self, n: Any) -> Value:
        found = self.whole(n)
        if found.part:
            raise NoMatch(f"it uses the {found.part} inside a normalisation")
        return found

    def parameter(self, n: Any) -> str | None:
        if n is None:
            return None
        found = self.known.get(n)
        if not isinstance(found, Ref):
            raise NoMatch("its weight is computed; kernels take parameters as they are")
        return found.path

    def emit(self, op: Op, *inputs: str, weight: str | None = None, bias: str | None = None,
             **fields: Any) -> str:
        """Add a node; its id. `weight` and `bias` are names of the module's parameters."""
        name = f"n{len(self.nodes)}"
        if "bias" in SPECS[op].allows:
            fields["bias"] = bias is not None
        self.nodes.append(Node(id=name, op=op, inputs=inputs, **fields))
        for leaf, path in (("weight", weight), ("bias", bias)):
            if path is not None:
                self.weights[f"{name}.{leaf}"] = path
        return name

    def width(self, n: int) -> Width:
        return width(n, self.channels)

    def channels_of(self, n: Any) -> int:
        """The channels of what a node of the graph computed."""
        return int(self.real(n).shape[self.whole(n).channel_axis])


def _input(reader: Reader, n: fx.Node, result: Any) -> Value:
    return Value(INPUT, reader.axes)


def _parameter(reader: Reader, n: fx.Node, result: Any) -> Ref:
    path = str(n.target)
    if path not in dict(reader.module.named_parameters(remove_duplicate=False)):
        raise NoMatch("a buffer or constant; kernels take parameters only")
    return Ref(path)
