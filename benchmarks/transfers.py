"""The worst of many hand-offs between two real engines: does KV ever arrive late?

    python benchmarks/transfers.py                     1,000 on an idle and 1,000 on a loaded machine
    python benchmarks/transfers.py --conditions idle --num-transfers 100 --json

One prefill and one decode engine; each hand-off is a new random prompt, one after the other. Reported
per condition: the hand-off (prefill finished → decode worker's first token, so the decode step and
everything between is in it), the transfer alone (NIXL's own stopwatch), and how many took more than
a second. `loaded` puts busy loops beside the engines, two for each core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import KvEvent, SequenceDelta, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.demo_model import build_demo_model
from baton.engine.base import FinishedPrefill
from baton.engine.vllm.engine import VllmEngine
from baton.engine.vllm.settings import VllmEngineSettings
from baton.process_guard import ProcessIdentity

STALL_S = 1.0
BURNERS_PER_CORE = 2
BURNER = (
    "import sys; from baton.process_guard import ProcessIdentity, die_with;"
    "die_with(ProcessIdentity(pid=int(sys.argv[1]), start_ticks=int(sys.argv[2])))\n"
    "while True: pass"
)


@dataclass(frozen=True)
class Spread:
    p50_ms: float
    p99_ms: float
    worst_ms: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        ordered = sorted(seconds)
        p50_ms, p99_ms, worst_ms = (
            round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 2)
            for share in (0.5, 0.99, 1.0)
        )
        return cls(p50_ms=p50_ms, p99_ms=p99_ms, worst_ms=worst_ms)


@dataclass(frozen=True)
class Report:
    condition: str
    num_transfers: int
    num_prompt_tokens: int
    prefill: Spread
    handoff: Spread
    transfer: Spread
    num_stalls: int
    """Hand-offs of more than a second."""
    num_failures: int
    load_average: float
    num_cores: int
    is_progress_thread_enabled: bool


class Legs:
    """Resolves a future per leg: at its first token, or its end."""

    def __init__(self) -> None:
        self._futures: dict[str, asyncio.Future[FinishedPrefill | SequenceDelta | ErrorReport]] = {}

    def expect(self, handoff_id: str) -> asyncio.Future[FinishedPrefill | SequenceDelta | ErrorReport]:
        self._futures[handoff_id] = asyncio.get_running_loop().create_future()
        return self._futures[handoff_id]

    def on_step(self, deltas: list[SequenceDelta]) -> None:
        for delta in deltas:
            self._resolve(delta.handoff_id, delta)

    def on_kv_events(self, events: list[KvEvent]) -> None:
        return

    def on_prefill_finished(self, finished: FinishedPrefill) -> None:
        self._resolve(finished.delta.handoff_id, finished)

    def on_leg_failed(self, handoff_id: str, error: ErrorReport) -> None:
        self._resolve(handoff_id, error)

    def on_engine_dead(self, reason: str) -> None:
        raise SystemExit(reason)

    def _resolve(self, handoff_id: str, result: FinishedPrefill | SequenceDelta | ErrorReport) -> None:
        if future := self._futures.pop(handoff_id, None):
            future.set_result(result)


@contextmanager
def load_beside(num_burners: int) -> Iterator[None]:
    me = ProcessIdentity.current()
    command = [sys.executable, "-c", BURNER, str(me.pid), str(me.start_ticks)]
    # In our own session: Linux shares time between sessions first, and these should really compete.
    burners = [subprocess.Popen(command) for _ in range(num_burners)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


async def measure(arguments: argparse.Namespace, model: Path) -> list[Report]:
    transfers_s: list[float] = []
    legs = Legs()
    settings = {
        "model": str(model),
        "max_model_len": arguments.prompt_tokens + 64,
        "is_progress_thread_enabled": arguments.progress_thread,
        "kv_cache_bytes": 256 << 20,
        "kv_load_failure_policy": "fail",  # a recomputed prompt would hide a transfer that failed
    }
    prefill = VllmEngine(VllmEngineSettings(role=WorkerRole.PREFILL, **settings))
    decode = VllmEngine(
        VllmEngineSettings(role=WorkerRole.DECODE, **settings), on_transfer=transfers_s.append
    )
    rng = random.Random(1)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    num_done = 0

    async def hand_off() -> tuple[float, float, bool]:
        nonlocal num_done
        num_done += 1
        handoff_id = f"h{num_done}"
        prompt = [rng.randrange(vocabulary) for _ in range(arguments.prompt_tokens)]
        sampling = SamplingSpec(max_tokens=2, temperature=0.0, ignore_eos=True)
        started_s = time.perf_counter()
        future = legs.expect(handoff_id)
        prefill.start_prefill(
            StartPrefill(
                handoff_id=handoff_id,
                request_id=handoff_id,
                prompt_token_ids=pack_token_ids(prompt),
                sampling=sampling,
                keep_kv=True,
            )
        )
        finished = await future
        if not isinstance(finished, FinishedPrefill):
            raise SystemExit(f"prefill failed: {finished}")
        prefilled_s = time.perf_counter()
        future = legs.expect(handoff_id)
        decode.start_decode(
            StartDecode(
                handoff_id=handoff_id,
                request_id=handoff_id,
                prompt_token_ids=pack_token_ids([*prompt, *finished.delta.token_ids]),
                sampling=SamplingSpec(max_tokens=1, temperature=0.0, ignore_eos=True),
                kv_source=finished.kv_source,
            )
        )
        result = await future
        ended_s = time.perf_counter()
        return prefilled_s - started_s, ended_s - prefilled_s, isinstance(result, SequenceDelta)

    reports = []
    try:
        await prefill.start(legs)
        await decode.start(legs)
        for _ in range(10):  # the first hand-off shakes hands
            await hand_off()
        for condition in arguments.conditions:
            num_cores = os.cpu_count() or 1
            with load_beside(BURNERS_PER_CORE * num_cores if condition == "loaded" else 0):
                transfers_s.clear()
                results = [await hand_off() for _ in range(arguments.num_transfers)]
                load_average = os.getloadavg()[0]
            reports.append(
                Report(
                    condition=condition,
                    num_transfers=len(results),
                    num_prompt_tokens=arguments.prompt_tokens,
                    prefill=Spread.of([prefill_s for prefill_s, _, _ in results]),
                    handoff=Spread.of([handoff_s for _, handoff_s, _ in results]),
                    transfer=Spread.of(list(transfers_s) or [0.0]),
                    num_stalls=sum(handoff_s > STALL_S for _, handoff_s, _ in results),
                    num_failures=sum(not is_good for _, _, is_good in results),
                    load_average=round(load_average, 2),
                    num_cores=num_cores,
                    is_progress_thread_enabled=arguments.progress_thread,
                )
            )
            if not arguments.json:
                show(reports[-1])
    finally:
        await prefill.stop()
        await decode.stop()
    return reports


def show(report: Report) -> None:
    print(
        f"\n{report.condition}: {report.num_transfers} hand-offs of {report.num_prompt_tokens} tokens, "
        f"load average {report.load_average} on {report.num_cores} cores, progress thread "
        f"{'on' if report.is_progress_thread_enabled else 'off'}"
    )
    for name in ("prefill", "handoff", "transfer"):
        spread: Spread = getattr(report, name)
        figures = (
            f"p50 {spread.p50_ms:8.2f} ms   p99 {spread.p99_ms:8.2f} ms   worst {spread.worst_ms:8.2f} ms"
        )
        print(f"  {name:9} {figures}")
    print(f"  more than {STALL_S:.0f} s: {report.num_stalls}   failed: {report.num_failures}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="the worst of many hand-offs between two real engines")
    parser.add_argument("--num-transfers", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--conditions", nargs="+", choices=["idle", "loaded"], default=["idle", "loaded"])
    parser.add_argument(
        "--model", type=Path, help="a local model folder (default: the demo model, made anew)"
    )
    parser.add_argument(
        "--progress-thread", action="store_true", help="with NIXL's polling thread, as stock vLLM"
    )
    parser.add_argument("--json", action="store_true", help="print the reports as JSON and nothing else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or build_demo_model(Path(folder) / "demo")
        reports = asyncio.run(measure(arguments, model))
    if arguments.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    return 1 if any(report.num_failures for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
