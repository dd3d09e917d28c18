"""Whose fault is a failed compile? A control decides: a blueprint that is known to compile.

A compiler that is broken and a blueprint that breaks it give the same kinds of message: a
failed command, a killed process, a deadline. So nothing is read into the message. Where the
control compiles, the blueprint was at fault and becomes INVALID; where it does not, the
toolchain is, the blueprint goes back unharmed, and the breaker counts a failure. The same
control is what a half-open breaker is probed with, so that no blueprint is at risk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from esper.errors import NoBackend
from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR, C, Node, Op, Width
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.worker import Forge
from esper.tezzeret.workshop import backend_for

CONTROL = BlueprintIR(
    kind=SiteKind.FEATURES,
    name="control",
    nodes=(Node(id="a", op=Op.LINEAR, inputs=("h",), out=C),
           Node(id="b", op=Op.ADD, inputs=("h", "a"))),
    output="b",
)
# For backends that compile templates only.
LOW_RANK_CONTROL = BlueprintIR(
    kind=SiteKind.FEATURES,
    name="low-rank control",
    nodes=(Node(id="a", op=Op.LINEAR, inputs=("h",), out=Width(plus=2), bias=False),
           Node(id="b", op=Op.LINEAR, inputs=("a",), out=C),
           Node(id="c", op=Op.ADD, inputs=("h", "b"))),
    output="c",
)


def control_error(
    forge: Forge, device: str, cancelled: Callable[[], bool] = lambda: False
) -> str:
    """Compile the control for `device`, one by each backend: "" where that works, else what went
    wrong.

    Where it does not, the forge is ended: what it found out about a broken compiler when it
    started (which vector instructions work) must not outlive the repair.
    """
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=8, device=device)
    controls: dict[str, BlueprintIR] = {}
    for control in (CONTROL, LOW_RANK_CONTROL):
        with contextlib.suppress(NoBackend):
            controls.setdefault(backend_for(control, signature).name, control)
    try:
        for control in controls.values():
            forge.compile(control, signature, Pipeline.FAST, cancelled=cancelled)
    except Exception as e:  # whatever goes wrong with the control is not a blueprint's fault
        forge.close()
        return str(e) or repr(e)
    return ""
