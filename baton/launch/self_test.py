"""One request through the HTTP door of a running fleet, and the proof that its KV moved.

The prompt is random token ids, so that no prefix cache can answer it, and a little more than three
blocks long, so that full and partial blocks both travel. Afterwards the decode workers must have
received exactly blocks x bytes per block: fewer would mean that a worker computed the prompt
itself, which gives the right answer and hides that nothing was disaggregated. Only where the answer says
that one worker for both phases served it, none are expected.
"""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from baton.contract.lifecycle import Way

NUM_FULL_BLOCKS = 3
NUM_EXTRA_TOKENS = 5
NUM_OUTPUT_TOKENS = 8
FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 999
"""Ordinary words in every vocabulary we know, the demo model's small one included."""

REQUEST_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 10.0
"""Byte counts travel with heartbeats, so they may come a moment after the answer."""


class SelfTestFailed(Exception):
    """A sentence with the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestResult:
    num_prompt_tokens: int
    num_output_tokens: int
    num_blocks: int
    """That moved; 0 where one worker served both phases."""
    kv_bytes: int
    request_s: float

    def sentence(self) -> str:
        answered = (
            f"{self.num_prompt_tokens} prompt tokens in, {self.num_output_tokens} tokens out in "
            f"{self.request_s:.2f} s; "
        )
        if not self.num_blocks:
            return answered + "one worker served both phases, so no KV moved"
        return answered + f"KV moved: {self.kv_bytes} bytes in {self.num_blocks} blocks"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSide:
    """What the coordinator's GET /fleet says of the workers that decode."""

    block_size_tokens: int
    kv_bytes_per_block: int
    num_kv_bytes_received: int

    @classmethod
    def from_fleet(cls, fleet: dict[str, Any]) -> DecodeSide:
        workers = [worker for worker in fleet["workers"] if worker["role"] in ("decode", "both")]
        if not workers:
            raise SelfTestFailed("the fleet has no worker that decodes")
        return cls(
            block_size_tokens=workers[0]["layout"]["block_size_tokens"],
            kv_bytes_per_block=workers[0]["capacity"]["kv_bytes_per_block"],
            num_kv_bytes_received=sum(worker["load"]["num_kv_bytes_received"] for worker in workers),
        )


class FleetHttp:
    """The few calls this check needs, without a client library."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        self._base_url = base_url
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        # A proxy from the environment has no business between us and our own coordinator.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_ready(self) -> bool:
        """`/ready` says 200, and every worker that joined gets requests. No connection and 503 both mean: not
        yet."""
        try:
            self._call("/ready", None, timeout_s=5.0)
            return not any(worker["is_on_trial"] for worker in self.get("/fleet")["workers"])
        except (SelfTestFailed, OSError):
            return False

    def get(self, path: str) -> dict[str, Any]:
        return self._call(path, None, timeout_s=10.0)[0]

    def post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """(the answer, the way it took: see `x-baton-way` in docs/routing.md)"""
        return self._call(path, body, timeout_s=REQUEST_TIMEOUT_S)

    def _call(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[dict[str, Any], str]:
        data = None if body is None else json.dumps(body).encode("utf-8")
        request = urllib.request.Request(self._base_url + path, data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                answer: dict[str, Any] = json.load(response)
                return answer, response.headers.get("x-baton-way", "")
        except urllib.error.HTTPError as error:
            detail = error.read(2000).decode("utf-8", errors="replace")
            raise SelfTestFailed(f"{path} answered {error.code}: {detail}") from error


def run_self_test(http: FleetHttp) -> SelfTestResult:
    """Raises SelfTestFailed, or OSError when the door cannot be reached."""
    model = http.get("/v1/models")["data"][0]["id"]
    before = DecodeSide.from_fleet(http.get("/fleet"))
    num_prompt_tokens = NUM_FULL_BLOCKS * before.block_size_tokens + NUM_EXTRA_TOKENS
    prompt = [random.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(num_prompt_tokens)]
    started_s = time.monotonic()
    answer, way = http.post(
        "/v1/completions",
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": NUM_OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        },
    )
    request_s = time.monotonic() - started_s
    check_usage(answer.get("usage") or {}, num_prompt_tokens)
    # The extra tokens fill one more in part.
    num_blocks = 0 if way.startswith(Way.COLOCATED.value) else NUM_FULL_BLOCKS + 1
    kv_bytes = _bytes_received(http, before, num_blocks)
    return SelfTestResult(
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=NUM_OUTPUT_TOKENS,
        num_blocks=num_blocks,
        kv_bytes=kv_bytes,
        request_s=request_s,
    )


def check_usage(usage: dict[str, Any], num_prompt_tokens: int) -> None:
    expected = {"prompt_tokens": num_prompt_tokens, "completion_tokens": NUM_OUTPUT_TOKENS}
    for key, value in expected.items():
        if usage.get(key) != value:
            raise SelfTestFailed(f"the answer's usage says {key} {usage.get(key)}, expected {value}")


def _bytes_received(http: FleetHttp, before: DecodeSide, num_blocks: int) -> int:
    expected_bytes = num_blocks * before.kv_bytes_per_block
    deadline_s = time.monotonic() + REPORT_TIMEOUT_S
    while True:
        after = DecodeSide.from_fleet(http.get("/fleet"))
        received_bytes = after.num_kv_bytes_received - before.num_kv_bytes_received
        if received_bytes == expected_bytes:
            return received_bytes
        if time.monotonic() > deadline_s:
            raise SelfTestFailed(
                f"the decode workers received {received_bytes} bytes of KV for this prompt, expected "
                f"{expected_bytes} ({num_blocks} blocks of {before.kv_bytes_per_block} bytes)"
            )
        time.sleep(0.1)
