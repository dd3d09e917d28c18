"""Growth sites: where a model may grow, found by name, by pattern, or by looking.

A site is a module's output. A module that is called several times in a forward is one site: its
seeds run at each call, on the same parameters.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from esper.errors import SiteError
from esper.kasmina.probe import Record, is_leaf, probe
from esper.leyline.signature import DType, SiteKind, SiteSignature

MIN_CHANNELS = 4
_KINDS = {2: SiteKind.FEATURES, 3: SiteKind.TOKENS, 4: SiteKind.MAP}
_RANKS = {kind: rank for rank, kind in _KINDS.items()}


@dataclass(frozen=True)
class Found:
    """A site that exists: its module, what a kernel sees there, and positions per sample.

    `positions` has an entry for each call in one forward; it is None where no example was given
    to see them with.
    """

    name: str
    module: nn.Module
    signature: SiteSignature
    positions: tuple[int, ...] | None


@dataclass(frozen=True)
class Suggestion:
    """One module that was looked at, and why it would or would not make a good site."""

    name: str
    signature: SiteSignature | None
    suitable: bool
    reason: str

    def __str__(self) -> str:
        sign = self.signature if self.signature is not None else "-"
        return f"{'+' if self.suitable else '-'} {self.name}  {sign}  {self.reason}"


def _check_grows(name: str, module: nn.Module) -> None:
    """Raises SiteError for what gives a fitting tensor and is no place for a seed all the same."""
    if isinstance(module, torch.jit.ScriptModule):
        raise SiteError(
            f"site {name!r}: it is a TorchScript module, which takes no new parameters and calls "
            "no hooks of Python; wrap the model before torch.jit.script, or name a module around it"
        )
    if "parametrizations" in name.split("."):
        raise SiteError(
            f"site {name!r}: it computes a weight (torch.nn.utils.parametrize), not an "
            "activation; name the layer that uses the weight"
        )


def _signature(
    name: str, module: nn.Module, record: Record, kind: SiteKind | None, causal: bool
) -> tuple[SiteSignature, tuple[int, ...]]:
    """Raises SiteError where the output has no layout a kernel could take."""
    _check_grows(name, module)
    if record.calls == 0:
        raise SiteError(
            f"site {name!r}: the module is not called in the model's forward (it may be used "
            "by its weights alone); name the module around it"
        )
    if len(record.seen) < record.calls:
        raise SiteError(
            f"site {name!r}: output is no float tensor, nor does it hold one of two dimensions or "
            "more; a site is a float tensor [B, C], [B, T, C] or [B, C, H, W]"
        )
    first = record.seen[0]
    kind = kind or _KINDS.get(len(first.shape))
    for seen in record.seen:
        if kind is None or len(seen.shape) != _RANKS[kind]:
            raise SiteError(
                f"site {name!r}: output of shape {list(seen.shape)}; a site is a float "
                "tensor [B, C], [B, T, C] or [B, C, H, W]"
            )
        if seen.layout:
            raise SiteError(
                f"site {name!r}: {type(module).__name__} gives {seen.layout}, of shape "
                f"{list(seen.shape)}; kernels are made for [B, C], [B, T, C] and [B, C, H, W]: "
                "name a module around it whose output is one of these"
            )
    axis = 1 if kind is SiteKind.MAP else -1
    if len({(s.shape[axis], s.dtype, s.device) for s in record.seen}) > 1:
        raise SiteError(
            f"site {name!r}: called {record.calls} times in one forward, with outputs of "
            + ", ".join(f"{list(s.shape)} {s.dtype}" for s in record.seen)
            + "; a seed there needs one width and one type: name the modules around it"
        )
    channels = first.shape[axis]
    try:
        assert kind is not None
        signature = SiteSignature(
            kind=kind,
            channels=channels,
            dtype=DType(str(first.dtype).removeprefix("torch.")),
            device=first.device,
            causal=causal and kind is SiteKind.TOKENS,
        )
    except ValueError as e:
        raise SiteError(f"site {name!r}: {e}") from e
    return signature, tuple(prod(s.shape[1:]) // channels for s in record.seen)


def _declared(name: str, module: nn.Module, kind: SiteKind | None, causal: bool) -> Found:
    """A site from what its layer says of itself, for `wrap` without an example."""
    _check_grows(name, module)
    weight: Any = getattr(module, "weight", None)  # a parametrized one is no parameter
    channels: int | None = None
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
        kind = kind or SiteKind.MAP
        channels = module.out_channels if isinstance(module, nn.Conv2d) else weight_size(weight)
    elif isinstance(module, nn.Linear):
        channels = module.out_features
    elif isinstance(module, nn.LayerNorm):
        channels = module.normalized_shape[-1]
    if channels is None or kind is None or weight is None:
        raise SiteError(
            f"site {name!r}: {type(module).__name__} does not say whether its output is [B, C], "
            "[B, T, C] or [B, C, H, W] and how wide; give wrap an example= batch, or kind="
        )
    signature = SiteSignature(
        kind=kind, channels=channels, dtype=DType(str(weight.dtype).removeprefix("torch.")),
        device=weight.device.type, causal=causal and kind is SiteKind.TOKENS,
    )
    return Found(name, module, signature, None)


def weight_size(weight: Tensor | None) -> int | None:
    return None if weight is None else weight.shape[0]


def suggest_sites(model: nn.Module, example: Any, *, causal: bool = False) -> list[Suggestion]:
    """Look at every module of `model` and say which would make good growth sites, and why.

    Repeated blocks come first (a class that occurs at least twice and has children: residual
    stages, transformer layers); where there are none, activations; else any hidden layer.

    Args:
        model: any module.
        example: one input batch, a tuple of positional arguments, or a mapping of named ones.
        causal: the model is autoregressive, so token sites must not look ahead.
    """
    seen = probe(model, example)
    modules = dict(model.named_modules())
    looked: dict[str, Suggestion] = {}
    fit: list[str] = []
    for name, module in modules.items():
        if not name or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        record = seen[name]
        try:
            signature, _ = _signature(name, module, record, None, causal)
        except SiteError as e:
            looked[name] = Suggestion(name, None, False, str(e).partition(": ")[2])
            continue
        if record.is_result:
            why = "it is the model's result; growing it would change what is predicted directly"
        elif signature.channels < MIN_CHANNELS:
            why = f"{signature.channels} channels are too few, at least {MIN_CHANNELS} are needed"
        elif record.calls > 1 and next(module.parameters(), None) is None:
            why = (f"called {record.calls} times, at places that share no weight; a seed would run "
                   "at each: name it where that is meant")
        else:
            fit.append(name)
            why = "could be named; better places were found"
        looked[name] = Suggestion(name, signature, False, why)

    kinds = {n: type_before_parametrizations(modules[n]) for n in fit if _is_block(modules[n])}
    counts = Counter(kinds.values())
    blocks = [n for n, kind in kinds.items() if counts[kind] > 1]
    activations = [n for n in fit if type(modules[n]).__module__ == "torch.nn.modules.activation"
                   and not list(modules[n].parameters())]
    layers = [n for n in fit if is_leaf(modules[n]) and list(modules[n].parameters())]
    chosen, why = next(
        ((names, why) for names, why in ((blocks, "a repeated block"),
                                         (activations, "a hidden activation"),
                                         (layers, "a hidden layer")) if names),
        ([], ""),
    )
    for name in chosen:
        if any(name.startswith(f"{other}.") for other in chosen):
            looked[name] = Suggestion(name, looked[name].signature, False, "inside another site")
            continue
        kept = " that keeps its input's shape" if seen[name].seen[0].keeps_shape else ""
        calls = f", called {seen[name].calls} times" if seen[name].calls > 1 else ""
        looked[name] = Suggestion(name, looked[name].signature, True, why + kept + calls)
    return sorted(looked.values(), key=lambda s: not s.suitable)


def _is_block(module: nn.Module) -> bool:
    return not is_leaf(module) and type(module) is not nn.Sequential


def _matches(name: str, pattern: str) -> bool:
    """Shell patterns part by part: a star does not cross a dot."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def find_sites(
    model: nn.Module,
    sites: Sequence[str] | str,
    example: Any,
    *,
    kind: SiteKind | None = None,
    causal: bool = False,
) -> list[Found]:
    """The sites that `sites` names: module names, shell patterns, or "auto".

    A module that has several names is one site, under the first of them.

    Raises:
        SiteError: a name or pattern matches nothing (the nearest names are given), or a
            matched module cannot be a site; says why.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    first: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first.setdefault(module, name)
    if sites == "auto":
        if example is None:
            raise SiteError("finding sites needs example=, one input batch to see shapes with")
        names = [s.name for s in suggest_sites(model, example, causal=causal) if s.suitable]
        if not names:
            raise SiteError("no suitable site was found; name modules with sites=[...]; "
                            "esper.suggest_sites(model, example) explains each")
    else:
        wanted = [sites] if isinstance(sites, str) else list(sites)
        names = []
        for pattern in wanted:
            matched = [n for n in modules if n and _matches(n, pattern)]
            if not matched:
                from difflib import get_close_matches

                near = get_close_matches(pattern, list(modules), n=3, cutoff=0.3)
                raise SiteError(
                    f"site {pattern!r} matches no module; nearest names: {', '.join(near) or '-'}"
                )
            for name in (first[modules[n]] for n in matched):
                if name not in names:
                    names.append(name)
    if example is None:
        return [_declared(name, modules[name], kind, causal) for name in names]
    seen = probe(model, example)
    found = []
    for name in names:
        signature, positions = _signature(name, modules[name], seen[name], kind, causal)
        found.append(Found(name, modules[name], signature, positions))
    return found
