"""Baton's scheduler on the clock of engine steps. vLLM loads it by name."""

from __future__ import annotations

from baton.engine.vllm.mlfq_scheduler import MlfqScheduler
from benchmarks.step_clock import STEP_S


class StepClockScheduler(MlfqScheduler):
    def _now_s(self) -> float:
        step: int = self.current_step
        return step * STEP_S
