"""The simulator once more: slow, token by token, straight from the rules. Nothing is shared with it but
the step times; dispatch is the router's own policy code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from baton.contract.messages import WorkerCapacity
from baton.policy.base import Candidates, RequestFacts, choose
from baton.policy.ledger import Ledger, Pool
from baton.policy.p_token import PToken
from baton.policy.room import slots_with_prefill_room, slots_with_room
from baton.policy.smallest_batch import SmallestBatch
from baton.step_time import StepTime, StepWork, prefill_pairs

BIG = 2**60


@dataclass
class Job:
    number: int
    arrival_s: float
    prompt: int
    cached: int
    output: int
    draw: int
    first_s: float = math.inf
    last_s: float = math.inf
    prefill: PrefillWorker | None = None
    num_tokens: int = 0

    @property
    def facts(self) -> RequestFacts:
        return RequestFacts(num_prompt_tokens=self.prompt, num_expected_output_tokens=self.output)


@dataclass
class PrefillWorker:
    step_time: StepTime
    num_stages: int
    free: int
    queue: list[Job] = field(default_factory=list)
    in_flight: list[tuple[float, Job]] = field(default_factory=list)
    stage_free_s: list[float] = field(default_factory=list)

    def start(self, now_s: float, batch_tokens: int) -> None:
        if self.stage_free_s[0] > now_s or not self.queue:
            return
        batch: list[Job] = []
        tokens = 0
        while self.queue:
            job = self.queue[0]
            new = job.prompt - job.cached
            if job.prompt > self.free or (batch and tokens + new > batch_tokens):
                break
            tokens += new
            self.free -= job.prompt
            batch.append(self.queue.pop(0))
        if not batch:
            return
        work = StepWork(tokens, sum(prefill_pairs(j.prompt - j.cached, j.cached) for j in batch))
        at_s = now_s
        for stage in range(self.num_stages):
            at_s = max(at_s, self.stage_free_s[stage]) + self.step_time.cadence_s(work)
            self.stage_free_s[stage] = at_s
        self.in_flight += [(at_s, job) for job in batch]


@dataclass
class DecodeWorker:
    step_time: StepTime
    num_stages: int
    free: int
    running: list[Job] = field(default_factory=list)
    joining: list[Job] = field(default_factory=list)
    step_end_s: float = math.inf
    stepping: list[Job] = field(default_factory=list)

    def begin(self, now_s: float) -> None:
        self.running += self.joining
        self.joining = []
        self.stepping = list(self.running)
        if not self.stepping:
            self.step_end_s = math.inf
            return
        largest = -(-len(self.stepping) // self.num_stages)
        context = sum(job.prompt + job.num_tokens for job in self.stepping)
        # Linear in the context, so an uneven share of it is asked for as two whole numbers.
        low = self.step_time.step_s(StepWork(num_decodes=largest, num_context_tokens=0))
        slope = self.step_time.step_s(StepWork(num_decodes=largest, num_context_tokens=1)) - low
        self.step_end_s = now_s + low + slope * context / self.num_stages


def simulate_slowly(
    jobs: list[Job],
    prefill: list[PrefillWorker],
    decode: list[DecodeWorker],
    *,
    batch_tokens: int,
    window_tokens: int,
    max_batch: int,
    transfer_s: dict[tuple[int, int], tuple[tuple, tuple, float, float]],
) -> None:
    """`transfer_s[p, d]`: names of the source's and the target's link, latency, seconds per token."""
    ledger = Ledger()
    pools = {"prefill": Pool(), "decode": Pool()}
    for role, frees in (("prefill", [w.free for w in prefill]), ("decode", [w.free for w in decode])):
        for number, free in enumerate(frees):
            capacity = WorkerCapacity(
                num_blocks=free, max_batch_size=max_batch if role == "decode" else BIG,
                max_model_len=BIG, kv_bytes_per_block=1,
            )  # fmt: skip
            window = window_tokens if role == "prefill" else None
            pools[role].add(ledger.open(f"{role}{number}", capacity, 1, window))
    prefill_accounts, decode_accounts = list(pools["prefill"]), list(pools["decode"])
    to_arrive, central, ready = list(jobs), [], []
    landing: list[tuple[float, Job, int]] = []
    link_free_s: dict[object, float] = {}
    num_done, now_s = 0, 0.0
    while num_done < len(jobs):
        times = [to_arrive[0].arrival_s] if to_arrive else []
        times += [w.stage_free_s[0] for w in prefill if w.queue and w.stage_free_s[0] > now_s]
        times += [end for w in prefill for end, _ in w.in_flight]
        times += [end for end, _, _ in landing]
        times += [w.step_end_s for w in decode]
        now_s = min(times)
        # Whose step ends, then whose prompt is computed, then whose KV has landed, then who arrives.
        if to_arrive and to_arrive[0].arrival_s == now_s:
            central.append(to_arrive.pop(0))
        for worker_number, worker in enumerate(prefill):
            for end, job in list(worker.in_flight):
                if end != now_s:
                    continue
                worker.in_flight.remove((end, job))
                job.first_s, job.num_tokens = now_s, 1
                prefill_accounts[worker_number].prefill_done(str(job.number))
                if job.output == 1:
                    job.last_s = now_s
                    num_done += 1
                    worker.free += job.prompt
                    prefill_accounts[worker_number].release(str(job.number))
                else:
                    ready.append(job)
        for end, job, d in list(landing):
            if end == now_s:
                landing.remove((end, job, d))
                assert job.prefill is not None
                job.prefill.free += job.prompt
                prefill_accounts[prefill.index(job.prefill)].release(str(job.number))
                decode[d].joining.append(job)
                if decode[d].step_end_s == math.inf:
                    decode[d].begin(now_s)
        for d, decoder in enumerate(decode):
            if decoder.step_end_s != now_s:
                continue
            for job in decoder.stepping:
                job.num_tokens += 1
                decode_accounts[d].grow(str(job.number), 1)
                if job.num_tokens == job.output:
                    job.last_s = now_s
                    num_done += 1
                    decoder.running.remove(job)
                    decoder.free += job.prompt + job.output
                    decode_accounts[d].release(str(job.number))
            decoder.begin(now_s)
        while central:
            job = central[0]
            slots = slots_with_prefill_room(job.facts, ledger, pools["prefill"])
            choice = choose(PToken(), Candidates(job.facts, ledger, slots, draw=job.draw))
            if choice is None:
                break
            central.pop(0)
            account = choice.account
            account.commit(str(job.number), num_queued_tokens=job.prompt - job.cached, num_blocks=0)
            job.prefill = prefill[prefill_accounts.index(account)]
            job.prefill.queue.append(job)
            job.prefill.start(now_s, batch_tokens)
        for worker in prefill:
            worker.start(now_s, batch_tokens)
        while ready:
            job = ready[0]
            slots = slots_with_room(job.facts, ledger, pools["decode"].slots)
            choice = choose(SmallestBatch(), Candidates(job.facts, ledger, slots, draw=job.draw >> 16))
            if choice is None:
                break
            ready.pop(0)
            d = decode_accounts.index(choice.account)
            choice.account.commit(
                str(job.number), num_queued_tokens=0, num_blocks=job.prompt + job.output,
                num_kv_tokens=job.prompt,
            )  # fmt: skip
            decode[d].free -= job.prompt + job.output
            assert job.prefill is not None
            source, target, base_s, token_s = transfer_s[prefill.index(job.prefill), d]
            start_s = max(now_s, link_free_s.get(source, 0.0), link_free_s.get(target, 0.0))
            end_s = start_s + base_s + token_s * job.prompt
            link_free_s[source] = link_free_s[target] = end_s
            landing.append((end_s, job, d))
