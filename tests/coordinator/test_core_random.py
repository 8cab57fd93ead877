"""Random schedules: whatever happens, each request ends once and the ledger returns to zero."""

from __future__ import annotations

import random

import pytest

from baton.contract.errors import ServingError
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import StartDecode, StartPrefill

P, D = WorkerRole.PREFILL, WorkerRole.DECODE


def _events(bench, rng, live, names):
    """One random thing that can happen, repeated and late messages included."""
    choice = rng.random()
    if choice < 0.3:
        try:
            bench.submit(next(names), num_prompt_tokens=rng.randint(1, 60), max_tokens=rng.randint(1, 6),
                         seed=rng.choice([None, 1]))  # fmt: skip
        except ServingError:
            pass
    elif choice < 0.75 and live:
        worker, message = rng.choice(live)
        if bench.worker(worker) is None:
            live.remove((worker, message))
        elif isinstance(message, StartPrefill):
            bench.finish_prefill(worker, message.handoff_id, finish=rng.choice([None, None, "stop"]))
        else:
            bench.step(worker, message.handoff_id, 5, finish=rng.choice([None, "length"]))
    elif choice < 0.85 and live:
        worker, message = rng.choice(live)
        if bench.worker(worker) is not None:
            bench.fail(worker, message.handoff_id, rng.choice(["engine_failed", "invalid_request"]))
    elif choice < 0.92 and bench.sinks:
        bench.perform(bench.core.abort(rng.choice(list(bench.sinks)), bench.now_s))
    elif choice < 0.96:
        worker = rng.choice(["p0", "p1", "d0", "d1"])
        bench.perform(bench.core.worker_lost(worker, "chaos", bench.now_s))
        bench.add(worker, P if worker[0] == "p" else D, num_blocks=12)
    else:
        bench.now_s += rng.choice([0.1, 25.0])
        bench.perform(bench.core.tick(bench.now_s))


@pytest.mark.parametrize("seed", range(60))
def test_every_request_ends_once_and_nothing_stays_reserved(make_bench, seed):
    rng = random.Random(seed)
    bench = make_bench(max_queued=20)
    for name in ("p0", "p1"):
        bench.add(name, P, num_blocks=12)
    for name in ("d0", "d1"):
        bench.add(name, D, num_blocks=12)
    names = (f"r{i}" for i in range(10_000))
    live: list = []
    for _ in range(400):
        _events(bench, rng, live, names)
        live += bench.take(StartPrefill) + bench.take(StartDecode)
        for worker in bench.core.fleet:
            account = worker.account
            assert account.num_queued_tokens >= 0 and account.num_reserved_blocks >= 0
            if worker.role is D:
                assert account.num_reserved_blocks <= 12  # never promised twice
    bench.perform(bench.core.abort_all("end of the test", bench.now_s))
    assert all(len(sink.reports) == 1 for sink in bench.sinks.values())
    bench.assert_nothing_is_held()
