"""What a policy that remembers is told of its decisions."""

from collections import Counter

import pytest

from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import StartPrefill


@pytest.mark.parametrize("keeps_records", [False, True])
def test_a_policy_remembers_its_decisions_where_no_hits_are_known(make_bench, keeps_records):
    """Preble explores by what it routed where; with a decision log as without one."""
    bench = make_bench(policies=("preble", "smallest-batch"), keeps_records=keeps_records)
    for name in ("p0", "p1", "p2"):
        bench.add(name, WorkerRole.PREFILL)
    bench.add("d0", WorkerRole.DECODE)
    served: Counter[str] = Counter()
    for number in range(12):
        bench.submit(f"r{number}", num_prompt_tokens=200)
        ((worker_id, start),) = bench.take(StartPrefill)
        served[worker_id] += 1
        bench.finish_prefill(worker_id, start.handoff_id)
        bench.step("d0", start.handoff_id, 1, finish="stop")
    assert sorted(served.values()) == [4, 4, 4]
