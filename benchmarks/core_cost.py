"""What knowing the prefixes costs the coordinator per request, in CPU: its core with and without KV events.

One request after the other goes through the core of a fleet of 8 prefill and 8 decode workers whose engines
answer at once: submit, prefill told, its end heard, decode told, one step that ends it. With events,
every prefill worker tells its new blocks (half of each prompt is new, half is one of 64 shared
beginnings) and the ones they push out. Decoding these messages is inside the clock; sockets are not.

    python -m benchmarks.core_cost [--repeats 5] [--calls 400]

One JSON object per figure: `submit` is what stands between a request and its prefill worker (hash, match,
both choices, accounts), `request` is everything. Measurements only: nothing is judged.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter, deque
from hashlib import blake2b

from baton.contract import codec
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    BlocksRemoved,
    BlocksStored,
    KvEvent,
    KvEvents,
    KvLayout,
    KvSource,
    Message,
    Placement,
    PrefillFinished,
    RegisterWorker,
    RequestReport,
    SequenceDelta,
    StartPrefill,
    StepOutputs,
    WorkerCapacity,
    WorkerLoad,
)
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import TOKEN_BYTES, pack_token_ids
from baton.policy import registry
from benchmarks.samples import spread
from coordinator.actions import Action, Send
from coordinator.core import Core, CoreSettings
from coordinator.intake import Submission

NUM_WORKERS = 8
BLOCK = 16
PROMPT_TOKENS = (1024, 32_768)
NUM_CACHED_BLOCKS = 40_000


class Nobody:
    def on_delta(self, delta: SequenceDelta, placement: Placement) -> None:
        return

    def on_finished(self, report: RequestReport) -> None:
        return


class FakeCache:
    """One prefill engine's blocks; the oldest leave. Equal blocks are copies, as in vLLM."""

    def __init__(self) -> None:
        self.sequence = 0
        self._num_copies: Counter[int] = Counter()
        self._blocks: deque[int] = deque()
        """Physical ones, oldest first; of one prompt the last ones before the first."""

    def compute(self, packed: bytes) -> tuple[list[KvEvent], int]:
        """(what to tell, hit tokens)"""
        size = BLOCK * TOKEN_BYTES
        # A block is named by how the prompt begins and the block ends: prompts here share a whole
        # beginning or nothing.
        names = [
            int.from_bytes(blake2b(packed[:8] + packed[end - 16 : end], digest_size=8).digest())
            for end in range(size, len(packed), size)
        ]
        num_hits = next((i for i, name in enumerate(names) if not self._num_copies[name]), len(names))
        fresh = names[num_hits:]
        self._num_copies.update(fresh)
        self._blocks.extend(fresh[::-1])
        stored = BlocksStored(
            block_hashes=fresh,
            parent_hash=names[num_hits - 1] if num_hits else None,
            token_ids=packed[num_hits * size : len(names) * size],
        )
        gone = [self._blocks.popleft() for _ in range(len(self._blocks) - NUM_CACHED_BLOCKS)]
        self._num_copies.subtract(gone)
        return [stored, BlocksRemoved(block_hashes=gone)], num_hits * BLOCK


class Subject:
    def __init__(self, num_tokens: int, *, has_events: bool) -> None:
        self._has_events = has_events
        self._rng = random.Random(1)
        self._starts = [self._tokens(num_tokens // 2) for _ in range(64)]
        self._num_tokens = num_tokens
        self._caches: dict[str, FakeCache] = {}
        self._num_requests = 0
        self.core = Core(
            CoreSettings(),
            registry.by_name(registry.DEFAULT_PREFILL),
            registry.by_name(registry.DEFAULT_DECODE),
            "b",
        )
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
            for number in range(NUM_WORKERS):
                name = f"{role.value}-{number}"
                self._caches[name] = FakeCache()
                self.core.worker_registered(self._registration(name, role), name.encode(), 0.0)

    def _tokens(self, number: int) -> bytes:
        return pack_token_ids([self._rng.randrange(128_000) for _ in range(number)])

    def _registration(self, name: str, role: WorkerRole) -> RegisterWorker:
        return RegisterWorker(
            protocol_version=codec.PROTOCOL_VERSION, worker_id=name, boot_id=name, role=role,
            layout=KvLayout(model="m", engine="none", transfer="none", dtype="float16", num_layers=32,
                            num_kv_heads=8, head_dim=128, block_size_tokens=BLOCK),
            capacity=WorkerCapacity(num_blocks=100_000, max_batch_size=256, max_model_len=131_072,
                                    kv_bytes_per_block=2 << 20),
            tensor_parallel_size=1, pipeline_parallel_size=1, transfer_endpoint="none:1", host="none", pid=1,
            has_kv_events=self._has_events and role is WorkerRole.PREFILL,
        )  # fmt: skip

    def requests(self, number: int) -> tuple[float, float]:
        """CPU microseconds of the core: per submit, per request."""
        submit_s = cpu_s = 0.0
        for _ in range(number):
            self._num_requests += 1
            name = f"r{self._num_requests}"
            prompt = self._rng.choice(self._starts) + self._tokens(self._num_tokens - self._num_tokens // 2)
            submission = Submission(request_id=name, prompt_token_ids=prompt,
                                    sampling=SamplingSpec(max_tokens=8, temperature=0.0))  # fmt: skip
            now_s = float(self._num_requests)
            start_s = time.process_time()
            actions = self.core.submit(submission, Nobody(), now_s)
            submit_s += time.process_time() - start_s
            worker_id, handoff_id = _started(actions)
            events, num_hits = self._caches[worker_id].compute(prompt)
            sequence = self._caches[worker_id].sequence
            self._caches[worker_id].sequence += 1
            if self._has_events:
                cpu_s += self._hear(worker_id, KvEvents(sequence=sequence, events=events, load=WorkerLoad()))
            cpu_s += self._hear(
                worker_id,
                PrefillFinished(
                    delta=SequenceDelta(handoff_id, [5], "x", None, num_cached_tokens=num_hits),
                    kv_source=KvSource(lease_s=30.0, num_tokens=self._num_tokens, num_bytes=1,
                                       transfer_params={}),
                    queue_s=0.0, prefill_s=0.0, load=WorkerLoad(),
                ),
            )  # fmt: skip
            last = SequenceDelta(handoff_id, [6], "y", "stop")
            cpu_s += self._hear(self._decode_worker, StepOutputs(deltas=[last], load=WorkerLoad()))
        assert self.core.num_requests == 0
        return submit_s / number * 1e6, (submit_s + cpu_s) / number * 1e6

    def _hear(self, worker_id: str, message: Message) -> float:
        frame = codec.encode(message)
        worker = self.core.fleet.get(worker_id)
        assert worker is not None
        now_s = float(self._num_requests)
        start_s = time.process_time()
        heard = codec.worker_messages.decode(frame)
        actions: list[Action] = []
        if isinstance(heard, KvEvents):
            actions = self.core.kv_events(worker, heard, now_s)
        elif isinstance(heard, PrefillFinished):
            actions = self.core.prefill_finished(worker, heard, now_s)
        elif isinstance(heard, StepOutputs):
            actions = self.core.step(worker, heard, now_s)
        cpu_s = time.process_time() - start_s
        for action in actions:
            if isinstance(action, Send):
                self._decode_worker = action.worker_id
        return cpu_s


def _started(actions: list[Action]) -> tuple[str, str]:
    (send,) = (action for action in actions if isinstance(action, Send))
    assert isinstance(send.message, StartPrefill)
    return send.worker_id, send.message.handoff_id


def _show(name: str, values: list[float]) -> None:
    found = spread(values)
    figure = {
        "name": name, "value": round(found.median, 1), "unit": "us",
        "low": round(found.low, 1), "high": round(found.high, 1), "repeats": found.num_repeats,
    }  # fmt: skip
    print(json.dumps(figure), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core_cost")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400, help="requests per repeat")
    options = parser.parse_args(argv)
    for num_tokens in PROMPT_TOKENS:
        blind, knowing = (Subject(num_tokens, has_events=has_events) for has_events in (False, True))
        pairs = []
        for _ in range(options.repeats + 1):
            pairs.append((blind.requests(options.calls), knowing.requests(options.calls)))
        del pairs[0]  # the first fills the caches
        for part, name in enumerate(("submit", "request")):
            before = [pair[0][part] for pair in pairs]
            after = [pair[1][part] for pair in pairs]
            more = [b - a for a, b in zip(before, after, strict=True)]
            cell = f"{name}_cpu_{num_tokens}_tokens"
            _show(f"{cell}_without_events", before)
            _show(f"{cell}_with_events", after)
            _show(f"{cell}_more", more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
