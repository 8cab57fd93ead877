"""Which of a worker's requests get the next engine step: pure policies, time and facts in, order out.

The same objects run inside vLLM's scheduler (`baton.engine.vllm.mlfq_scheduler`) and inside simulated
engines. Nothing here knows an engine, reads a clock or does I/O.
"""

from baton.scheduling.base import JobFacts, StepPolicy
from baton.scheduling.fair_share import FairShare
from baton.scheduling.fcfs import Fcfs
from baton.scheduling.first_iteration import FirstIteration
from baton.scheduling.las import Las
from baton.scheduling.mlfq import Mlfq
from baton.scheduling.registry import NAMES, by_name
from baton.scheduling.shortest_prefill import ShortestPrefill
from baton.scheduling.srpt import Srpt
from baton.scheduling.swap import Holding, SwapChoice, SwapRule

__all__ = [
    "FairShare", "Fcfs", "FirstIteration", "Holding", "JobFacts", "Las", "Mlfq", "NAMES",
    "ShortestPrefill", "Srpt", "StepPolicy", "SwapChoice", "SwapRule", "by_name",
]  # fmt: skip
