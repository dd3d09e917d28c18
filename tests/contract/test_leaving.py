"""What a worker leaves to others is not handed to it; over every library there is."""

from __future__ import annotations

from esper.leyline.library import Library
from tests.urza.support import OTHER, SIG, blueprint


def test_what_a_worker_leaves_to_others_is_not_handed_to_it(library: Library) -> None:
    for n, interest in ((1, 0.9), (2, 0.5)):
        library.submit(blueprint(n), SIG, author="karn", interest=interest)
    library.submit(blueprint(1), OTHER, author="karn", interest=0.7)
    leave = [(blueprint(1).id, SIG.id), ("bp-unknown", OTHER.id)]
    claims = [library.claim_blueprint("w", 60, leave=leave) for _ in range(3)]
    found = [(c.record.blueprint_id, c.record.signature) for c in claims if c is not None]
    assert found == [(blueprint(1).id, OTHER), (blueprint(2).id, SIG)] and claims[2] is None
    other = library.claim_blueprint("another", 60)
    assert other is not None
    assert (other.record.blueprint_id, other.record.signature) == (blueprint(1).id, SIG)
