"""Modules with a fast path, and `accelerate`, which finds one for anybody's modules.

    model = nn.Sequential(esper.nn.GatedMLP(256, 683), nn.Linear(256, 10))
    esper.accelerate(model, example=torch.randn(16, 256))
    esper.nn.path(model[0])  # which path computes it: "plain", or the kernel that is installed
"""

from esper.kasmina.blend import blend as blend
from esper.nn.accelerate import accelerate as accelerate
from esper.nn.blending import Blend as Blend
from esper.nn.fast import path as path
from esper.nn.fast import plain as plain
from esper.nn.fast import undo as undo
from esper.nn.report import Report as Report
from esper.nn.report import Row as Row
from esper.nn.zoo import Attention as Attention
from esper.nn.zoo import Bottleneck as Bottleneck
from esper.nn.zoo import DepthwiseBlock as DepthwiseBlock
from esper.nn.zoo import GatedMLP as GatedMLP
from esper.nn.zoo import LowRank as LowRank
from esper.nn.zoo import SqueezeExcite as SqueezeExcite
