"""A prefill and a decode worker in one process that answer at once: the door's counterpart of the
C mock backend, speaking Baton's ZeroMQ contract.

    python -m benchmarks.instant_worker --coordinator HOST:PORT [--tick-us N]

Prefill legs are answered as they arrive, with a KV source shaped like NIXL's (block ids in
proportion to the prompt). Decode legs get one token per engine step, all legs of a step in one
message. A step happens every --tick-us, by the same kernel timer as the C backend's (the event
loop's own timers are too coarse and may fire early); with 0, as soon as the messages at hand have
been read.
Nothing is computed and nothing is checked: its CPU is printed apart and is not the coordinator's,
but whatever time it takes is inside Baton's measured latency.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import time
import uuid

import uvloop

from baton.contract.codec import PROTOCOL_VERSION, coordinator_messages, encode
from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import PHASES, WorkerRole
from baton.contract.messages import (
    AbortLeg,
    Heartbeat,
    KvLayout,
    KvSource,
    LegFailed,
    Message,
    PrefillFinished,
    RegisterAgain,
    RegisterWorker,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    WorkerAccepted,
    WorkerCapacity,
    WorkerLoad,
    WorkerRefused,
)
from baton.contract.tokens import num_token_ids
from baton.wire.channels import DealerChannel
from baton.wire.endpoints import DEFAULT_FLEET_PORT, parse_address, tcp

BLOCK_SIZE_TOKENS = 32
KV_BYTES_PER_BLOCK = 262_144
NUM_BLOCKS = 4_000_000
TOKEN_ID = 1000
TOKEN_TEXT = " token"


class InstantWorker:
    """One role's connection. Prefill answers in place; decode legs wait for `step`."""

    def __init__(self, role: WorkerRole, address: str, model: str, tick_us: int) -> None:
        self._role = role
        self._model = model
        self._tick_us = tick_us
        self._channel = DealerChannel(self._on_frames)
        self._channel.connect(address)
        self._tokens_left: dict[str, int] = {}
        self._step_handle: asyncio.Handle | None = None
        self._boot_id = uuid.uuid4().hex

    async def run(self) -> None:
        self._channel.start()
        if self._tick_us:
            timer = periodic_timer(self._tick_us)
            asyncio.get_running_loop().add_reader(timer, self._on_tick, timer)
        self._register()
        while True:
            await asyncio.sleep(0.5)
            self._send(Heartbeat(load=self._load(), num_legs=len(self._tokens_left)))

    def _send(self, message: Message) -> None:
        self._channel.send(encode(message))

    def _load(self) -> WorkerLoad:
        return WorkerLoad(num_running=len(self._tokens_left), num_free_blocks=NUM_BLOCKS)

    def _register(self) -> None:
        layout = KvLayout(
            model=self._model, engine="instant", transfer="none", dtype="float32", num_layers=4,
            num_kv_heads=4, head_dim=32, block_size_tokens=BLOCK_SIZE_TOKENS,
        )  # fmt: skip
        capacity = WorkerCapacity(
            num_blocks=NUM_BLOCKS, max_batch_size=4096, max_model_len=200_000,
            kv_bytes_per_block=KV_BYTES_PER_BLOCK,
        )  # fmt: skip
        registration = RegisterWorker(
            protocol_version=PROTOCOL_VERSION, worker_id=f"instant-{self._role.value}",
            boot_id=self._boot_id, role=self._role, layout=layout, capacity=capacity,
            tensor_parallel_size=1, pipeline_parallel_size=1, transfer_endpoint="127.0.0.1:0",
            host="127.0.0.1", pid=os.getpid(),
        )  # fmt: skip
        self._send(registration)

    def _on_frames(self, frames: list[bytes]) -> None:
        message = coordinator_messages.decode(frames[-1])
        match message:
            case StartPrefill():
                self._prefill(message)
            case StartDecode():
                self._tokens_left[message.handoff_id] = message.sampling.max_tokens
                self._step_soon()
            case AbortLeg(handoff_id=handoff_id):
                if self._tokens_left.pop(handoff_id, None) is not None:
                    error = ErrorReport(code="aborted", message="aborted on request")
                    self._send(LegFailed(handoff_id=handoff_id, error=error))
            case RegisterAgain():
                self._register()
            case WorkerAccepted():
                print(f"accepted role={self._role.value}", flush=True)
            case WorkerRefused(error=error):
                raise SystemExit(f"refused: {error.message}")
            case _:
                pass

    def _prefill(self, message: StartPrefill) -> None:
        num_tokens = num_token_ids(message.prompt_token_ids)
        num_blocks = -(-num_tokens // BLOCK_SIZE_TOKENS)
        source = KvSource(
            lease_s=30.0,
            num_tokens=num_tokens,
            num_bytes=num_blocks * KV_BYTES_PER_BLOCK,
            transfer_params={
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": self._boot_id,
                "remote_request_id": message.handoff_id,
                "remote_host": "127.0.0.1",
                "remote_port": 5801,
                "tp_size": 1,
                "remote_block_ids": [list(range(1000, 1000 + num_blocks))],
            },
        )
        is_whole_answer = not message.keep_kv
        self._send(
            PrefillFinished(
                delta=SequenceDelta(
                    message.handoff_id, [TOKEN_ID], TOKEN_TEXT, "length" if is_whole_answer else None,
                    num_cached_tokens=0,
                ),
                kv_source=None if is_whole_answer else source,
                queue_s=0.0,
                prefill_s=0.0,
                load=self._load(),
            )
        )  # fmt: skip

    def _on_tick(self, timer: int) -> None:
        os.read(timer, 8)  # ticks that were missed are not made up for
        if self._tokens_left:
            self._step()

    def _step_soon(self) -> None:
        if not self._tick_us and self._step_handle is None and self._tokens_left:
            self._step_handle = asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._step_handle = None
        deltas = []
        for handoff_id, num_left in list(self._tokens_left.items()):
            if num_left > 1:
                self._tokens_left[handoff_id] = num_left - 1
                deltas.append(SequenceDelta(handoff_id, [TOKEN_ID], TOKEN_TEXT))
            else:
                del self._tokens_left[handoff_id]
                deltas.append(
                    SequenceDelta(handoff_id, [TOKEN_ID], TOKEN_TEXT, "length", num_cached_tokens=0)
                )
        self._send(StepOutputs(deltas=deltas, load=self._load()))
        self._step_soon()


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("interval", _Timespec), ("value", _Timespec)]


def periodic_timer(period_us: int) -> int:
    """A timerfd that becomes readable every `period_us` (Python's own arrives with 3.13)."""
    libc = ctypes.CDLL(None, use_errno=True)
    timer = int(libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
    period = _Timespec(period_us // 1_000_000, period_us % 1_000_000 * 1000)
    if timer < 0 or libc.timerfd_settime(timer, 0, ctypes.byref(_Itimerspec(period, period)), None) < 0:
        raise OSError(ctypes.get_errno(), "no periodic timer")
    return timer


async def serve(address: str, model: str, tick_us: int) -> None:
    host, port = parse_address(address, DEFAULT_FLEET_PORT)
    workers = [InstantWorker(role, tcp(host, port), model, tick_us) for role in PHASES]
    await asyncio.gather(*(worker.run() for worker in workers))


def main() -> None:
    parser = argparse.ArgumentParser(description="A prefill and a decode worker that answer at once.")
    parser.add_argument("--coordinator", required=True, metavar="HOST:PORT")
    parser.add_argument("--model", default="instant")
    parser.add_argument("--tick-us", type=int, default=0)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # die with the benchmark
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    uvloop.run(serve(arguments.coordinator, arguments.model, arguments.tick_us))


if __name__ == "__main__":
    main()
