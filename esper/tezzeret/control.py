"""Whose fault is a failed compile? A control decides: a blueprint that is known to compile.

A compiler that is broken and a blueprint that breaks it give the same kinds of message: a
failed command, a killed process, a deadline. So nothing is read into the message. Where the
control compiles, the blueprint was at fault and becomes INVALID; where it does not, the
toolchain is, the blueprint goes back unharmed, and the breaker counts a failure. The same
control is what a half-open breaker is probed with, so that no blueprint is at risk.
"""

from __future__ import annotations

from collections.abc import Callable

from esper.leyline.artifact import Pipeline
from esper.leyline.blueprint import BlueprintIR, C, Node, Op
from esper.leyline.signature import SiteKind, SiteSignature
from esper.tezzeret.worker import Forge

CONTROL = BlueprintIR(
    kind=SiteKind.FEATURES,
    name="control",
    nodes=(Node(id="a", op=Op.LINEAR, inputs=("h",), out=C),
           Node(id="b", op=Op.ADD, inputs=("h", "a"))),
    output="b",
)


def control_error(
    forge: Forge, device: str, cancelled: Callable[[], bool] = lambda: False
) -> str:
    """Compile the control for `device`: "" where that works, else what went wrong.

    Where it does not, the forge is ended: what it found out about a broken compiler when it
    started (which vector instructions work) must not outlive the repair.
    """
    signature = SiteSignature(kind=SiteKind.FEATURES, channels=8, device=device)
    try:
        forge.compile(CONTROL, signature, Pipeline.FAST, cancelled=cancelled)
    except Exception as e:  # whatever goes wrong with the control is not a blueprint's fault
        forge.close()
        return str(e) or repr(e)
    return ""
