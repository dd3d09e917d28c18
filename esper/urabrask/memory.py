"""Peak memory of a step on the CPU, counted instead of sampled.

What a process holds resident says little: allocators keep pages, and pages are shared. torch's
profiler sees every allocation and release of tensor memory, so the running sum has an exact
peak that does not depend on the machine. Memory that a kernel takes from the system directly
is not among it.
"""

from __future__ import annotations

from collections.abc import Callable


def peak_bytes(call: Callable[[], object]) -> int | None:
    """The most bytes of tensor memory that `call` holds at once beyond what it started with.

    None where the profiler reports no allocation.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    if results is None:
        return None
    events = [e for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak if events else None
