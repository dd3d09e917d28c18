"""Export: a grown model as plain torch, for machines that have never heard of esper.

The folder holds `grown.py` (generated source with one plain `nn.Module` class per seed and
a function `grow`), and `model.safetensors` (the grown state). On another machine:

    from grown import grow                      # the generated file, torch only
    model = grow(TheHost())                     # the host's own class, as before
    safetensors.torch.load_model(model, "model.safetensors")
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from esper.errors import SiteError
from esper.kasmina import output
from esper.kasmina.growth import Growth, growth_of
from esper.kasmina.seed import Seed
from esper.kasmina.slot import Slot
from esper.leyline.blueprint import INPUT, Node, Op
from esper.leyline.signature import SiteKind, SiteSignature

SOURCE, WEIGHTS = "grown.py", "model.safetensors"

_HEAD = f'''"""A model that grew, written out as plain torch. Generated; needs torch only."""

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


{inspect.getsource(output.parts_of)}

{inspect.getsource(output.first_tensor)}

{inspect.getsource(output.with_tensor)}

def _attach(model, site, block):
    """Send the output of `site` through `block`; its parameters live on the site itself."""
    module = model.get_submodule(site)
    for name, parameter in block.items():
        module.register_parameter(name, parameter)
    return module

'''


def _expression(node: Node, x: list[str], p: list[str], sig: SiteSignature) -> str:
    """One line of torch for one node, the same operations as `leyline.reference`."""
    bias = f", {p[1]}" if len(p) > 1 else ""
    on_map, k = sig.kind is SiteKind.MAP, node.kernel or 1
    match node.op:
        case Op.LINEAR:
            return f"F.{'conv2d' if on_map else 'linear'}({x[0]}, {p[0]}{bias})"
        case Op.CONV:
            return f"F.conv2d({x[0]}, {p[0]}{bias or ', None'}, padding={k // 2})"
        case Op.DEPTHWISE if on_map:
            return (f"F.conv2d({x[0]}, {p[0]}{bias or ', None'}, padding={k // 2}, "
                    f"groups={x[0]}.shape[1])")
        case Op.DEPTHWISE:
            pad = (k - 1, 0) if sig.causal else (k // 2, k // 2)
            return (f"F.conv1d(F.pad({x[0]}.transpose(1, 2), {pad}), {p[0]}{bias or ', None'}, "
                    f"groups={x[0]}.shape[2]).transpose(1, 2)")
        case Op.LAYER_NORM:
            inner = f"{x[0]}.movedim(1, -1)" if on_map else x[0]
            norm = f"F.layer_norm({inner}, ({p[0]}.shape[0],), {p[0]}, {p[1]}, {node.epsilon})"
            return f"{norm}.movedim(-1, 1)" if on_map else norm
        case Op.RMS_NORM:
            inner = f"{x[0]}.movedim(1, -1)" if on_map else x[0]
            scale = f"torch.rsqrt({inner}.square().mean(-1, keepdim=True) + {node.epsilon})"
            norm = f"({inner} * {scale} * {p[0]})"
            return f"{norm}.movedim(-1, 1)" if on_map else norm
        case Op.GROUP_NORM:
            return f"torch.group_norm({x[0]}, {node.groups}, {p[0]}, {p[1]}, {node.epsilon})"
        case Op.RELU | Op.GELU | Op.SILU:
            return f"F.{node.op}({x[0]})"
        case Op.TANH | Op.SIGMOID:
            return f"torch.{node.op}({x[0]})"
        case Op.ADD:
            return f"{x[0]} + {x[1]}"
        case Op.MUL:
            return f"{x[0]} * {x[1]}"
        case Op.SCALE:
            return f"{x[0]} * {p[0]}" + (".view(1, -1, 1, 1)" if on_map else "")
        case Op.MEAN_POOL:
            return f"{x[0]}.mean({'(2, 3)' if on_map else 1}, keepdim=True)"
        case Op.ATTENTION:
            split = f".unflatten(-1, ({node.heads}, -1)).transpose(1, 2)"
            q, k_, v = (f"{name}{split}" for name in x)
            return (f"F.scaled_dot_product_attention({q}, {k_}, {v}, is_causal={sig.causal})"
                    ".transpose(1, 2).flatten(2)")


def _seed_source(seed: Seed, index: int) -> list[str]:
    assert seed.kernel is not None
    ir, sig = seed.kernel.ir, seed.site.signature
    names = dict(zip((p.name for p in seed.kernel.manifest.parameters), seed.parameter_names,
                     strict=True))
    # As a literal: a blueprint's name is whatever its author wrote, and this text is executed.
    what = f"{ir.name or ir.id} at {seed.site.name}; kernel {seed.kernel_id}."
    lines = [f"def seed_{index}(module, h):", f"    {what!r}"]
    variable = {INPUT: "h"} | {n.id: f"v_{n.id}" for n in ir.nodes}
    for node in ir.nodes:
        params = [f"module.{names[n]}" for leaf in ("weight", "bias")
                  if (n := f"{node.id}.{leaf}") in names]
        line = _expression(node, [variable[i] for i in node.inputs], params, sig)
        lines.append(f"    {variable[node.id]} = {line}")
    out = variable[ir.output]
    blend = out if seed.alpha == 1 else f"h + {seed.alpha!r} * ({out} - h)"
    return [*lines, f"    return {blend}", "", ""]


def _kept(growth: Growth) -> list[Seed]:
    """The seeds that influence the output, in the order in which their hooks run."""
    kept = [s for s in growth.fossils() + growth.active()
            if s.kernel is not None and s.alpha > 0 and s.failure is None]
    return sorted(kept, key=lambda s: s.number)


def _source(kept: list[Seed]) -> str:
    body: list[str] = []
    grow = ["def grow(model):", '    """Give a fresh host the seeds it had grown; in place."""']
    for index, seed in enumerate(kept):
        body += _seed_source(seed, index)
        shapes = ", ".join(
            f'"{n}": nn.Parameter(torch.zeros({list(p.shape)}, dtype={p.dtype}))'
            for n, p in zip(seed.parameter_names, seed.params, strict=True)
        )
        # By name, not as a lambda: a model that is sent to other processes is pickled.
        body += [f"def hook_{index}(module, args, output):",
                 "    h = first_tensor(output)",
                 "    if h is None:", "        return output",
                 f"    return with_tensor(output, seed_{index}(module, h))", "", ""]
        grow += [f"    module = _attach(model, {seed.site.name!r}, {{{shapes}}})",
                 f"    module.register_forward_hook(hook_{index})"]
    return _HEAD + "\n" + "\n".join(body) + "\n".join([*grow, "    return model", ""])


def export(model: nn.Module, folder: str | Path | None = None) -> nn.Module:
    """A plain copy of a grown model: same outputs, no esper, ordinary torch operations.

    Seeds that do not influence the output (dormant, loading, TRAINING) are left out; one that
    is being blended in keeps its alpha of this moment. The wrapped model is not changed.

    Args:
        folder: where to write `grown.py` and `model.safetensors`; created where missing.

    Hooks of your own come along in the copy, in the order they had; not into the folder, where a
    fresh host gets its seeds after the hooks that it has.

    Raises:
        SiteError: the model is not wrapped, or cannot be copied.
    """
    growth = growth_of(model)
    kept = _kept(growth)
    source = _source(kept)
    plain = _bare_copy(growth)
    namespace = _run(source)
    namespace.grow(plain)
    _order_hooks(growth, plain, kept)
    state = {k: v for k, v in growth.model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(state)
    if folder is not None:
        from safetensors.torch import save_model

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / SOURCE).write_text(source)
        save_model(plain, str(path / WEIGHTS))
    return plain


def _bare_copy(growth: Growth) -> nn.Module:
    """A deep copy of the host without its seeds and slots. The host is not touched: seeds that
    were taken off and put back would run after hooks that were registered later."""
    try:
        plain = copy.deepcopy(growth.model)
    except Exception as e:
        raise SiteError(
            f"the model cannot be copied: {type(e).__name__}: {e}. copy.deepcopy(model) must work; "
            "a hook or an attribute that holds a lock, a file or a tensor of a graph prevents it"
        ) from e
    for name in growth.sites:
        hooks = plain.get_submodule(name)._forward_hooks
        for key, hook in list(hooks.items()):
            if isinstance(hook, Slot) or isinstance(getattr(hook, "__self__", None), Seed):
                del hooks[key]
    for seed in growth.active() + growth.fossils():
        if seed.kernel is not None:
            for name in seed.parameter_names:
                delattr(plain.get_submodule(seed.site.name), name)
    return plain


def _order_hooks(growth: Growth, plain: nn.Module, kept: list[Seed]) -> None:
    """Move the seeds' hooks, which `grow` registered last, to where they run in the host."""
    for name, site in growth.sites.items():
        seeds = [s for s in kept if s.site.name == name]
        hooks = plain.get_submodule(name)._forward_hooks
        added = list(hooks)[len(hooks) - len(seeds):]
        for key in site.found.module._forward_hooks:
            if key in hooks:
                hooks.move_to_end(key)  # type: ignore[attr-defined]
            for seed, new in zip(seeds, added, strict=True):
                if seed.hook_id == key:
                    hooks.move_to_end(new)  # type: ignore[attr-defined]


def _run(source: str) -> Any:
    spec = importlib.util.spec_from_loader("grown", loader=None)
    if spec is None:
        raise SiteError("the generated source could not be made a module")
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, SOURCE, "exec"), module.__dict__)
    return module
