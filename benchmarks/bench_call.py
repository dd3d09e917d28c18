"""What a call of a seed costs over the compiled code in it, by size, beside what others do.

All of them run the same artifact, forward only or with its graph, in one process and in random
alternation:

  direct     torch's runner called in a loop in C++: the limit
  raw        torch's runner called from Python, on inputs that are ready
  seed       our RunningSeed: mode, alpha, checks, kernel and node in one crossing
  kernel     our SeedKernel, which is given the parameters with every call
  slot       the operator that a compiled host calls
  custom_op  torch.library.custom_op in Python around the runner
  function   torch.autograd.Function in Python around the runner
  peft       LoRA of the peft package around a layer, beside the same arithmetic written out

peft's wrapper runs other arithmetic, so its row is the difference to that arithmetic by hand, at
the same sizes. It is left out, and said to be, where peft is not installed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper.karn.templates import templates_for
from esper.kasmina import native, plain_kernel
from esper.kasmina.artifact import read_artifact
from esper.kasmina.sites import Found
from esper.kasmina.slot import Slot
from esper.leyline.artifact import Pipeline
from esper.leyline.mode import FULL
from esper.leyline.reference import initial_parameters
from esper.leyline.signature import SiteKind, SiteSignature

CHANNELS, BATCHES, ROUNDS = 64, (1, 16, 128, 1024), 40
GRAFTING_ALPHA = 0.5
OURS = {"seed": "esper", "kernel": "esper, kernel with parameters", "slot": "esper, slot"}
PEERS = {"custom_op": "torch.library.custom_op", "function": "torch.autograd.Function"}
RUNNER = {"raw": "torch's runner", "direct": "direct from C++"}
PEFT = {"peft": "peft, over its arithmetic by hand"}
Call = Callable[[], Any]

_DIRECT = """
#include <chrono>
#include <torch/extension.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>

struct Direct {
  explicit Direct(const std::string& path) : runner(path) {}
  double seconds(std::vector<at::Tensor> inputs, int times) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < times; ++i) runner.run(inputs);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / times;
  }
  torch::inductor::AOTIModelContainerRunnerCpu runner;
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pybind11::class_<Direct>(m, "Direct").def(pybind11::init<std::string>())
      .def("seconds", &Direct::seconds, pybind11::call_guard<pybind11::gil_scoped_release>());
}
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One real kernel: its manifest, the paths of its halves, and parameters."""
    import hashlib

    from esper.tezzeret.compile import compile_artifact

    signature = SiteSignature(kind=SiteKind.FEATURES, channels=CHANNELS)
    ir = templates_for(signature)[0]
    folder = tmp_path_factory.mktemp("call")
    content = compile_artifact(ir, signature, pipeline=Pipeline.FAST)
    (folder / "kernel").write_bytes(content)
    artifact = read_artifact(folder / "kernel", hashlib.sha256(content).hexdigest())
    paths = [str(folder / name) for name in ("forward.so", "backward.so")]
    for path, half in zip(paths, artifact.code.values(), strict=True):
        Path(path).write_bytes(half)
    params = [nn.Parameter(p) for p in initial_parameters(ir, signature)]
    return artifact.manifest, paths, params


@contextmanager
def quiet() -> Iterator[None]:
    """One thread: at these sizes a second one only adds noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_alternation(calls: dict[str, Call], inner: int) -> dict[str, list[float]]:
    """Seconds per call of each, in a new random order every round; a first round is not kept."""
    order, names = random.Random(0), list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        order.shuffle(names)
        for name in names:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(inner):
                call()
            if number:
                samples[name].append((time.perf_counter() - start) / inner)
    return samples


def custom_op(forward: Any, backward: Any, manifest: Any) -> Callable[..., Tensor]:
    @torch.library.custom_op("esper_bench::seed", mutates_args=())
    def seed(h: Tensor, alpha: Tensor, params: list[Tensor]) -> list[Tensor]:
        return list(forward.run([h, alpha, *params]))

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        h, alpha, params = inputs
        pools = {"in": [h, alpha, *params], "out": output}
        ctx.save_for_backward(*(pools[s.partition(":")[0]][int(s.partition(":")[2])]
                                for s in manifest.backward_inputs if s != "grad"))

    def gradients(ctx: Any, grads: Any) -> Any:
        saved = iter(ctx.saved_tensors)
        outputs = backward.run([grads[0] if s == "grad" else next(saved)
                                for s in manifest.backward_inputs])
        h, *params = (outputs[i] for i in manifest.gradients)
        return h, None, params

    seed.register_autograd(gradients, setup_context=setup)
    return lambda h, alpha, params: seed(h, alpha, params)[0]


def row(batch: int, kind: str, name: str, seconds: list[float], raw: list[float]) -> dict[str, Any]:
    """Medians, and the tenth percentiles, which a busy machine moves less."""
    low, middle = quantiles(seconds)
    raw_low, raw_middle = quantiles(raw)
    return {"batch": batch, "kind": kind, "call": name, "seconds": seconds, "median_us": middle,
            "low_us": low, "over_median_us": middle - raw_middle, "over_low_us": low - raw_low}


def quantiles(seconds: list[float]) -> tuple[float, float]:
    low, middle = np.quantile(seconds, [0.1, 0.5])
    return 1e6 * float(low), 1e6 * float(middle)


def overhead(rows: list[dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    """For the page: what the calls in `names`, under these names, take over the runner alone."""
    return {
        f"call overhead, {kind}": by_batch(rows, kind, names, "over_median_us")
        for kind in ("forward", "forward with a graph")
    }


def by_batch(rows: list[dict[str, Any]], kind: str, names: dict[str, str],
             what: str) -> dict[str, Any]:
    return {
        "size_unit": f"batch, {CHANNELS} channels", "limits": ["direct from C++"],
        "lines": {shown: points for call, shown in names.items()
                  if (points := [[r["batch"], r[what] / 1e6] for r in rows
                                 if r["kind"] == kind and r["call"] == call])},
    }


def show(rows: list[dict[str, Any]], over: str) -> None:
    for r in rows:
        print(f"{r['kind']:22} {r['call']:10} batch {r['batch']:5}  median {r['median_us']:8.2f}, "
              f"low {r['low_us']:8.2f} us; over {over} {r['over_median_us']:+8.2f} "
              f"{r['over_low_us']:+8.2f} us")


@pytest.mark.slow
def test_call_overhead_by_size(benchmark: Any, code: Any) -> None:
    from torch.utils.cpp_extension import load_inline

    manifest, paths, params = code
    extension: Any = native.extension()
    assert extension is not None, "this benchmark is about the extension; build it first"
    sources, picks = list(manifest.backward_inputs), list(manifest.gradients)
    kernel = extension.SeedKernel(*paths, sources, picks)
    plain = plain_kernel.SeedKernel(*paths, sources, picks)
    runners = [torch._C._aoti.AOTIModelContainerRunnerCpu(p, 1) for p in paths]
    direct = load_inline("esper_direct", _DIRECT, verbose=False).Direct(paths[0])
    op = custom_op(*runners, manifest)
    running = extension.RunningSeed(kernel, params)
    running.set(GRAFTING_ALPHA, FULL)
    slot = Slot(Found("site", nn.Identity(), manifest.signature, 1))
    slot._native.set_seeds([running])
    alpha = torch.tensor(GRAFTING_ALPHA)

    def at(batch: int) -> list[dict[str, Any]]:
        inner = 100 if batch <= 16 else 20
        h = torch.randn(batch, CHANNELS, requires_grad=True)
        inputs = [h.detach(), alpha, *(p.detach() for p in params)]

        def calls(h: Tensor) -> dict[str, Call]:
            return {
                "seed": lambda: running(h),
                "kernel": lambda: kernel(h, params, GRAFTING_ALPHA, FULL),
                "slot": lambda: torch.ops.esper.slot(h, None, slot.number),
                "custom_op": lambda: op(h, alpha, params),
                "function": lambda: plain(h, params, GRAFTING_ALPHA, FULL),
            }

        with torch.no_grad():
            forward = in_alternation(
                {"raw": lambda: runners[0].run(inputs), **calls(inputs[0])}, inner)
            forward["direct"] = [direct.seconds(inputs, inner) for _ in range(ROUNDS)]
        graph = in_alternation(calls(h), inner)
        both = in_alternation({name: lambda call=call: call().sum().backward()  # type: ignore[misc]
                               for name, call in calls(h).items()}, inner)
        return [
            row(batch, kind, name, seconds, forward["raw"])
            for kind, found in (("forward", forward), ("forward with a graph", graph),
                                ("forward and backward", both))
            for name, seconds in found.items()
        ]

    with quiet():
        rows = [r for batch in BATCHES for r in at(batch)]
    slot.close()
    print()
    show(rows, "raw")
    whole = {f"call, {kind}": by_batch(rows, kind, OURS | PEERS | RUNNER, "median_us")
             for kind in ("forward", "forward with a graph", "forward and backward")}
    benchmark.extra_info.update(target="seed <= raw + 3 us", channels=CHANNELS, rows=rows,
                                series=whole | overhead(rows, OURS | PEERS))
    benchmark.pedantic(lambda: running(torch.randn(16, CHANNELS)), rounds=50, iterations=20)


@pytest.mark.slow
def test_peft_wrapper_by_size(benchmark: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; its row is left out")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        nn.Sequential(nn.Linear(CHANNELS, CHANNELS)),
        peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"], lora_dropout=0.0),
    )
    layer = wrapped.base_model.model[0]
    w, b = layer.base_layer.weight, layer.base_layer.bias
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def by_hand(x: Tensor) -> Tensor:
        f = nn.functional.linear
        return f(x, w, b) + f(f(x, down), up) * 1.0

    def at(batch: int) -> list[dict[str, Any]]:
        x = torch.randn(batch, CHANNELS)
        torch.testing.assert_close(layer(x), by_hand(x))
        found = []
        for kind, grad in (("forward", False), ("forward with a graph", True)):
            with torch.set_grad_enabled(grad):
                times = in_alternation({"peft": lambda: layer(x), "by hand": lambda: by_hand(x)},
                                       100 if batch <= 16 else 20)
            found.append(row(batch, kind, "peft", times["peft"], times["by hand"]))
        return found

    with quiet():
        rows = [r for batch in BATCHES for r in at(batch)]
    print()
    show(rows, "by hand")
    benchmark.extra_info.update(peft=peft.__version__, rows=rows,
                                unit="us over the same arithmetic by hand",
                                series=overhead(rows, PEFT))
    benchmark.pedantic(lambda: layer(torch.randn(16, CHANNELS)), rounds=50, iterations=20)
