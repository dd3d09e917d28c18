"""Dishonest kernels, each refused for the right reason; honest ones accepted."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.kasmina.artifact import Kernel
from esper.leyline.blueprint import BlueprintIR, C, Init, Node, Op, Width
from esper.leyline.mode import FULL, GRAFTING, TRAINING
from esper.leyline.reference import apply
from esper.leyline.signature import SiteKind, SiteSignature
from esper.urabrask.conduct import same_bits
from esper.urabrask.oracle import reference_kernel, run
from esper.urabrask.problems import Case, draw, numeric_cases
from esper.urabrask.proof import Proof, prove


def _n(node_id: str, op: Op, *inputs: str, **fields: Any) -> Node:
    return Node(id=node_id, op=op, inputs=inputs, **fields)


FEATURES = BlueprintIR(
    kind=SiteKind.FEATURES,
    nodes=(
        _n("norm", Op.LAYER_NORM, "h"),
        _n("up", Op.LINEAR, "norm", out=Width(times=2)),
        _n("act", Op.RELU, "up"),
        _n("down", Op.LINEAR, "act", out=C, init=Init.ZERO),
        _n("out", Op.ADD, "down", "h"),
    ),
    output="out",
)
TOKENS = BlueprintIR(
    kind=SiteKind.TOKENS,
    nodes=(
        _n("norm", Op.RMS_NORM, "h"),
        _n("q", Op.LINEAR, "norm", out=C),
        _n("k", Op.LINEAR, "norm", out=C),
        _n("v", Op.LINEAR, "norm", out=C),
        _n("mix", Op.ATTENTION, "q", "k", "v", heads=2),
        _n("proj", Op.LINEAR, "mix", out=C, init=Init.ZERO),
        _n("out", Op.ADD, "proj", "h"),
    ),
    output="out",
)
MAP = BlueprintIR(
    kind=SiteKind.MAP,
    nodes=(
        _n("conv", Op.CONV, "h", out=C, kernel=3),
        _n("norm", Op.GROUP_NORM, "conv", groups=4),
        _n("act", Op.SILU, "norm"),
        _n("down", Op.LINEAR, "act", out=C, init=Init.ZERO),
        _n("out", Op.ADD, "down", "h"),
    ),
    output="out",
)
SITE = SiteSignature(kind=SiteKind.FEATURES, channels=16)
HONEST = reference_kernel(FEATURES, SITE)


def _prove(kernel: Kernel, folder: Path | None = None) -> Proof:
    return prove(kernel, FEATURES, SITE, folder=folder)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("ir", "causal"), [(FEATURES, False), (TOKENS, False), (TOKENS, True), (MAP, False)]
)
def test_an_honest_kernel_is_accepted(ir: BlueprintIR, causal: bool, dtype: str) -> None:
    site = SiteSignature.model_validate(
        {"kind": ir.kind, "channels": 16, "dtype": dtype, "causal": causal}
    )
    proof = prove(reference_kernel(ir, site), ir, site)
    assert proof.accepted, proof.reason
    assert len(proof.cases) > 30
    stressed = [c.worst_ratio for c in proof.cases if "magnitude" in c.name]
    assert stressed and max(stressed) <= 2


def test_an_honest_kernel_that_computes_otherwise_is_accepted() -> None:
    """Another order of summation and another formula for the same function."""

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        gain, shift, up, up_bias, down, down_bias = params
        if mode == TRAINING or alpha == 0:
            return HONEST(h, params, alpha, mode)
        x = h if mode == FULL else h.detach()
        centred = x - x.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * gain + shift
        # The wide products in two halves, summed last half first.
        hidden = (normed[:, 8:] @ up[:, 8:].T + normed[:, :8] @ up[:, :8].T + up_bias).relu()
        s = hidden[:, 16:] @ down[:, 16:].T + hidden[:, :16] @ down[:, :16].T + down_bias + x
        return s.clone() if alpha == 1 else h.lerp(s, alpha)

    proof = _prove(kernel)
    assert proof.accepted, proof.reason


class _Tampered(torch.autograd.Function):
    """Passes x on and changes its gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _wrong_gradient(index: int, factor: float) -> Kernel:
    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        params = list(params)
        params[index] = _Tampered.apply(params[index], factor)
        return HONEST(h, params, alpha, mode)

    return kernel


def _returns_its_last_result() -> Kernel:
    kept: list[Tensor] = []

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        out = HONEST(h, params, alpha, mode)
        if mode == FULL and 0 < alpha < 1:
            for old in kept:
                if old.shape == out.shape:
                    return old + 0 * out
            kept.append(out.detach())
        return out

    return kernel


def _reuses_its_buffer() -> Kernel:
    buffers: dict[torch.Size, Tensor] = {}

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        out = HONEST(h, params, alpha, mode)
        if mode != FULL:
            return out
        buffer = buffers.setdefault(out.shape, torch.empty_like(out))
        buffer.data.copy_(out.detach())
        handed: Tensor = _InPlaceOf.apply(out, buffer)
        return handed

    return kernel


class _InPlaceOf(torch.autograd.Function):
    """Hands out `buffer` in the place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor) -> Tensor:
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _mutates_its_input(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    out = HONEST(h, params, alpha, mode)
    if mode == FULL:
        h.data.mul_(1.5)
    return out


def _mutates_a_parameter(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    out = HONEST(h, params, alpha, mode)
    params[2].data[0, 0] += 1e-3
    return out


def _skips_the_backward(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    return HONEST(h, [_Tampered.apply(p, 0.0) for p in params], alpha, mode)


def _has_no_graph(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    return HONEST(h, params, alpha, mode).detach()


def _wrong_at_odd_sizes(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    out = HONEST(h, params, alpha, mode)
    if mode == FULL and alpha == 1 and h.shape[0] % 2 and h.shape[0] > 3:
        scale = torch.ones_like(out)
        scale[-1] = 1.001  # the remainder of a vectorised loop
        out = out * scale
    return out


def _wrong_where_strided(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    if mode == FULL and not h.is_contiguous():
        h = torch.as_strided(h, h.shape, (h.shape[1], 1), 0)
    return HONEST(h, params, alpha, mode)


def _leaks_nan_at_alpha_0(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    if mode == TRAINING:
        return HONEST(h, params, alpha, mode)
    s = apply(FEATURES, SITE, h if mode == FULL else h.detach(), params)
    return h + alpha * (s - h)


def _leaks_into_the_host(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    return HONEST(h, params, alpha, FULL if mode == GRAFTING else mode)


def _copies_in_training(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    out = HONEST(h, params, alpha, mode)
    return out.clone() if mode == TRAINING else out


def _ignores_alpha(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    return HONEST(h, params, 1.0 if 0 < alpha < 1 else alpha, mode)


def _overflows(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    out = HONEST(h, params, alpha, mode)
    return out * float("inf") if mode == FULL and float(h.detach().abs().max()) > 60 else out


def _raises(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    raise RuntimeError("sizes of tensors must match")


def _wrong_type(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
    out = HONEST(h, params, alpha, mode)
    return out.double() if mode == FULL and h.shape[0] == 7 else out


def _spins_a_thread() -> tuple[Kernel, Callable[[], None]]:
    over = threading.Event()

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        if threading.active_count() < 2 + before:
            threading.Thread(target=over.wait, name="stowaway", daemon=True).start()
        return HONEST(h, params, alpha, mode)

    before = threading.active_count()
    return kernel, over.set


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (_returns_its_last_result(), "no output reused"),
        (_reuses_its_buffer(), "an output is reused: the first call's result changed"),
        (_mutates_its_input, "inputs untouched: .*writes to its input: h changed"),
        (_mutates_a_parameter, "inputs untouched: .*parameter 2 changed"),
        (_skips_the_backward, "gradient of norm.weight"),
        (_has_no_graph, "does not require grad"),
        (_wrong_at_odd_sizes, r"batch 7, .*output: error"),
        (_wrong_where_strided, r"(transposed|strided): "),
        (_leaks_nan_at_alpha_0, "identity at alpha 0.* not h bit for bit.* nan instead of"),
        (_leaks_into_the_host, "GRAFTING.*gradient of h"),
        (_copies_in_training, "a copy of h, not h itself"),
        (_ignores_alpha, "alpha 0.3.*output: error"),
        (_overflows, "magnitude 32: output: error inf"),
        (_raises, "RuntimeError: sizes of tensors must match"),
        (_wrong_type, r"batch 7, .*must be alike"),
        (_wrong_gradient(0, 1.01), "gradient of norm.weight: error"),
        (_wrong_gradient(2, 1.01), "gradient of up.weight: error"),
        (_wrong_gradient(5, 1.01), "gradient of down.bias: error"),
        (_wrong_gradient(2, 1 + 1e-5), "gradient of up.weight: error"),
    ],
)
def test_a_dishonest_kernel_is_refused(kernel: Kernel, says: str) -> None:
    proof = _prove(kernel)
    assert not proof.accepted
    assert re.search(says, proof.reason), proof.reason
    assert not proof.cases[-1].passed and all(c.passed for c in proof.cases[:-1])


def test_a_thread_left_behind_is_refused() -> None:
    kernel, end = _spins_a_thread()
    try:
        assert "leaves a thread behind: ['stowaway" in _prove(kernel).reason
    finally:
        end()


def test_open_files_files_and_processes_left_behind_are_refused(tmp_path: Path) -> None:
    opened: list[int] = []

    def keeps_open(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        if not opened:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        return HONEST(h, params, alpha, mode)

    def writes(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        (tmp_path / "litter").write_text("x")
        return HONEST(h, params, alpha, mode)

    assert "leaves files open: ['/dev/null']" in _prove(keeps_open).reason
    os.close(opened[0])
    assert "litter" in _prove(writes, tmp_path).reason

    children: list[int] = []

    def forks(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        if not children:
            children.append(os.posix_spawn("/bin/sleep", ["sleep", "60"], {}))
        return HONEST(h, params, alpha, mode)

    try:
        assert "leaves a process behind" in _prove(forks).reason
    finally:
        os.kill(children[0], 9)
        os.waitpid(children[0], 0)


def test_state_between_forward_and_backward_is_refused() -> None:
    """Saved tensors in one place per kernel: right until two forwards come before a backward."""
    saved: list[Tensor] = []

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            saved[:] = [x, w]
            return x * w

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            x, w = saved
            return grads[0] * w, (grads[0] * x).sum(0)

    ir = BlueprintIR(
        kind=SiteKind.FEATURES, nodes=(_n("s", Op.SCALE, "h"),), output="s"
    )
    honest = reference_kernel(ir, SITE)

    def kernel(h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
        if mode != FULL or alpha in (0, 1):
            return honest(h, params, alpha, mode)
        s: Tensor = Careless.apply(h, params[0])
        return h + alpha * (s - h)

    assert prove(honest, ir, SITE).accepted
    assert "keeps state between calls" in prove(kernel, ir, SITE).reason


def test_the_cases_cover_what_the_contract_names() -> None:
    for kind in SiteKind:
        cases = numeric_cases(SiteSignature(kind=kind, channels=16))
        batches = {c.batch for c in cases}
        assert {1, 3, 7} <= batches and max(batches) >= 16
        assert {0.0, 0.3, 1.0} <= {c.alpha for c in cases}
        assert {TRAINING, GRAFTING, FULL} == {c.mode for c in cases}
        assert len({c.layout for c in cases}) >= 4
        assert len({c.magnitude for c in cases}) == 3


def test_relu_inputs_keep_clear_of_the_kink() -> None:
    from esper.urabrask.oracle import nearest_kink

    for seed in range(5):
        problem = draw(FEATURES, SITE, Case(31, 8), seed)
        assert nearest_kink(FEATURES, SITE, problem) > 1e-6


def test_same_bits_tells_zeros_and_nans_apart() -> None:
    zero, nan = torch.tensor([0.0]), torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())


def test_the_reference_isolates_the_host_in_training() -> None:
    problem = draw(FEATURES, SITE, Case(5, 8, 1.0, TRAINING), 0)
    out, g_h, *g_params = run(HONEST, problem)
    assert out.data_ptr() == problem.h.data_ptr()
    assert same_bits(g_h, problem.grad_out)
    full = run(HONEST, draw(FEATURES, SITE, Case(5, 8, 1.0, FULL), 0))
    for found, expected in zip(g_params, full[2:], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_proof_takes_seconds_not_minutes() -> None:
    start = time.perf_counter()
    _prove(HONEST)
    assert time.perf_counter() - start < 60  # a bound against blunders, not a benchmark
