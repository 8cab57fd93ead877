"""SLO rule (PolyServe): among workers predicted to meet both targets the fullest, else the fastest.

Feasible: predicted TTFT and TPOT within their targets. Among feasible workers the *highest*
predicted TPOT wins, which packs load and leaves empty workers for demanding requests. Nobody
feasible: the lowest predicted TPOT.

Reads hits, queued tokens, legs, KV tokens, and a linear step-time model. Optimises attainment of
fixed targets, not latency: below the targets it does nothing to be faster. Does badly with a wrong
model (the LMetric paper: 20 % off for one request in ten even when tuned) and overloaded, when
nobody is feasible and hits no longer count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from baton.policy.base import Candidates, Key, Memoryless


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStepTime:
    """Seconds as straight lines; the defaults fit the table of dynamo.replay 1.6.1 (H100 class)."""

    prefill_s: float = 0.011
    """A prefill step before its first token."""
    prefill_s_per_token: float = 2.06e-5
    decode_s: float = 0.00575
    """A decode step of one short sequence."""
    decode_s_per_sequence: float = 1.35e-5
    decode_s_per_kv_token: float = 1.1e-8


class SloRule(Memoryless):
    def __init__(
        self, ttft_slo_s: float = 1.0, tpot_slo_s: float = 0.02, step_time: LinearStepTime | None = None
    ) -> None:
        self._ttft_slo_s = ttft_slo_s
        self._tpot_slo_s = tpot_slo_s
        self._step = step_time or LinearStepTime()
        self.name = f"slo:{ttft_slo_s:g},{tpot_slo_s:g}"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        step = self._step
        ttft_s = step.prefill_s + step.prefill_s_per_token * candidates.p_tokens
        kv_tokens = candidates.num_kv_tokens + candidates.facts.num_prompt_tokens
        tpot_s = (
            step.decode_s
            + step.decode_s_per_sequence * candidates.batch
            + step.decode_s_per_kv_token * kv_tokens
        )
        is_feasible = (ttft_s <= self._ttft_slo_s) & (tpot_s <= self._tpot_slo_s)
        if is_feasible.any():
            return np.where(is_feasible, -tpot_s, np.inf), candidates.p_tokens
        return (tpot_s,)
