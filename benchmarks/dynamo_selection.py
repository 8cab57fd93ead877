"""Dynamo's SelectionService as a subject of `routing_decision`: run by the peer's own Python.

One JSON command per line in, one JSON answer per line out:

    {"setup": [num_workers, block_size, num_blocks]}     every worker holds the whole prompt
    {"select": num_calls, "is_hit": true}                CPU of all threads, and wall, per call

The workers' KV events come from one ZeroMQ PUB that all of them subscribe to, in vLLM's format.
Needs ai-dynamo-runtime, pyzmq and msgspec; imports nothing of Baton.
"""

import asyncio
import json
import random
import sys
import time
from typing import Any

import msgspec
import zmq
from dynamo._core import SelectionService  # type: ignore[import-not-found]

MODEL = "m"


def prompt(num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(128_000) for _ in range(num_tokens)]


class Subject:
    def __init__(self) -> None:
        self.service: Any = None
        self.context = zmq.Context()
        self.publisher: Any = None

    async def setup(self, num_workers: int, block_size: int, num_blocks: int) -> None:
        if self.service is not None:
            self.service.shutdown()
            self.publisher.close(0)
        self.publisher = self.context.socket(zmq.PUB)
        self.publisher.setsockopt(zmq.SNDHWM, 0)
        port = self.publisher.bind_to_random_port("tcp://127.0.0.1")
        self.service = SelectionService()
        self.num_tokens = num_blocks * block_size + 1
        for worker_id in range(num_workers):
            await self.service.upsert_worker(
                {
                    "worker_id": worker_id,
                    "endpoint": f"http://127.0.0.1:{20000 + worker_id}",
                    "model_name": MODEL,
                    "block_size": block_size,
                    "kv_events_endpoint": f"tcp://127.0.0.1:{port}",
                }
            )
        tokens = prompt(num_blocks * block_size, 1)
        event = {
            "type": "BlockStored",
            "block_hashes": [random.Random(i).getrandbits(63) for i in range(num_blocks)],
            "parent_block_hash": None,
            "token_ids": tokens,
            "block_size": block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }
        asked = {"model_name": MODEL, "token_ids": [*tokens, 1]}
        deadline = time.monotonic() + 60
        sequence = 0
        while True:  # a PUB forgets what it says before its subscribers are there
            batch = msgspec.msgpack.encode([time.time(), [event], 0])
            self.publisher.send_multipart([b"", sequence.to_bytes(8, "big"), batch])
            sequence += 1
            await asyncio.sleep(0.5)
            answer = await self.service.overlap_scores(asked)
            if json.dumps(answer).count(f'"device_blocks": {num_blocks},') >= num_workers:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"not all of {num_workers} workers hold the prompt: {str(answer)[:400]}")

    async def select(self, num_calls: int, is_hit: bool) -> dict[str, Any]:
        tokens = [*prompt(self.num_tokens - 1, 1), 1] if is_hit else prompt(self.num_tokens, 2)
        asked = {"model_name": MODEL, "token_ids": tokens}
        for _ in range(5):
            await self.service.select(asked)
        walls = []
        cpu_s = time.process_time()
        for _ in range(num_calls):
            start_s = time.perf_counter()
            answer = await self.service.select(asked)
            walls.append(time.perf_counter() - start_s)
        cpu_s = time.process_time() - cpu_s
        walls.sort()
        return {
            "cpu_us": cpu_s / num_calls * 1e6,
            "p50_us": walls[num_calls // 2] * 1e6,
            "p99_us": walls[int(num_calls * 0.99)] * 1e6,
            "hit_blocks": answer["overlap"]["longest_matched"],
        }


async def main() -> None:
    subject = Subject()
    for line in sys.stdin:
        command = json.loads(line)
        if "setup" in command:
            await subject.setup(*command["setup"])
            answer: dict[str, Any] = {}
        else:
            answer = await subject.select(command["select"], command["is_hit"])
        print(json.dumps(answer), flush=True)


asyncio.run(main())
