"""One contract, two faces: the extension's SeedKernel and the one in Python."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.kasmina import native, plain_kernel
from esper.leyline.mode import FULL, GRAFTING, TRAINING
from tests.csrc.pair import BACKWARD_INPUTS, CHANNELS, GRADIENTS, Forward, compile_pair, parameters

ANY = pytest.mark.parametrize("mode", [TRAINING, GRAFTING, FULL])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def face(name: str) -> Any:
    if name == "python":
        return plain_kernel.SeedKernel
    extension = native.extension()
    if extension is None:
        pytest.skip("the extension is not built for this environment (see `esper doctor`)")
    return extension.SeedKernel


@pytest.fixture(params=["extension", "python"])
def kernel(request: pytest.FixtureRequest) -> Any:
    return face(request.param)(*compile_pair(), BACKWARD_INPUTS, GRADIENTS)


def reference(
    h: Tensor, params: list[Tensor], alpha: float, mode: int, grad: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in float64, from the meaning of each mode, by eager autograd."""
    h64 = h.detach().double().requires_grad_()
    p64 = [p.detach().double().requires_grad_() for p in params]
    seed = Forward()(h64 if mode == FULL else h64.detach(), torch.tensor(1.0).double(), *p64)[0]
    if mode == TRAINING:
        # Parameters learn from the seed's own output; the host sees the identity.
        out = h64
        gradients = [grad.double(), *torch.autograd.grad(seed, p64, grad.double())]
    else:
        out = h64 + alpha * (seed - h64)
        gradients = list(torch.autograd.grad(out, [h64, *p64], grad.double()))
    return out.detach(), gradients


@pytest.mark.slow
@ANY
@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_outputs_and_gradients(kernel: Any, mode: int, batch: int, alpha: float) -> None:
    h = torch.randn(batch, CHANNELS, requires_grad=True)
    params, grad = parameters(), torch.randn(batch, CHANNELS)
    out = kernel(h, params, alpha, mode)
    gradients = torch.autograd.grad(out, [h, *params], grad)
    expected, expected_gradients = reference(h, params, alpha, mode, grad)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_training_is_the_identity_to_the_host(kernel: Any) -> None:
    h = torch.randn(5, CHANNELS, requires_grad=True)
    grad = torch.randn(5, CHANNELS)
    grad[0, 0] = float("inf")
    out = kernel(h, parameters(), 0.5, TRAINING)
    assert out.data_ptr() == h.data_ptr() and out.grad_fn is not None
    assert torch.equal(torch.autograd.grad(out, h, grad)[0], grad)


@pytest.mark.slow
def test_parameters_learn_though_the_host_is_frozen(kernel: Any) -> None:
    params = parameters()
    kernel(torch.randn(5, CHANNELS), params, 0.5, TRAINING).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in params)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GRAFTING, FULL])
def test_alpha_zero_gives_the_very_tensor(kernel: Any, mode: int) -> None:
    h = torch.full((3, CHANNELS), float("nan"), requires_grad=True)
    assert kernel(h, parameters(), 0.0, mode) is h


@pytest.mark.slow
@ANY
def test_nothing_is_saved_where_no_gradient_can_be_asked_for(kernel: Any, mode: int) -> None:
    h, params = torch.randn(3, CHANNELS, requires_grad=True), parameters()
    with torch.no_grad():
        out = kernel(h, params, 0.5, mode)
    assert out.grad_fn is None
    assert (out is h) == (mode == TRAINING)
    frozen = [p.detach() for p in params]
    assert not kernel(h.detach(), frozen, 0.5, mode).requires_grad
    assert (kernel(h, frozen, 0.5, mode) is h) == (mode == TRAINING)


@pytest.mark.slow
@ANY
def test_frozen_parameters_get_no_gradient(kernel: Any, mode: int) -> None:
    h, params = torch.randn(3, CHANNELS, requires_grad=True), parameters()
    params[1].requires_grad_(False)
    kernel(h, params, 0.5, mode).sum().backward()
    assert params[1].grad is None and h.grad is not None
    assert params[0].grad is not None


@pytest.mark.slow
@ANY
def test_a_second_derivative_is_refused(kernel: Any, mode: int) -> None:
    h = torch.randn(3, CHANNELS, requires_grad=True)
    out = kernel(h, parameters(), 0.5, mode)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(out.square().sum(), h, create_graph=True)


@pytest.mark.slow
@ANY
def test_an_in_place_change_is_noticed(kernel: Any, mode: int) -> None:
    h, params = torch.randn(3, CHANNELS, requires_grad=True), parameters()
    out = kernel(h, params, 0.5, mode)
    with torch.no_grad():
        params[2].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.slow
@ANY
def test_strided_inputs(kernel: Any, mode: int) -> None:
    params, grad = parameters(), torch.randn(CHANNELS, 7).T
    h = torch.randn(CHANNELS, 7).T.requires_grad_()
    params[0] = params[0].detach().T.contiguous().T.requires_grad_()
    assert not (h.is_contiguous() or params[0].is_contiguous() or grad.is_contiguous())
    out = kernel(h, params, 0.4, mode)
    gradients = torch.autograd.grad(out, [h, *params], grad)
    expected, expected_gradients = reference(h, params, 0.4, mode, grad)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_each_graph_keeps_its_own_alpha(kernel: Any) -> None:
    h, params, grad = torch.randn(4, CHANNELS), parameters(), torch.randn(4, CHANNELS)
    outs = {alpha: kernel(h, params, alpha, FULL) for alpha in (0.2, 0.6, 1.0)}
    for alpha, out in outs.items():
        got = torch.autograd.grad(out, params, grad)
        for a, b in zip(got, reference(h, params, alpha, FULL, grad)[1][1:], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_the_first_call_may_be_under_inference_mode(kernel: Any) -> None:
    h, params = torch.randn(4, CHANNELS), parameters()
    with torch.inference_mode():
        kernel(h, params, 0.5, FULL)
        kernel(h, params, 1.0, FULL)
    for alpha in (0.5, 1.0):
        kernel(h, params, alpha, FULL).sum().backward()


@pytest.mark.slow
def test_autocast_around_does_not_reach_inside(kernel: Any) -> None:
    h, params = torch.randn(4, CHANNELS), parameters()
    plain = kernel(h, params, 0.5, FULL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel(h, params, 0.5, FULL), plain)


@pytest.mark.slow
def test_code_stays_mapped_until_the_last_backward(kernel: Any) -> None:
    h, params = torch.randn(4, CHANNELS, requires_grad=True), parameters()
    own = type(kernel)(*compile_pair(), BACKWARD_INPUTS, GRADIENTS)
    out = own(h, params, 0.5, FULL)
    del own
    gc.collect()
    out.sum().backward(retain_graph=True)
    once = params[0].grad.clone()
    out.sum().backward()
    torch.testing.assert_close(params[0].grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": 3}, "has 4 parameters, 3 were given"),
        ({"dtype": torch.float64}, "a parameter is"),
        ({"alpha": 1.5}, "within 0 and 1"),
        ({"alpha": float("nan")}, "within 0 and 1"),
        ({"mode": 3}, "mode is 3"),
    ],
)
def test_wrong_calls(kernel: Any, change: dict[str, Any], message: str) -> None:
    h = torch.randn(4, CHANNELS, dtype=change.get("dtype", torch.float32))
    params = parameters()[: change.get("params", 4)]
    with pytest.raises(ValueError, match=message):
        kernel(h, params, change.get("alpha", 0.5), change.get("mode", FULL))


@pytest.mark.slow
@ANY
@pytest.mark.parametrize("name", ["extension", "python"])
@pytest.mark.parametrize(
    ("given", "wrong"),
    [((3, 5, CHANNELS), None), ((3, CHANNELS - 1), None), ((3, CHANNELS), 1), ((3, CHANNELS), 2)],
)
def test_other_sizes_than_compiled_for_are_refused(
    name: str, mode: int, given: tuple[int, ...], wrong: int | None
) -> None:
    params = parameters()
    shapes = [[-1, CHANNELS], *(list(p.shape) for p in params)]
    kernel = face(name)(*compile_pair(), BACKWARD_INPUTS, GRADIENTS, "cpu", "float32", shapes)
    kernel(torch.randn(3, CHANNELS), params, 0.5, mode)
    if wrong is not None:
        params[wrong] = params[wrong].detach()[:-1].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"compiled for .*; choose a kernel for that site"):
        kernel(torch.randn(given), params, 0.5, mode)


@pytest.mark.slow
@ANY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_converted_as_a_whole_is_refused(
    kernel: Any, mode: int, dtype: torch.dtype
) -> None:
    h, params = torch.randn(4, CHANNELS, dtype=dtype), parameters(dtype)
    with pytest.raises(ValueError, match=r"compiled for .*; choose a kernel for that type"):
        kernel(h, params, 0.5, mode)


@pytest.mark.parametrize("name", ["extension", "python"])
def test_an_element_type_that_no_kernel_has(name: str) -> None:
    with pytest.raises(ValueError, match="dtype is int8"):
        face(name)("no.so", "no.so", ["grad"], [0], "cpu", "int8")


@pytest.mark.parametrize("name", ["extension", "python"])
@pytest.mark.parametrize(
    ("inputs", "gradients", "message"),
    [
        (["in:6"], GRADIENTS, "has 6 inputs"),
        (["in:-1"], GRADIENTS, "cannot read in:-1"),
        (["out:"], GRADIENTS, "cannot read out:"),
        (["h"], GRADIENTS, "cannot read h"),
        (["grad"], [], "gradients is empty"),
        (["grad"], [0, -2], "gradients holds -2"),
    ],
)
def test_wrong_conventions(
    name: str, inputs: list[str], gradients: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        face(name)("no.so", "no.so", inputs, gradients)


@pytest.mark.parametrize("name", ["extension", "python"])
def test_a_library_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no\.so"):
        face(name)(str(tmp_path / "no.so"), str(tmp_path / "no.so"), ["grad"], [0])


# -- finding the extension -----------------------------------------------------------------


def info(**changes: Any) -> native.BuildInfo:
    import sys

    raw: dict[str, Any] = {
        "torch": torch.__version__, "torch_cuda": None, "python": sys.implementation.cache_tag,
        "machine": "x86_64", "compiler": "g++", "isa": (), "cuda": None, "archs": (),
    }
    return native.BuildInfo(**{**raw, **changes})


def test_a_build_for_what_runs_is_taken() -> None:
    assert native.why_not(info(), torch.__version__) is None


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"torch": "2.0.1"}, f"torch {torch.__version__}"),
        ({"python": "cpython-39"}, "cpython-3"),
        ({"isa": ("avx9",)}, "a CPU without avx9"),
    ],
)
def test_another_build_is_refused(changes: dict[str, Any], found: str) -> None:
    problem = native.why_not(info(**changes), torch.__version__)
    assert problem is not None and f"found here: {found}" in problem


def test_a_mismatch_is_never_opened_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"opening this would fail with another message")
    paper = {**vars(info(torch="2.0.1")), "isa": [], "archs": []}
    library.with_suffix(".json").write_text(json.dumps(paper))
    monkeypatch.setattr(native, "library_path", lambda: library)
    monkeypatch.delenv(native.DISABLE, raising=False)
    native.extension.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"built for torch 2\.0\.1.*pip install"):
            assert native.extension() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert native.extension() is None
    finally:
        native.extension.cache_clear()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.DISABLE, "1")
    native.extension.cache_clear()
    try:
        assert native.extension() is None
    finally:
        native.extension.cache_clear()
