"""One engine worker without an engine: time goes in, steps come out, nothing waits and nothing is sent.

`SimulatedWorker` is stepped by whoever drives it: `baton.replay` in virtual time, the simulated
engine (`baton.engine.simulated.engine`) in real time.
"""

from baton.simulation.kv_cache import PrefixCache
from baton.simulation.legs import Fetch, FinishedLeg, PlannedStep, StepResult
from baton.simulation.settings import SimulatedWorkerSettings
from baton.simulation.worker import SimulatedWorker

__all__ = [
    "Fetch",
    "FinishedLeg",
    "PlannedStep",
    "PrefixCache",
    "SimulatedWorker",
    "SimulatedWorkerSettings",
    "StepResult",
]
