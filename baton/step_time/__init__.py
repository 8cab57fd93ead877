"""How long an engine step takes: one model for the simulated engine, the router and the planner."""

from baton.step_time.base import StepTime, StepWork, prefill_pairs
from baton.step_time.linear import LinearStepTime

__all__ = ["LinearStepTime", "StepTime", "StepWork", "prefill_pairs"]
