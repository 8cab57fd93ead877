"""One real vLLM engine on the CPU, driven step by step in this process. Time is counted in engine steps,
so a busy machine changes nothing: arrivals, completion times, starvation.

    python -m benchmarks.step_clock MODEL '{"scheduler": "skip-join-mlfq", ...}' < traces.json

Reads traces (lists of [arrival step, prompt tokens, output tokens]), prints one JSON line per trace.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

BLOCK_SIZE_TOKENS = 32
STEP_S = 0.02
"""What a step counts as where a policy wants seconds."""
MANY_RESIDENTS = 250
"""With so many in memory a step's cost is kept apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """What differs between the engines of one comparison."""

    scheduler: str
    """A policy's name, or `fcfs` for vLLM's own scheduler."""
    batch_size: int = 4
    max_residents: int = 256
    num_blocks: int = 2048
    host_kv_bytes: int = 0
    """Above 0: a host tier."""


def engine_arguments(model: str, choice: EngineChoice) -> dict[str, Any]:
    is_stock = choice.scheduler == "fcfs"
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 512,
        "block_size": BLOCK_SIZE_TOKENS,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": choice.batch_size if is_stock else choice.max_residents,
        "kv_cache_memory_bytes": 256 << 20,
        "num_gpu_blocks_override": choice.num_blocks + 1,
        "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
        "worker_cls": "baton.engine.vllm.cpu_worker.BatonCPUWorker",
        "disable_log_stats": True,
    }
    if not is_stock:
        arguments["scheduler_cls"] = "benchmarks.step_clock_scheduler.StepClockScheduler"
        arguments["additional_config"] = {
            "baton_scheduler": {"policy": choice.scheduler, "max_batch_size": choice.batch_size}
        }
    if choice.host_kv_bytes:
        from vllm.config import KVTransferConfig

        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector="HostSwapConnector",
            kv_connector_module_path="baton.engine.vllm.host_swap",
            kv_role="kv_both",
            kv_connector_extra_config={"host_kv_bytes": choice.host_kv_bytes},
        )
    return arguments


def play(engine: Any, trace: list[list[int]], run: int) -> dict[str, Any]:
    """Serve one trace to its end."""
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    scheduler = engine.engine_core.engine_core.scheduler
    randomness = random.Random(run)
    prompts = [[randomness.randrange(300, 1500) for _ in range(job[1])] for job in trace]
    outputs: list[list[int]] = [[] for _ in trace]
    finished: list[int] = [0] * len(trace)
    first: list[int] = [0] * len(trace)
    last: list[int] = [job[0] for job in trace]
    max_gap = 0
    num_steps = clock = next_job = max_batch = 0
    num_scheduled_tokens = 0
    costs_s: list[float] = []
    costs_with_many_s: list[float] = []
    step_costs_s: list[float] = []
    stock_schedule = scheduler.schedule

    def timed_schedule(*arguments: Any, **named: Any) -> Any:
        nonlocal max_batch, num_scheduled_tokens
        has_many = len(scheduler.running) >= MANY_RESIDENTS
        started_s = time.process_time()
        result = stock_schedule(*arguments, **named)
        costs_s.append(time.process_time() - started_s)
        if has_many:
            costs_with_many_s.append(costs_s[-1])
        max_batch = max(max_batch, len(result.num_scheduled_tokens))
        num_scheduled_tokens += result.total_num_scheduled_tokens
        return result

    scheduler.schedule = timed_schedule
    num_preemptions: dict[str, int] = {}
    while next_job < len(trace) or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            clock = max(clock, trace[next_job][0])
        while next_job < len(trace) and trace[next_job][0] <= clock:
            params = SamplingParams(
                max_tokens=trace[next_job][2],
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(f"{run}-{next_job}", tokens_input(prompts[next_job]), params)
            next_job += 1
        for request in scheduler.requests.values():
            num_preemptions[request.request_id] = request.num_preemptions
        clock += 1
        num_steps += 1
        step_started_s = time.process_time()
        stepped = engine.step()
        step_costs_s.append(time.process_time() - step_started_s)
        for output in stepped:
            index = int(output.request_id.split("-")[1])
            outputs[index].extend(output.outputs[0].token_ids)
            if output.outputs[0].token_ids:
                first[index] = first[index] or clock
                max_gap = max(max_gap, clock - last[index])
                last[index] = clock
            if output.finished:
                finished[index] = clock
    scheduler.schedule = stock_schedule
    engine.reset_prefix_cache()
    jct = [end - job[0] for end, job in zip(finished, trace, strict=True)]
    num_output = sum(map(len, outputs))
    return {
        "jct": jct,
        "ttft": [start - job[0] for start, job in zip(first, trace, strict=True)],
        "num_steps": num_steps,
        "max_batch": max_batch,
        "max_gap": max_gap,
        "outputs": outputs,
        "num_output_tokens": num_output,
        "num_scheduled_tokens": num_scheduled_tokens,
        "num_recomputed_tokens": num_scheduled_tokens
        - num_output
        - sum(job[1] for job in trace)
        + len(trace),
        "max_preemptions": max(num_preemptions.values(), default=0),
        "num_preemptions": sum(num_preemptions.values()),
        "schedule_ms_p50": 1000 * statistics.median(costs_s),
        "schedule_ms_with_many": [1000 * cost_s for cost_s in costs_with_many_s],
        "step_ms_p50": 1000 * statistics.median(step_costs_s),
        "host": scheduler._host.counters() if getattr(scheduler, "_host", None) else None,
        "num_stalls": getattr(scheduler, "_num_stalls", 0),
    }


def main(arguments: list[str]) -> int:
    model, choice = arguments[0], EngineChoice(**json.loads(arguments[1]))
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "KMP_BLOCKTIME": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    # Results own the real standard output; whatever libraries print goes to the log.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(model, choice)))
    play(engine, [[0, 40, 8]] * 6, run=-1)  # kernels are loaded by the first requests
    for run, trace in enumerate(json.load(sys.stdin)):
        print(json.dumps({"choice": asdict(choice)} | play(engine, trace, run)), file=results, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
