"""Growth sites: where a model may grow, found by name, by pattern, or by looking.

A site is a module's output. Probing runs the model once, in eval mode under no_grad with
the random state kept, so it leaves nothing behind in the model.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.errors import SiteError
from esper.kasmina.rng import rng_state, set_rng_state
from esper.leyline.signature import DType, SiteKind, SiteSignature

MIN_CHANNELS = 4
_KINDS = {2: SiteKind.FEATURES, 3: SiteKind.TOKENS, 4: SiteKind.MAP}
# Layers whose 3-d output is [B, C, L], which is no kind of site.
_CHANNELS_FIRST_1D = (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d)


@dataclass(frozen=True)
class Found:
    """A site that exists: its module, what a kernel sees there, and positions per sample.

    `positions` is None where no example was given to see them with.
    """

    name: str
    module: nn.Module
    signature: SiteSignature
    positions: int | None


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


@dataclass
class _Seen:
    calls: int = 0
    shape: tuple[int, ...] = ()
    keeps_shape: bool = False
    dtype: torch.dtype | None = None
    device: str = ""
    is_result: bool = False
    tensor: Tensor | None = None


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that a seed would blend: the output itself, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no_grad inside; training flags and random states as before afterwards."""
    modes = {m: m.training for m in model.modules()}
    random_state = rng_state()
    with torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            set_rng_state(random_state)
            for module, mode in modes.items():
                module.training = mode


def _probe(model: nn.Module, example: Any) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {name: _Seen() for name, _ in model.named_modules()}
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record, tensor = seen[name], first_tensor(output)
            record.calls += 1
            if tensor is not None and tensor.is_floating_point():
                record.tensor, record.shape = tensor, tuple(tensor.shape)
                record.dtype, record.device = tensor.dtype, tensor.device.type
                given = first_tensor(args) if args else None
                record.keeps_shape = given is not None and given.shape == tensor.shape

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(name)))
    try:
        with undisturbed(model):
            args = example if isinstance(example, tuple) else (example,)
            result = first_tensor(model(*args))
    finally:
        for handle in handles:
            handle.remove()
    for record in seen.values():
        record.is_result = record.tensor is not None and record.tensor is result
        record.tensor = None
    return seen


def _signature(
    name: str, module: nn.Module, seen: _Seen, kind: SiteKind | None, causal: bool
) -> tuple[SiteSignature, int]:
    """Raises SiteError where the output has no layout a kernel could take."""
    if seen.calls == 0:
        raise SiteError(f"site {name!r}: the module is not called in the model's forward")
    if seen.calls > 1:
        raise SiteError(
            f"site {name!r}: called {seen.calls} times in one forward; name a module called once"
        )
    kind = kind or _KINDS.get(len(seen.shape))
    if kind is None or len(seen.shape) != {v: k for k, v in _KINDS.items()}[kind]:
        raise SiteError(
            f"site {name!r}: output of shape {list(seen.shape) or 'unknown'}; a site is a float "
            "tensor [B, C], [B, T, C] or [B, C, H, W]"
        )
    if kind is SiteKind.TOKENS and isinstance(module, _CHANNELS_FIRST_1D):
        raise SiteError(f"site {name!r}: {type(module).__name__} gives [B, C, L], not [B, T, C]")
    channels = seen.shape[1] if kind is SiteKind.MAP else seen.shape[-1]
    positions = 1
    for extent in seen.shape[1:]:
        positions *= extent
    try:
        signature = SiteSignature(
            kind=kind,
            channels=channels,
            dtype=DType(str(seen.dtype).removeprefix("torch.")),
            device=seen.device,
            causal=causal and kind is SiteKind.TOKENS,
        )
    except ValueError as e:
        raise SiteError(f"site {name!r}: {e}") from e
    return signature, positions // channels


def _declared(name: str, module: nn.Module, kind: SiteKind | None, causal: bool) -> Found:
    """A site from what its layer says of itself, for `wrap` without an example."""
    weight = next(iter(module.parameters(recurse=False)), None)
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
        model: any module; `example` is one input batch or a tuple of positional arguments.
        causal: the model is autoregressive, so token sites must not look ahead.
    """
    seen = _probe(model, example)
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
        else:
            fit.append(name)
            why = "could be named; better places were found"
        looked[name] = Suggestion(name, signature, False, why)

    counts = Counter(type(modules[n]) for n in fit if _is_block(modules[n]))
    blocks = [n for n in fit if _is_block(modules[n]) and counts[type(modules[n])] > 1]
    activations = [n for n in fit if type(modules[n]).__module__ == "torch.nn.modules.activation"
                   and not list(modules[n].parameters())]
    layers = [n for n in fit if not list(modules[n].children())
              and list(modules[n].parameters(recurse=False))]
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
        kept = " that keeps its input's shape" if seen[name].keeps_shape else ""
        looked[name] = Suggestion(name, looked[name].signature, True, why + kept)
    return sorted(looked.values(), key=lambda s: not s.suitable)


def _is_block(module: nn.Module) -> bool:
    plain = type(module) is nn.Sequential
    return bool(list(module.children())) and not plain


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

    Raises:
        SiteError: a name or pattern matches nothing (the nearest names are given), or a
            matched module cannot be a site; says why.
    """
    modules = dict(model.named_modules())
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
            names += [n for n in matched if n not in names]
    if example is None:
        return [_declared(name, modules[name], kind, causal) for name in names]
    seen = _probe(model, example)
    found = []
    for name in names:
        signature, positions = _signature(name, modules[name], seen[name], kind, causal)
        found.append(Found(name, modules[name], signature, positions))
    return found
