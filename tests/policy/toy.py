"""A prefill pool in a hundred lines, for orderings and ratios only.

First come, first served workers at 8,000 tokens/s and 10 ms per request, each with an LRU cache of
whole sessions; sessions of several turns whose prompts grow. Policies, ledger and choice are the
real ones, queues drain with every step as engines report it; hits come from the caches directly.
Absolute values mean nothing.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np

from baton.contract.messages import WorkerCapacity, WorkerLoad
from baton.policy.base import Candidates, Policy, RequestFacts, choose
from baton.policy.ledger import Ledger

BLOCK = 16
TOKENS_PER_S = 8000.0
STEP_S = 0.01


@dataclass(frozen=True)
class Outcome:
    mean_ttft_s: float
    p99_ttft_s: float
    hit_ratio: float
    max_share: float
    """Of the requests, at the busiest worker."""


class Cache:
    """Tokens per session, least recently used sessions forgotten first."""

    def __init__(self, num_tokens: int) -> None:
        self._capacity = num_tokens
        self._held: OrderedDict[int, int] = OrderedDict()
        self._used = 0

    def hit(self, session: int, prompt: int) -> int:
        return min(self._held.get(session, 0), (prompt - 1) // BLOCK * BLOCK)

    def keep(self, session: int, prompt: int) -> None:
        self._used += prompt - self._held.pop(session, 0)
        self._held[session] = prompt
        while self._used > self._capacity:
            self._used -= self._held.popitem(last=False)[1]


class Engine:
    """Its queue, and how many tokens it has computed by now."""

    def __init__(self) -> None:
        self.free_s = 0.0
        self._finished = 0
        self._queue: deque[tuple[float, float, int]] = deque()

    def add(self, now_s: float, uncached: int) -> float:
        start_s = max(self.free_s, now_s)
        self.free_s = start_s + STEP_S + uncached / TOKENS_PER_S
        self._queue.append((start_s, self.free_s, uncached))
        return self.free_s

    def computed(self, now_s: float) -> int:
        while self._queue and self._queue[0][1] <= now_s:
            self._finished += self._queue.popleft()[2]
        if not self._queue or self._queue[0][0] >= now_s:
            return self._finished
        start_s, end_s, uncached = self._queue[0]
        return self._finished + int(uncached * (now_s - start_s) / (end_s - start_s))


def arrivals(rng: random.Random, rate: float, seconds: float) -> list[tuple[float, int, int]]:
    """(time, session, prompt tokens): turns of a session ten seconds apart on average."""
    turns, session, now_s = [], 0, 0.0
    while now_s < seconds:
        now_s += rng.expovariate(rate / 5)
        session += 1
        at_s, prompt = now_s, rng.randint(200, 3000)
        for _ in range(rng.randint(1, 9)):
            turns.append((at_s, session, prompt))
            at_s += rng.expovariate(1 / 10)
            prompt += rng.randint(100, 900)
    return sorted(turn for turn in turns if turn[0] < seconds)


def run(policy: Policy, *, rate: float, seed: int, num_workers: int = 8, seconds: float = 150.0) -> Outcome:
    rng = random.Random(seed)
    ledger, slots = Ledger(), np.arange(num_workers)
    capacity = WorkerCapacity(num_blocks=1, max_batch_size=1, max_model_len=1, kv_bytes_per_block=1)
    accounts = [ledger.open(f"w{i}", capacity, BLOCK) for i in range(num_workers)]
    caches = [Cache(150_000) for _ in accounts]
    engines = [Engine() for _ in accounts]
    done: list[tuple[float, int, str]] = []
    ttfts, counts, num_tokens, num_hit = [], [0] * num_workers, 0, 0
    for number, (now_s, session, prompt) in enumerate(arrivals(rng, rate, seconds)):
        while done and done[0][0] <= now_s:
            _, slot, name = heapq.heappop(done)
            accounts[slot].release(name)
        for account, engine in zip(accounts, engines, strict=True):
            account.observe(WorkerLoad(num_prefill_tokens_done=engine.computed(now_s)))
        hits = np.array([cache.hit(session, prompt) for cache in caches])
        facts = RequestFacts(num_prompt_tokens=prompt, num_expected_output_tokens=1)
        choice = choose(
            policy, Candidates(facts, ledger, slots, hit_tokens=hits, draw=rng.getrandbits(48), now_s=now_s)
        )
        assert choice is not None
        slot, uncached = choice.slot, prompt - choice.hit_tokens
        name = f"h{number}"
        choice.account.commit(name, num_queued_tokens=uncached, num_blocks=0)
        policy.committed(choice.candidates, choice.position)
        done_s = engines[slot].add(now_s, uncached)
        heapq.heappush(done, (done_s, slot, name))
        caches[slot].keep(session, prompt)
        ttfts.append(done_s - now_s)
        counts[slot] += 1
        num_tokens += prompt
        num_hit += choice.hit_tokens
    ttfts.sort()
    return Outcome(
        mean_ttft_s=sum(ttfts) / len(ttfts),
        p99_ttft_s=ttfts[int(0.99 * len(ttfts))],
        hit_ratio=num_hit / num_tokens,
        max_share=max(counts) / len(ttfts),
    )
