"""From a blueprint to a fossil through real compiled code, with no compiler in the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import validated_library
from esper.leyline.signature import SiteKind, SiteSignature

TRAINER = """
import json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
import torch._inductor.compile_fx, torch._inductor.cpp_builder, torch._dynamo.convert_frame

def no_compiler(*args, **kwargs):
    raise AssertionError("something was compiled in the training process")

torch._inductor.compile_fx.compile_fx = no_compiler
torch._inductor.compile_fx.compile_fx_inner = no_compiler
torch._inductor.aot_compile = no_compiler
torch._inductor.cpp_builder.CppBuilder.build = no_compiler
torch._dynamo.convert_frame.convert_frame = no_compiler

import esper
from esper.leyline.command import FieldReport, Transition
from esper.tamiyo.care import Care
from esper.tamiyo.triggers import Schedule
from esper.urza.library import LocalLibrary

torch.manual_seed(0)
x = torch.randn(512, 16)
y = (x[:, :4].square().sum(1) > x[:, 4:8].square().sum(1)).long()
model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
esper.wrap(model, sites=["1"], example=x[:2])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
records = []
loss_fn = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
library = LocalLibrary(Path(sys.argv[1]))
policy = esper.HeuristicPolicy(Schedule(start=1, every=1), max_growths=1,
                               care=Care(min_gain=-1e6))  # about the way, not about the gain
session = esper.Session(model, optimizer, loss_fn=loss_fn, holdout=[(x[384:], y[384:])],
                        library=library, policy=policy, observers=[records.append])
session.growth.graft_steps = 48
session._watch.refresh()  # do not race the polling thread
batches = [(x[i:i + 8], y[i:i + 8]) for i in range(0, 384, 8)]
trainer = esper.Trainer(model, optimizer, loss_fn, batches, session)
trainer.fit(20)
session.close()
exported = esper.export(model)
model.eval(), exported.eval()
print(json.dumps({
    "states": [t.after for t in records if isinstance(t, Transition)],
    "outcome": [r.outcome for r in records if isinstance(r, FieldReport)],
    "gain": [r.gain for r in records if isinstance(r, FieldReport)],
    "reports": len(library.reports()),
    "difference": float((model(x) - exported(x)).abs().max()),
    "grown": sum(p.numel() for n, p in model.named_parameters() if "esper" in n),
}))
"""


@pytest.mark.slow
def test_a_compiled_kernel_is_grown_into_a_model_without_a_compiler(tmp_path: Path) -> None:
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=12)
    validated_library(tmp_path, signature)
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    environment["PATH"] = str(tmp_path / "no-such-folder")
    done = subprocess.run([sys.executable, "-c", TRAINER, str(tmp_path)], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["states"] == ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING",
                              "FINE_TUNING", "FOSSILIZED"], seen
    assert seen["outcome"] == ["FOSSILIZED"] and seen["gain"][0] is not None
    assert seen["reports"] == 1 and seen["grown"] > 0
    assert seen["difference"] < 1e-4
