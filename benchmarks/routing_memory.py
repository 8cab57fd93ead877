"""`bench.sh routing`, rows `memory`: does what the coordinator remembers of prefixes stop growing?

    python -m benchmarks.routing_memory --requests 1200000

The coordinator's real core in a process of its own, driven with facts as the sockets would: every
request has a prompt nobody had before, its blocks are announced, and removed when the worker's cache
is full; now and then a worker leaves and another one comes. Prints samples of the resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import deque
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from baton.contract.codec import PROTOCOL_VERSION
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    BlocksRemoved,
    BlocksStored,
    KvEvent,
    KvEvents,
    KvLayout,
    KvSource,
    Placement,
    PrefillFinished,
    RegisterWorker,
    RequestReport,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    WorkerCapacity,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec
from baton.policy import registry
from baton.policy.kv_index import BYTES_PER_BLOCK
from benchmarks.figures import Bar, Figure, Report
from benchmarks.layout import REPOSITORY
from benchmarks.samples import Spread, spread
from coordinator.actions import Action, Send
from coordinator.core import Core, CoreSettings
from coordinator.intake import Submission

BLOCK = 16
BLOCKS_PER_PROMPT = 2
CACHE_BLOCKS = 10_000
"""Of one worker. All together hold 40,000 different blocks, fewer than the cap allows: what their engines
evict has to leave the index, too."""
CAP_BYTES = 16 << 20
CHURN_EVERY = 5_000
"""Requests between a worker's leaving and the next one's."""
MAX_SLOPE_MIB_PER_MIN = 1.0
WARM_UP_SHARE = 0.4
"""Of the run; until then caches and index fill, for a million prefixes."""


class _Sink:
    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None: ...

    def on_finished(self, report: RequestReport) -> None: ...


class Churn:
    """Requests, one after the other, through a core with four workers of each role."""

    def __init__(self) -> None:
        self._core = Core(
            CoreSettings(kv_index_bytes=CAP_BYTES),
            registry.by_name(registry.DEFAULT_PREFILL),
            registry.by_name(registry.DEFAULT_DECODE),
            "boot",
        )
        self._now_s = 0.0
        self._numbers = count(1)
        self._random = random.Random(1)
        self._sink = _Sink()
        self._caches: dict[str, deque[int]] = {}
        self._sequence: dict[str, int] = {}
        for _ in range(4):
            self._join(WorkerRole.PREFILL)
            self._join(WorkerRole.DECODE)

    @property
    def num_indexed(self) -> int:
        return self._core.prefixes.num_blocks

    def _join(self, role: WorkerRole) -> None:
        name = f"{role.value}-{next(self._numbers)}"
        message = RegisterWorker(
            protocol_version=PROTOCOL_VERSION,
            worker_id=name,
            boot_id=name,
            role=role,
            layout=KvLayout(
                model="m", engine="e", transfer="t", dtype="float32", num_layers=1, num_kv_heads=1,
                head_dim=8, block_size_tokens=BLOCK,
            ),
            capacity=WorkerCapacity(
                num_blocks=CACHE_BLOCKS, max_batch_size=64, max_model_len=8192, kv_bytes_per_block=1024
            ),
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            transfer_endpoint="",
            host="h",
            pid=1,
            has_kv_events=True,
        )  # fmt: skip
        peer = name.encode()
        self._core.fleet.check(message, peer)
        self._core.worker_registered(message, peer, self._now_s)
        self._caches[name], self._sequence[name] = deque(), 0

    def replace_a_worker(self) -> None:
        name = self._random.choice(list(self._caches))
        worker = self._core.fleet.get(name)
        assert worker is not None
        role = worker.registration.role
        self._core.worker_leaving(worker)
        self._core.worker_lost(name, "churn", self._now_s)
        del self._caches[name], self._sequence[name]
        self._join(role)

    def request(self) -> None:
        self._now_s += 0.01
        number = next(self._numbers)
        submission = Submission(
            request_id=f"r{number}",
            prompt_token_ids=self._random.randbytes(4 * (BLOCKS_PER_PROMPT * BLOCK + 1)),
            sampling=SamplingSpec(max_tokens=2),
        )
        self._perform(self._core.submit(submission, self._sink, self._now_s), submission)

    def _perform(self, actions: list[Action], submission: Submission) -> None:
        for action in actions:
            if not isinstance(action, Send):
                continue
            worker = self._core.fleet.get(action.worker_id)
            assert worker is not None
            match action.message:
                case StartPrefill(handoff_id=handoff_id):
                    self._announce(action.worker_id, submission.prompt_token_ids)
                    source = KvSource(lease_s=30.0, num_tokens=33, num_bytes=3072, transfer_params={})
                    finished = PrefillFinished(
                        delta=SequenceDelta(handoff_id, [7], "x", num_cached_tokens=0),
                        kv_source=source, queue_s=0.0, prefill_s=0.01, load=WorkerLoad(),
                    )  # fmt: skip
                    self._perform(self._core.prefill_finished(worker, finished, self._now_s), submission)
                case StartDecode(handoff_id=handoff_id):
                    self._announce(action.worker_id, submission.prompt_token_ids)
                    step = StepOutputs(
                        deltas=[SequenceDelta(handoff_id, [8], "y", "length")], load=WorkerLoad()
                    )
                    self._perform(self._core.step(worker, step, self._now_s), submission)

    def _announce(self, name: str, prompt: bytes) -> None:
        cache = self._caches[name]
        hashes = [self._random.getrandbits(64) for _ in range(BLOCKS_PER_PROMPT)]
        events: list[KvEvent] = [
            BlocksStored(
                block_hashes=hashes, parent_hash=None, token_ids=prompt[: 4 * BLOCKS_PER_PROMPT * BLOCK]
            )
        ]
        cache.extend(reversed(hashes))  # as vLLM: the end of a prompt goes before its beginning
        if len(cache) > CACHE_BLOCKS:
            events.append(BlocksRemoved(block_hashes=[cache.popleft() for _ in hashes]))
        message = KvEvents(sequence=self._sequence[name], events=events, load=WorkerLoad())
        self._sequence[name] += 1
        worker = self._core.fleet.get(name)
        assert worker is not None
        self._core.kv_events(worker, message, self._now_s)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_here(num_requests: int) -> dict[str, Any]:
    before = resident_bytes()
    churn, samples = Churn(), []
    start_s = time.monotonic()
    most_indexed = 0
    for number in range(num_requests):
        churn.request()
        if number % CHURN_EVERY == CHURN_EVERY - 1:
            churn.replace_a_worker()
        if number % 2_000 == 0:
            most_indexed = max(most_indexed, churn.num_indexed)
            samples.append((time.monotonic() - start_s, resident_bytes() - before))
    return {"samples": samples, "most_indexed": most_indexed, "seconds": time.monotonic() - start_s}


def measure(report: Report, *, num_requests: int, is_judged: bool) -> None:
    """Not judged: a run too short to be warm."""
    command = [sys.executable, "-m", "benchmarks.routing_memory", "--requests", str(num_requests)]
    answer = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=600)
    found = json.loads(answer.stdout)
    times, resident = np.array(found["samples"]).T
    is_warm = times > WARM_UP_SHARE * times[-1]
    slope = float(np.polyfit(times[is_warm], resident[is_warm], 1)[0]) * 60 / 2**20
    prefixes = num_requests * BLOCKS_PER_PROMPT
    note = (
        f"{prefixes:,} unique prefixes in {found['seconds']:.0f} s, a worker replaced every {CHURN_EVERY:,} "
        f"requests, index cap {CAP_BYTES >> 20} MiB"
    )
    report.figures += [
        Figure(
            row="memory_slope",
            subject="the coordinator's core after warm-up",
            unit="MiB/min",
            spread=Spread(slope, slope, slope, 1),
            bar=Bar("<=", MAX_SLOPE_MIB_PER_MIN) if is_judged else None,
            note=note,
        ),
        Figure(
            row="memory_resident",
            subject="growth over the empty core",
            unit="MiB",
            spread=spread([float(value) / 2**20 for value in resident[is_warm]]),
            note=f"at most {found['most_indexed']:,} blocks indexed",
        ),
        Figure(row="memory_per_block", subject="index, as accounted", unit="bytes",
               spread=spread([float(BYTES_PER_BLOCK)]), note="a test holds it to tracemalloc"),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing_memory")
    parser.add_argument("--requests", type=int, default=1_200_000)
    print(json.dumps(run_here(parser.parse_args().requests)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
