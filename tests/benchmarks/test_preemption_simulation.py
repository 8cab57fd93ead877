"""What the preemption benchmark promises, on small traces: that its parts measure what they say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks import preemption_simulation as simulation


@pytest.mark.parametrize("name", ["mlfq", "skip-join-mlfq", "las", "srpt"])
def test_short_jobs_gain_and_every_job_ends(name: str):
    workload = simulation.BIMODAL_90
    jobs = workload.jobs(seed=1, num_jobs=300)
    fcfs = simulation.serve(workload, jobs, None, workload.settings)
    ours = simulation.serve(workload, jobs, simulation.policy(workload, name), workload.settings)
    assert len(ours.jct_s) == 300 and min(ours.jct_s) > 0
    assert ours.makespan_s == pytest.approx(fcfs.makespan_s, rel=0.1)
    assert fcfs.mean_s > 1.2 * ours.mean_s


def test_equal_jobs_lose_nothing():
    workload = simulation.EQUAL
    jobs = workload.jobs(seed=2, num_jobs=300)
    fcfs = simulation.serve(workload, jobs, None, workload.settings)
    ours = simulation.serve(workload, jobs, simulation.policy(workload, "skip-join-mlfq"), workload.settings)
    assert fcfs.mean_s >= 0.85 * ours.mean_s


def test_swapping_beats_recomputing_where_memory_is_short():
    workload = simulation.KV_LIMITED
    jobs = workload.jobs(seed=3, num_jobs=150)
    policies = [simulation.policy(workload, "skip-join-mlfq") for _ in range(2)]
    swap = simulation.serve(workload, jobs, policies[0], replace(workload.settings, can_swap=True))
    recompute = simulation.serve(workload, jobs, policies[1], workload.settings)
    assert recompute.mean_s >= 1.2 * swap.mean_s
    assert swap.num_preemptions <= 3 * len(jobs)


def test_load_is_relative_to_a_full_worker():
    """Twice the load: arrivals in half the time."""
    workload = simulation.SHAREGPT_90
    last_s = workload.jobs(seed=4, num_jobs=100)[-1].arrival_s
    assert replace(workload, load=1.8).jobs(seed=4, num_jobs=100)[-1].arrival_s == pytest.approx(last_s / 2)
    assert simulation.sharegpt(random.Random(5))[1] >= 1


def test_short_prompts_first():
    workload = simulation.PREFILL_MIX
    jobs = workload.jobs(seed=6, num_jobs=300)
    fcfs = simulation.serve(workload, jobs, None, workload.settings)
    ours = simulation.serve(
        workload, jobs, simulation.policy(workload, "shortest-prefill"), workload.settings
    )
    assert fcfs.mean_s >= 1.5 * ours.mean_s
