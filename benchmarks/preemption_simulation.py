"""Step policies in simulated workers, on paired traces in virtual time. Ratios are FCFS / policy."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from baton.scheduling import FirstIteration, ShortestPrefill, StepPolicy, by_name
from baton.simulation.settings import SimulatedWorkerSettings
from baton.simulation.worker import SimulatedWorker
from baton.step_time import LinearStepTime

GPU = LinearStepTime(
    base_s=0.022, per_decode_s=0.0003, per_context_token_s=0.4e-6, per_prefill_token_s=0.00012
)
"""About a 13B model on an A100."""
CPU = LinearStepTime(base_s=0.004, per_decode_s=0.002)
PREFILL = LinearStepTime(base_s=0.008, per_prefill_token_s=1 / 20_000)


@dataclass(frozen=True, slots=True)
class Job:
    arrival_s: float
    num_prompt: int
    num_output: int


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    step_time: LinearStepTime
    settings: SimulatedWorkerSettings
    sizes: Callable[[random.Random], tuple[int, int]]
    """(prompt tokens, output tokens)"""
    load: float
    """Relative to what the worker can do with a full batch."""
    is_decode: bool = False
    """KV comes ready, as from a prefill worker."""
    is_prefill: bool = False

    def jobs(self, seed: int, num_jobs: int) -> list[Job]:
        randomness = random.Random(seed)
        sizes = [self.sizes(randomness) for _ in range(num_jobs)]
        rate_per_s = self.load * self._capacity_per_s(sizes)
        clock_s, jobs = 0.0, []
        for num_prompt, num_output in sizes:
            clock_s += randomness.expovariate(rate_per_s)
            jobs.append(Job(clock_s, num_prompt, num_output))
        return jobs

    def _capacity_per_s(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Of a worker that has all of them from the start, until the last one begins: while it is full."""
        jobs = [Job(0.0, num_prompt, num_output) for num_prompt, num_output in sizes]
        served = serve(self, jobs, None, self.settings)
        return len(jobs) / max(served.jct_s if self.is_prefill else served.ttft_s)


@dataclass(slots=True)
class Served:
    jct_s: list[float]
    ttft_s: list[float]
    normalised_s: list[float]
    makespan_s: float
    max_gap_s: float
    num_preemptions: int
    max_present: int

    @property
    def mean_s(self) -> float:
        return statistics.fmean(self.jct_s)


def percentile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(fraction * len(ordered)) - 1)]


def serve(
    workload: Workload, jobs: Sequence[Job], policy: StepPolicy | None, settings: SimulatedWorkerSettings
) -> Served:
    """One worker, one policy, to the end. Swapping in takes the step in which it is asked for."""
    worker = SimulatedWorker(settings, workload.step_time, policy)
    num = len(jobs)
    first_s, end_s, last_s = [0.0] * num, [0.0] * num, [job.arrival_s for job in jobs]
    now_s, max_gap_s, max_present, position = 0.0, 0.0, 0, 0
    while position < num or worker.num_legs:
        if not worker.num_legs:
            now_s = max(now_s, jobs[position].arrival_s)
        while position < num and jobs[position].arrival_s <= now_s:
            job = jobs[position]
            if workload.is_prefill:
                worker.add_prefill(str(position), job.num_prompt, (), now_s, keep_kv=False)
            else:
                worker.add_decode(
                    str(position), job.num_prompt, job.num_output, (), now_s,
                    is_kv_on_its_way=False, is_kv_here=workload.is_decode,
                )  # fmt: skip
            position += 1
        max_present = max(max_present, worker.num_legs)
        plan = worker.begin_step(now_s, max_num_steps=1_000 if position == num else 1)
        fetches = worker.places.take_fetches()
        if plan is not None:
            now_s = plan.end_s
            result = worker.end_step()
            for leg_id in result.first_tokens:
                first_s[int(leg_id)] = now_s
            for leg_id, _ in result.tokens:
                index = int(leg_id)
                max_gap_s = max(max_gap_s, now_s - last_s[index])
                last_s[index] = now_s
            for finished in (*result.finished, *result.finished_prefills):
                end_s[int(finished.leg_id)] = now_s
        for fetch in fetches:
            worker.places.kv_arrived(fetch.leg_id)
    jct_s = [end - job.arrival_s for end, job in zip(end_s, jobs, strict=True)]
    return Served(
        jct_s=jct_s,
        ttft_s=[first - job.arrival_s for first, job in zip(first_s, jobs, strict=True)],
        normalised_s=[jct / job.num_output for jct, job in zip(jct_s, jobs, strict=True)],
        makespan_s=now_s,
        max_gap_s=max_gap_s,
        num_preemptions=worker.places.num_preemptions,
        max_present=max_present,
    )


def lognormal(randomness: random.Random, median: float, sigma: float, cap: int) -> int:
    return max(1, min(cap, round(randomness.lognormvariate(math.log(median), sigma))))


def sharegpt(randomness: random.Random) -> tuple[int, int]:
    return lognormal(randomness, 90, 1.2, 1500), lognormal(randomness, 130, 1.2, 1800)


def bimodal(randomness: random.Random) -> tuple[int, int]:
    is_short = randomness.random() < 0.9
    return 16, randomness.randint(8, 24) if is_short else randomness.randint(300, 500)


def worker(num_places: int, num_blocks: int = 100_000, **settings: int | bool) -> SimulatedWorkerSettings:
    return replace(
        SimulatedWorkerSettings(
            num_blocks=num_blocks,
            block_size_tokens=16,
            max_batch_size=num_places,
            has_prefix_cache=False,
            has_kv_events=False,
        ),
        **settings,  # type: ignore[arg-type]
    )


SHAREGPT_90 = Workload("gpu_b16_sharegpt_0.9", GPU, worker(16), sharegpt, 0.9)
SHAREGPT_110 = replace(SHAREGPT_90, name="gpu_b16_sharegpt_1.1", load=1.1)
BIMODAL_90 = Workload("cpu_b4_bimodal_0.9", CPU, worker(4), bimodal, 0.9)
EQUAL = Workload("equal_sizes_0.9", GPU, worker(16), lambda r: (90, 130), 0.9)
KV_LIMITED = Workload("kv_limited_0.95", GPU, worker(256, 500), sharegpt, 0.95)
LONG_PROMPTS = Workload(
    "decode_long_prompts_0.85",
    GPU,
    worker(16),
    lambda r: (lognormal(r, 1000, 0.8, 6000), lognormal(r, 20, 1.0, 300)),
    0.85,
    is_decode=True,
)
PREFILL_MIX = Workload(
    "prefill_long_mix_0.9",
    PREFILL,
    replace(worker(64), max_num_batched_tokens=2048),
    lambda r: (lognormal(r, 500, 1.0, 4000) if r.random() < 0.85 else r.randint(8000, 24000), 1),
    0.9,
    is_prefill=True,
)


def policy(workload: Workload, name: str) -> StepPolicy | None:
    if name == "fcfs":
        return None
    if name == "shortest-prefill":
        return ShortestPrefill(
            per_token_s=workload.step_time.per_prefill_token_s,
            chunk_tokens=workload.settings.max_num_batched_tokens,
        )
    first_iteration = FirstIteration() if workload.is_decode else FirstIteration.of(workload.step_time)
    return by_name(name, first_iteration=first_iteration)
