"""A runtime for neural networks that grow while they train.

`import esper` is cheap: nothing below is imported, torch included, before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from esper.version import __version__

if TYPE_CHECKING:
    from esper import nn as nn
    from esper.cli.bench import bench as bench
    from esper.kasmina.export import export as export
    from esper.kasmina.growth import growth_of as growth_of
    from esper.kasmina.growth import unwrap as unwrap
    from esper.kasmina.growth import wrap as wrap
    from esper.kasmina.sites import suggest_sites as suggest_sites
    from esper.nn.accelerate import accelerate as accelerate
    from esper.rpc.address import open_library as open_library
    from esper.slowtrack import SlowTrack as SlowTrack
    from esper.tamiyo.heuristic import HeuristicPolicy as HeuristicPolicy
    from esper.tolaria.keeper import Checkpoints as Checkpoints
    from esper.tolaria.session import Session as Session
    from esper.tolaria.sharded import clip_grad_norm_ as clip_grad_norm_
    from esper.tolaria.trainer import Trainer as Trainer

_LAZY = {
    "Checkpoints": "esper.tolaria.keeper:Checkpoints",
    "HeuristicPolicy": "esper.tamiyo.heuristic:HeuristicPolicy",
    "Session": "esper.tolaria.session:Session",
    "SlowTrack": "esper.slowtrack:SlowTrack",
    "Trainer": "esper.tolaria.trainer:Trainer",
    "bench": "esper.cli.bench:bench",
    "export": "esper.kasmina.export:export",
    "accelerate": "esper.nn.accelerate:accelerate",
    "clip_grad_norm_": "esper.tolaria.sharded:clip_grad_norm_",
    "growth_of": "esper.kasmina.growth:growth_of",
    "nn": "esper.nn:",  # the whole of it
    "open_library": "esper.rpc.address:open_library",
    "suggest_sites": "esper.kasmina.sites:suggest_sites",
    "unwrap": "esper.kasmina.growth:unwrap",
    "wrap": "esper.kasmina.growth:wrap",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(
            f"esper has no attribute {name!r}; public names are: {', '.join(sorted(_LAZY))}"
        )
    module, attribute = _LAZY[name].split(":")
    value = import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
