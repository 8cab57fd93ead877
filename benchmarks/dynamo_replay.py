"""dynamo.replay as a subject of `replay_fidelity`: run by the peer's own Python.

One JSON command per line in, one JSON answer per line out:

    {"trace": FILE, "num_prefill": 4, "num_decode": 4, "speedup": 1.0, "num_blocks": 16384,
     "mode": "kv_router" or "round_robin"}                        the summary of its replay

Everything else is its default: kv_router's own settings, the built-in "polynomial" step times, KV
that moves in no time, 64-token blocks. Imports nothing of Baton.
"""

import json
import os
import sys
import time
from typing import Any

os.environ["DYN_LOG"] = "error"

from dynamo.llm import KvRouterConfig  # type: ignore[import-not-found]
from dynamo.replay import run_trace_replay  # type: ignore[import-not-found]


def engine(role: str, num_blocks: int) -> dict[str, Any]:
    return {
        "engine": {"backend": "vllm", "num_gpu_blocks": num_blocks, "block_size": 64, "worker_type": role}
    }


def answer(command: dict[str, Any]) -> dict[str, Any]:
    started_s = time.process_time()
    report = run_trace_replay(
        command["trace"],
        trace_block_size=512,
        router_mode=command["mode"],
        router_config=KvRouterConfig() if command["mode"] == "kv_router" else None,
        prefill_engine_args=engine("prefill", command["num_blocks"]),
        decode_engine_args=engine("decode", command["num_blocks"]),
        num_prefill_workers=command["num_prefill"],
        num_decode_workers=command["num_decode"],
        arrival_speedup_ratio=command["speedup"],
        sla_ttft_ms=2000,
        sla_itl_ms=50,
    )
    summary: dict[str, Any] = report.to_dict()["summary"]
    return summary | {"cpu_s": time.process_time() - started_s}


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
