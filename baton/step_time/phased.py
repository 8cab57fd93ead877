"""Prefill and decode with a fit of their own each, as one model for workers that do both."""

from __future__ import annotations

from dataclasses import dataclass

from baton.step_time.base import StepWork
from baton.step_time.linear import LinearStepTime
from baton.step_time.region import Region


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasedStepTime:
    """A step of one phase is that phase's fit. One of both pays the larger constant once and the rest of
    both; nobody measured such steps, so this is the form's assumption."""

    prefill: LinearStepTime
    decode: LinearStepTime
    region: Region | None = None

    def step_s(self, work: StepWork) -> float:
        if not work.num_decodes:
            return self.prefill.step_s(work)
        if not work.num_prefill_tokens:
            return self.decode.step_s(work)
        return self._both_s(self.prefill.step_s(work._replace(num_decodes=0, num_context_tokens=0)), work)

    def cadence_s(self, work: StepWork) -> float:
        return self.step_s(work) / self.prefill.num_stages

    def _both_s(self, prefill_s: float, work: StepWork) -> float:
        decode_s = self.decode.step_s(work._replace(num_prefill_tokens=0, num_prefill_pairs=0.0))
        return prefill_s + decode_s - min(self.prefill.base_s, self.decode.base_s)
