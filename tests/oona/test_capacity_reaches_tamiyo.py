"""Load in one process slows the germinations of another: through the library and on the bus."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from esper.leyline.command import Action
from esper.leyline.events import Topic
from esper.leyline.lifecycle import KernelStatus, SeedState
from esper.oona.bus import Bus
from esper.oona.capacity import CapacityWatch
from esper.tamiyo.catalog import CatalogWatch
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.state import SiteStatus, SystemState
from esper.tamiyo.triggers import Schedule
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, artifact, blueprint, report

# Karn in a process of his own: brings the number of waiting blueprints to what he is told.
KARN = """
import sys
from esper.urza.library import LocalLibrary
from tests.urza.support import SIG, blueprint
library = LocalLibrary(sys.argv[1])
for n in range(int(sys.argv[2]), int(sys.argv[3])):
    library.submit(blueprint(n), SIG, author="karn")
"""


def test_a_fuller_queue_means_fewer_germinations(tmp_path: Path) -> None:
    library, bus, heard = LocalLibrary(tmp_path), Bus(), []
    library.submit(blueprint(1000), SIG, author="karn")
    claim = library.claim_blueprint("tezzeret", 60)
    assert claim is not None
    kernel = library.complete_blueprint(claim, artifact(claim.record.ir))
    work = library.claim_kernel("urabrask", 60)
    assert work is not None
    assert library.complete_kernel(work, report(kernel.kernel_id)).status is KernelStatus.VALIDATED
    bus.subscribe(Topic.CAPACITY, heard.append)
    announce = CapacityWatch(library.depths, bus.publish)
    catalog = CatalogWatch(library, [SIG], period=3600)
    site = SiteStatus("site", SIG, SeedState.DORMANT)
    germinations, reasons, put_off, waiting = {}, {}, {}, 0
    for wanted, factor in ((0, 1.0), (51, 0.7), (71, 0.3), (91, 0.1)):
        subprocess.run([sys.executable, "-c", KARN, str(tmp_path), str(waiting), str(wanted)],
                       check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        waiting = wanted
        announce.look()
        announce.look()
        assert catalog.refresh().capacity == factor
        policy, epochs = HeuristicPolicy(Schedule(1, 3)), range(1, 61)
        decisions = [policy.decide(SystemState(e, (), (1.0,) * e, (site,), 0, 0), catalog.current)
                     for e in epochs]
        commands = [c for d in decisions for c in d.commands]
        assert {c.action for c in commands} == {Action.GERMINATE}
        germinations[factor], reasons[factor] = len(commands), commands[-1].reason
        put_off[factor] = next((d.put_off for d in decisions if d.put_off), "")
    catalog.close()
    assert germinations == {1.0: 20, 0.7: 12, 0.3: 6, 0.1: 2}
    assert "slowed" not in reasons[1.0] and not put_off[1.0]
    assert "slowed: capacity 0.3 makes 3 epochs 10" in reasons[0.3]
    assert "capacity 0.1 makes 3 epochs 30" in put_off[0.1]
    assert bus.close() == 0
    assert [(e.body["level"], e.body["factor"], e.body["queue"]) for e in heard] == [
        ("normal", 1.0, heard[0].body["queue"]), ("degraded", 0.7, "karn_to_tezzeret"),
        ("overloaded", 0.3, "karn_to_tezzeret"), ("emergency", 0.1, "karn_to_tezzeret"),
    ], "each change once"
