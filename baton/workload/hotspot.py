"""A burst of one hot prefix over ordinary traffic: where cache affinity overloads the worker that owns
the prefix (LMetric, OSDI'26, section 5.2: routing by the product is safe while the class's share x of
arrivals is at most |M| / N, with M the workers that hold its prefix).

During the burst a share `hot_share` of arrivals opens with the hot prefix, which is `hot_hit` of their
prompt. All others come from `num_classes` classes with a common prefix of `background_hit` each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from baton.workload.lengths import Lengths
from baton.workload.retiming import gamma_gaps
from baton.workload.trace import NO_SESSION, Trace, TraceRequest, WorkloadError, trace_of


@dataclass(frozen=True, slots=True, kw_only=True)
class HotspotWorkload:
    rate_per_s: float
    duration_s: float
    prompt: Lengths
    """Of every request; a class's prefix is its share of the prompt's length at the class's first use."""
    output: Lengths
    hot_share: float = 0.6
    hot_hit: float = 0.95
    burst_start_s: float = 0.0
    burst_s: float | None = None
    """None: to the end."""
    num_classes: int = 64
    background_hit: float = 0.5
    block_size_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("hot_share", "hot_hit", "background_hit"):
            if not 0 <= getattr(self, name) <= 1:
                raise WorkloadError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.num_classes < 1 or self.block_size_tokens < 1:
            raise WorkloadError("num_classes and block_size_tokens are at least 1")

    def generate(self, seed: int) -> Trace:
        rng = np.random.default_rng(seed)
        count = max(1, round(self.rate_per_s * self.duration_s))
        arrivals = np.cumsum(gamma_gaps(count, self.rate_per_s, 1.0, rng))
        prompts, outputs = self.prompt.sample(rng, count), self.output.sample(rng, count)
        burst_end_s = np.inf if self.burst_s is None else self.burst_start_s + self.burst_s
        in_burst = (arrivals >= self.burst_start_s) & (arrivals < burst_end_s)
        is_hot = in_burst & (rng.random(count) < self.hot_share)
        # Class 0 is the hot one.
        classes = np.where(is_hot, 0, rng.integers(1, self.num_classes + 1, count))
        prefix_of: dict[int, np.ndarray] = {}
        next_hash = 0
        requests = []
        for index in range(count):
            number, num_tokens = int(classes[index]), int(prompts[index])
            num_blocks = num_tokens // self.block_size_tokens
            prefix = prefix_of.get(number)
            if prefix is None:
                share = self.background_hit if number else self.hot_hit
                num_shared = int(share * num_tokens) // self.block_size_tokens
                prefix = prefix_of[number] = np.arange(next_hash, next_hash + num_shared)
                next_hash += num_shared
            shared = prefix[:num_blocks]
            own = np.arange(next_hash, next_hash + num_blocks - len(shared))
            next_hash += len(own)
            requests.append(
                TraceRequest(
                    position=0,
                    arrival_s=float(arrivals[index]),
                    num_prompt_tokens=num_tokens,
                    num_output_tokens=int(outputs[index]),
                    block_hashes=np.concatenate([shared, own]).astype(np.int64),
                    session_id=NO_SESSION,
                    turn=0,
                    think_s=0.0,
                )
            )
        return trace_of(requests, name="hotspot", block_size_tokens=self.block_size_tokens)
