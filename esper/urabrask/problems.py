"""The inputs a kernel is proved on: shapes, layouts, magnitudes, and values made to hurt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from esper.leyline.blueprint import BlueprintIR
from esper.leyline.mode import FULL, GRAFTING, MODE_NAMES, TRAINING
from esper.leyline.shapes import Parameter, infer
from esper.leyline.signature import SiteKind, SiteSignature
from esper.urabrask.oracle import Problem, nearest_kink

LARGE_ELEMENTS = 1 << 16  # of h in the large case: big enough to split loops, still fast
MAX_DRAWS = 25


class Layout(StrEnum):
    CONTIGUOUS = "contiguous"
    TRANSPOSED = "transposed"  # the first two axes lie the other way round in memory
    STRIDED = "strided"  # every second element of a row, from an odd offset
    CHANNELS_LAST = "channels_last"  # maps only; convolution weights too, as .to() makes them
    EXPANDED = "expanded"  # the gradient of out is one number repeated, as sum() sends it


@dataclass(frozen=True)
class Case:
    """One kind of input. `magnitude` is the standard deviation of h."""

    batch: int
    space: int
    alpha: float = 1.0
    mode: int = FULL
    layout: Layout = Layout.CONTIGUOUS
    magnitude: float = 1.0

    @property
    def name(self) -> str:
        parts = [f"batch {self.batch}", f"space {self.space}", f"alpha {self.alpha:g}"]
        parts.append(MODE_NAMES[self.mode])
        if self.layout is not Layout.CONTIGUOUS:
            parts.append(self.layout)
        if self.magnitude != 1:
            parts.append(f"magnitude {self.magnitude:g}")
        return ", ".join(parts)


def magnitudes(signature: SiteSignature) -> tuple[float, float]:
    """Small and large. Products of activations must stay inside float16's narrow range."""
    return (1e-2, 8.0) if signature.dtype == "float16" else (1e-4, 32.0)


def numeric_cases(signature: SiteSignature) -> list[Case]:
    """What the oracle judges. The first has an odd batch and space and is a good warm-up."""
    spaces = {
        SiteKind.FEATURES: (8, 8, 8, 8),
        SiteKind.TOKENS: (5, 1, 13, 64),
        SiteKind.MAP: (5, 1, 7, 16),
    }[signature.kind]
    odd, one, prime, large = spaces
    positions = {SiteKind.FEATURES: 1, SiteKind.TOKENS: large, SiteKind.MAP: large**2}
    fitting = LARGE_ELEMENTS // (signature.channels * positions[signature.kind])
    most = max(4, min(512, fitting))
    small, big = magnitudes(signature)
    cases = [Case(3, odd)]
    cases += [Case(1, odd), Case(1, one), Case(7, prime), Case(31, odd), Case(2, 8), Case(8, 8)]
    cases += [Case(most, large), Case(most, large, 0.3, GRAFTING), Case(1, large)]
    cases += [Case(3, odd, a, m) for a in (0.0, 0.3, 1.0) for m in (GRAFTING, FULL)]
    cases += [Case(7, prime, 1.0, TRAINING), Case(1, odd, 1.0, TRAINING)]
    layouts = [Layout.TRANSPOSED, Layout.STRIDED, Layout.EXPANDED]
    if signature.kind is SiteKind.MAP:
        layouts.append(Layout.CHANNELS_LAST)
    cases += [Case(6, 8, 0.3, FULL, layout) for layout in layouts]
    cases += [Case(5, odd, 1.0, TRAINING, layout) for layout in layouts[:2]]
    cases += [Case(9, odd, 0.3, FULL, magnitude=m) for m in (small, big)]
    if signature.standalone:
        cases = [replace(case, alpha=1.0, mode=FULL) for case in cases]
    return list(dict.fromkeys(cases))


def typical(signature: SiteSignature, batch: int, space: int, alpha: float) -> Case:
    """A call in FULL, at `alpha` where the kernel has a blend."""
    return Case(batch, space, 1.0 if signature.standalone else alpha, FULL)


def _strided(x: Tensor) -> Tensor:
    wide = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] + 1))
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _lay_out(x: Tensor, layout: Layout) -> Tensor:
    match layout:
        case Layout.TRANSPOSED:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case Layout.STRIDED:
            return _strided(x)
        case Layout.CHANNELS_LAST if x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
    return x


def random_parameters(
    parameters: tuple[Parameter, ...], generator: torch.Generator, dtype: torch.dtype
) -> list[Tensor]:
    """As after some training, not as at birth: a zero would hide whatever comes before it."""
    made = []
    for p in parameters:
        value = torch.randn(p.shape, generator=generator)
        if len(p.shape) > 1:
            value *= torch.Size(p.shape[1:]).numel() ** -0.5
        elif p.name.endswith(".weight"):
            value = 1 + value / 4
        else:
            value /= 4
        made.append(value.to(dtype))
    return made


def draw(
    ir: BlueprintIR,
    signature: SiteSignature,
    case: Case,
    seed: int,
    params: tuple[Tensor, ...] | None = None,
) -> Problem:
    """The problem of `case` for one random seed, on the CPU's random stream.

    `params` are used where given, else drawn as well.

    In full precision, inputs that bring a relu within some rounding errors of its kink are
    drawn again (see `oracle.Kinks`); half precision cannot keep clear of it, nor can eager.
    """
    dtype = getattr(torch, signature.dtype)
    eps = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(seed)
    best: tuple[float, Problem] | None = None
    for _ in range(MAX_DRAWS):
        problem = _draw(ir, signature, case, generator, dtype)
        if params is not None:
            problem = replace(problem, params=params)
        kink = nearest_kink(ir, signature, problem) if eps < 1e-5 else float("inf")
        if best is None or kink > best[0]:
            best = kink, problem
        if kink > 16 * eps:
            break
    assert best is not None
    return best[1]


def _draw(
    ir: BlueprintIR,
    signature: SiteSignature,
    case: Case,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Problem:
    shape = signature.shape(case.batch, case.space)
    device = signature.device
    h = (torch.randn(shape, generator=generator) * case.magnitude).to(device, dtype)
    params = random_parameters(infer(ir, signature).parameters, generator, dtype)
    if case.layout is Layout.EXPANDED:
        grad_out = torch.randn((), generator=generator).to(device, dtype).expand(shape)
    else:
        grad_out = torch.randn(shape, generator=generator).to(device, dtype)
        grad_out = _lay_out(grad_out, case.layout)
    placed = [p.to(device) for p in params]
    if case.layout is Layout.CHANNELS_LAST:
        placed = [_lay_out(p, case.layout) for p in placed]
    return Problem(_lay_out(h, case.layout), tuple(placed), grad_out, case.alpha, case.mode)


def hostile(ir: BlueprintIR, signature: SiteSignature, mode: int, poison: float) -> Problem:
    """alpha 0, values of h that arithmetic would not give back, parameters all `poison`."""
    case = Case(3, 5, 0.0, mode)
    problem = draw(ir, signature, case, 0)
    info = torch.finfo(problem.h.dtype)
    h = problem.h.clone()
    flat = h.view(-1)
    bad = [-0.0, info.smallest_normal / 2, -info.max, float("inf"), float("nan")]
    # One site may have a single channel, then there is room for fewer of them.
    for i, value in enumerate(bad[: flat.numel()]):
        flat[i] = value
    params = tuple(torch.full_like(p, poison) for p in problem.params)
    return Problem(h, params, problem.grad_out, 0.0, mode)
