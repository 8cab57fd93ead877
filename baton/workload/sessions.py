"""The project's own public workload: conversations with applications, made from a seed.

An application has a system prompt that opens all of its conversations; few applications get most of
them (Zipf). A conversation has several turns; the prompt of a turn is everything before it (system
prompt, earlier questions and answers) and a new question, so it only ever grows at the end. Block
hashes follow from that: full blocks inside the system prompt belong to the application, all later ones
to the conversation. Think times lie between an answer's end and the next question.

Nothing in it is measured from users: it is a stated shape, for comparisons that anyone can repeat.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from baton.workload.lengths import Lengths, parse_lengths
from baton.workload.retiming import gamma_gaps
from baton.workload.trace import Trace, TraceRequest, WorkloadError, trace_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionWorkload:
    num_sessions: int
    session_rate_per_s: float
    session_gap_cv: float = 1.0
    """Burstiness of session starts; 1: Poisson."""
    num_apps: int = 32
    app_zipf: float = 1.1
    """Application k is asked for in proportion to k ** -app_zipf; 0: all alike."""
    system_prompt: Lengths = field(default_factory=lambda: parse_lengths("lognormal:1200,0.8,max=8192"))
    question: Lengths = field(default_factory=lambda: parse_lengths("lognormal:250,1.5,max=8192"))
    answer: Lengths = field(default_factory=lambda: parse_lengths("lognormal:250,1,max=2048"))
    mean_turns: float = 4.0
    """Turns of a conversation are geometric, at least one."""
    mean_think_s: float = 8.0
    """Exponential."""
    expected_ttft_s: float = 0.5
    expected_tpot_s: float = 0.02
    """How long answers are taken to last when the arrivals of later turns are written down; a closed-loop
    replay does not use them."""
    max_model_len: int = 32_768
    """A conversation ends before the turn that would not fit."""
    block_size_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("num_sessions", "num_apps", "block_size_tokens", "max_model_len", "mean_turns"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("app_zipf", "mean_think_s", "expected_ttft_s", "expected_tpot_s"):
            if getattr(self, name) < 0:
                raise WorkloadError(f"{name} is {getattr(self, name)}, expected at least 0")

    def generate(self, seed: int) -> Trace:
        """The same trace for the same seed and settings. Sessions whose first turn does not fit into
        `max_model_len` are left out; WorkloadError if that leaves none."""
        rng = np.random.default_rng(seed)
        system_tokens = self.system_prompt.sample(rng, self.num_apps)
        weights = np.arange(1, self.num_apps + 1, dtype=np.float64) ** -self.app_zipf
        apps = rng.choice(self.num_apps, self.num_sessions, p=weights / weights.sum())
        starts = np.cumsum(gamma_gaps(self.num_sessions, self.session_rate_per_s, self.session_gap_cv, rng))
        num_turns = rng.geometric(1 / self.mean_turns, self.num_sessions)
        block = self.block_size_tokens
        app_blocks = np.concatenate([[0], np.cumsum(system_tokens // block)])
        next_hash = int(app_blocks[-1])
        requests: list[TraceRequest] = []
        for session in range(self.num_sessions):
            app, turns = int(apps[session]), int(num_turns[session])
            questions, answers = self.question.sample(rng, turns), self.answer.sample(rng, turns)
            thinks = rng.exponential(self.mean_think_s, turns)
            # Context before each turn's question: the system prompt and all earlier turns.
            ends = int(system_tokens[app]) + np.cumsum(questions + answers)
            prompts = ends - answers
            num_own = int(prompts[-1]) // block - int(system_tokens[app]) // block
            hashes = np.concatenate(
                [np.arange(app_blocks[app], app_blocks[app + 1]), np.arange(next_hash, next_hash + num_own)]
            ).astype(np.int64)
            next_hash += num_own
            at_s = float(starts[session])
            for turn in range(turns):
                if ends[turn] > self.max_model_len:
                    break
                if turn:
                    at_s += self.expected_ttft_s + self.expected_tpot_s * int(answers[turn - 1])
                    at_s += float(thinks[turn])
                requests.append(
                    TraceRequest(
                        position=0,
                        arrival_s=at_s,
                        num_prompt_tokens=int(prompts[turn]),
                        num_output_tokens=int(answers[turn]),
                        block_hashes=hashes[: int(prompts[turn]) // block],
                        session_id=session,
                        turn=turn,
                        think_s=float(thinks[turn]) if turn else 0.0,
                    )
                )
        if not requests:
            raise WorkloadError(f"no session fits into max_model_len {self.max_model_len}")
        return trace_of(requests, name="sessions", block_size_tokens=block)
