"""Real workers whose engine computes on a sixth of a core: a profile of them, and the fleet.

    python -m benchmarks.slow_worker prefill|decode|profile FLAGS…

A simulator knows nothing of engines that wait for each other's cores. Three engines, a coordinator and a
client want five cores; where there are two, the machine's scheduler is what would be compared. So each engine
sleeps for five times the CPU time that a forward pass took, in `baton profile` as in the fleet: its steps
take six times as long and leave the cores, and what cores share, to the others. Everything else is as always.
"""

from __future__ import annotations

import sys
import time
from typing import Any
from unittest.mock import patch

from baton.engine.vllm.cpu_worker import BatonCPUWorker
from baton.engine.vllm.settings import engine_arguments
from baton.profiling import command
from decode_worker import __main__ as decode
from prefill_worker import __main__ as prefill

SLOWDOWN = 6.0
PROGRAMS = {"prefill": prefill.main, "decode": decode.main, "profile": command.main}


class SlowCPUWorker(BatonCPUWorker):
    """vLLM loads it by name in the engine's process."""

    def execute_model(self, *arguments: Any, **named_arguments: Any) -> Any:
        # CPU time, of this thread: what others take meanwhile is not to be multiplied.
        started_s = time.thread_time()
        output = super().execute_model(*arguments, **named_arguments)
        time.sleep((SLOWDOWN - 1) * (time.thread_time() - started_s))
        return output


def slow_arguments(*arguments: Any, **named_arguments: Any) -> dict[str, Any]:
    slow = {"worker_cls": "benchmarks.slow_worker.SlowCPUWorker"}
    return engine_arguments(*arguments, **named_arguments) | slow


if __name__ == "__main__":
    with patch("baton.engine.vllm.engine.engine_arguments", slow_arguments):
        sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))
