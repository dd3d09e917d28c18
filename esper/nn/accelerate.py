"""`accelerate(model, example)`: kernels in the place of modules, wherever they are faster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.probe import undisturbed
from esper.leyline.artifact import Pipeline
from esper.leyline.library import Library
from esper.nn.device import device_kernel
from esper.nn.fast import Fast, fast_of, plain_forward, undo
from esper.nn.provide import Provider
from esper.nn.report import Report, Row
from esper.nn.trace import match
from esper.nn.values import NoMatch
from esper.urabrask.bench import Comparison, compare
from esper.urza.library import LocalLibrary

BENCH_SECONDS = 1.0


@dataclass
class _Seen:
    """How a module was called while the model ran on the example."""

    calls: int = 0
    example: Tensor | None = None
    reason: str = ""


def accelerate(
    model: nn.Module,
    example: Any,
    *,
    library: str | Path | Library = "library",
    pipeline: Pipeline | str = Pipeline.STANDARD,
) -> Report:
    """Put proven kernels in the place of those modules of `model` that they compute faster.

    A module matches by what it computes, whoever wrote it; outermost matches win. A kernel
    comes from the library, or is compiled and proved there first, which takes 10 to 60 seconds
    for each new kind of module, in child processes; progress goes to standard error. It is
    kept only where it is measured to be no slower than the module here, at the example's shape,
    with the threads that torch has now. The table that is returned is printed as well.

    Only the `forward` of instances is replaced: parameters, state_dict, hooks and copies stay
    as they are, and a call that does not fit the kernel runs the plain forward (`esper.nn.path`
    tells). `undo` on the report, or `esper.nn.undo(model)`, gives the plain model back. Called
    again it leaves accelerated modules as they are.

    Args:
        model: any module, itself included; on the CPU, or on a CUDA device, where kernels
            exist for the gated MLP and the low-rank block.
        example: an input of the model, a tuple of its arguments, or a mapping of keywords.
        library: the library's folder (made where missing) or the library itself.
        pipeline: how much time the compiler may take; AGGRESSIVE tries several variants.

    Raises:
        CompileError: there is no working C++ compiler, and a kernel had to be compiled.
        LibraryError: the library cannot be used.
    """
    seen = _watch(model, example)
    shelf = LocalLibrary(library) if isinstance(library, str | Path) else library
    rows: list[Row] = []
    measured: dict[tuple[Any, ...], Comparison] = {}
    with Provider(shelf, Pipeline(pipeline), _say) as provider:
        def replace(name: str, module: nn.Module) -> Row:
            return _replace(name, module, seen[module], provider, measured)

        rows.extend(_walk(model, "", replace, set()))
    report = Report(tuple(rows), lambda: undo(model))
    print(report)
    return report


def _say(what: str) -> None:
    print(f"esper: {what}", file=sys.stderr, flush=True)


def _watch(model: nn.Module, example: Any) -> dict[nn.Module, _Seen]:
    """Run the model once and note what every module was given."""
    seen = {module: _Seen() for module in model.modules()}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record = seen[module]
        record.calls += 1
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            if record.example is None:
                record.example = args[0].detach()
        else:
            record.reason = "it is called with more than one tensor; a kernel has one input"

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in seen]
    try:
        with undisturbed(model):
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _walk(module: nn.Module, name: str, replace: Callable[[str, nn.Module], Row],
          done: set[nn.Module]) -> Iterator[Row]:
    """Outermost first; below a module that was replaced there is nothing to do."""
    if module in done:  # one module in two places is still one
        return
    done.add(module)
    children = list(module.named_children())
    if not children and type(module).__module__.startswith("torch.nn."):
        return  # torch's own layers are one operation each
    containers = (nn.ModuleList, nn.ModuleDict)
    if not isinstance(module, containers):
        row = replace(name, module)
        yield row
        if row.replaced:
            return
    for leaf, child in children:
        yield from _walk(child, f"{name}.{leaf}" if name else leaf, replace, done)


def _replace(name: str, module: nn.Module, seen: _Seen, provider: Provider,
             measured: dict[tuple[Any, ...], Comparison]) -> Row:
    kind = type(module).__name__
    already = fast_of(module)
    if already is not None:
        return Row(name, kind, True, f"already: {already.name}")
    try:
        if seen.reason or seen.example is None:
            raise NoMatch(seen.reason or "the example does not reach it")
        if any(fast_of(m) for m in module.modules()):
            raise NoMatch("modules inside it are accelerated already")
        x = seen.example
        fast = prepare(name or kind, module, x, provider)
        key = (type(module), fast.name, tuple(x.shape), x.dtype, bool(fast.only_eval),
               *((p.shape, p.dtype, p.requires_grad) for p in module.parameters()))
        if key not in measured:
            measured[key] = _measure(module, fast, x)
        found = measured[key]
    except NoMatch as e:
        return Row(name, kind, False, str(e))
    speedup = (found.ratio, found.low, found.high)
    if found.ratio < 1.0:
        return Row(name, kind, False, f"slower than the plain module at {list(x.shape)}", speedup)
    module.__dict__["forward"] = fast
    limits = f"; in eval mode only: {fast.only_eval}" if fast.only_eval else ""
    return Row(name, kind, True, f"{fast.name}{limits}", speedup)


def prepare(name: str, module: nn.Module, example: Tensor, provider: Provider) -> Fast:
    """The fast forward of `module` for inputs like `example`; nothing is replaced yet.

    Raises:
        NoMatch: it is not a blueprint, or there is no proven kernel and none could be made.
    """
    what = match(module, example)
    if what.only_eval and module.training:
        raise NoMatch(f"it is training, and {what.only_eval}; for inference, accelerate the model "
                      "in eval mode")
    if example.device.type == "cpu":
        record, kernel = provider.kernel(what, name)
        title = f"kernel {record.kernel_id}"
    else:
        kernel, title = device_kernel(what)
    return Fast(
        module, kernel, what.signature, [(w.path, w.shape) for w in what.weights],
        rank=example.dim(), flat=what.flat, only_eval=what.only_eval, name=title,
    )


def _measure(module: nn.Module, fast: Fast, x: Tensor) -> Comparison:
    """The module's plain forward beside the fast one, as the model would call them.

    Forward and backward, or the forward alone where nothing learns; on random numbers.
    """
    with torch.random.fork_rng(devices=[]):
        given, grad = torch.randn_like(x).contiguous(), torch.randn_like(x)
    learned = [p for p in module.parameters() if p.requires_grad]
    plain = plain_forward(module)
    learns = bool(learned) and not fast.only_eval
    leaves = [given.requires_grad_(learns), *learned]

    def step(forward: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(learns):
                out = forward(given)
            if learns:
                torch.autograd.grad(out, leaves, grad, allow_unused=True)
            if given.is_cuda:
                torch.cuda.synchronize()

        return run

    if why := fast.why_plain(given):
        raise NoMatch(f"its kernel would not run: {why}")
    return compare(step(fast), step(plain), budget_seconds=BENCH_SECONDS)
