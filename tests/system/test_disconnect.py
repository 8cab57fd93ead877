"""A client that leaves takes its work with it: both engines have all their KV blocks back in seconds."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.client import AsyncBatonClient
from tests.system.cases import MAX_MODEL_LEN, random_prompt
from tests.system.fleet import Fleet, elapsed, wait_for

FREE_WITHIN_S = 8.0
"""Bounded by the engines' steps, not by the lease of 30 s: that would hide a hold that nobody released."""

MAX_TOKENS = 1500


@pytest.fixture(scope="module")
def simulated_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Prefill and steps take long enough to be left in the middle."""
    fleet = Fleet(tmp_path_factory.mktemp("left"), engine="simulated")
    fleet.start_coordinator()
    worker = ("--max-model-len", "2048", "--num-blocks", "512", "--simulated-step-s", "0.002")
    fleet.start_worker(
        "prefill",
        "prefill-1",
        *worker,
        "--simulated-prefill-tokens-per-s",
        "4000",
        "--simulated-transfer-s",
        "0.1",
    )
    fleet.start_worker("decode", "decode-1", *worker)
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(
    params=["simulated", pytest.param("real", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def fleet(request: pytest.FixtureRequest) -> Fleet:
    fleet: Fleet = request.getfixturevalue(f"{request.param}_fleet")
    fleet.wait_until_idle(40.0)
    return fleet


def _body(seed: object, num_prompt_tokens: int = 200) -> dict[str, Any]:
    prompt = random_prompt(num_prompt_tokens, seed)
    max_tokens = min(MAX_TOKENS, MAX_MODEL_LEN - num_prompt_tokens)
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def _is_decoding(fleet: Fleet) -> bool:
    return bool(fleet.workers()["decode-1"]["load"]["num_running"])


def test_in_the_middle_of_a_stream(fleet: Fleet) -> None:
    stream = fleet.stream("/v1/completions", _body("stream"))
    for _, _event in zip(range(5), stream, strict=False):
        pass
    assert fleet.what_is_held()
    stream.close()
    fleet.wait_until_idle(FREE_WITHIN_S)


def test_while_a_whole_answer_is_generated(fleet: Fleet) -> None:
    with contextlib.closing(begin(fleet, _body("whole"))):
        wait_for("decoding", lambda: _is_decoding(fleet), 20.0)
    fleet.wait_until_idle(FREE_WITHIN_S)


def test_before_the_first_token(fleet: Fleet) -> None:
    """At moments spread over prefill and hand-off: each must find the one who holds something."""
    dice = random.Random(5)
    for number in range(12):
        with contextlib.closing(begin(fleet, _body(f"early {number}", 1500))):
            wait_for("acceptance", lambda: fleet.snapshot()["num_requests"], 20.0)
            wait_for("the moment", elapsed(dice.uniform(0.0, 0.4)), 5.0)
    fleet.wait_until_idle(FREE_WITHIN_S)


def test_several_choices_of_one_request(fleet: Fleet) -> None:
    stream = fleet.stream("/v1/completions", {**_body("choices"), "n": 4, "temperature": 1, "seed": 3})
    for _, _event in zip(range(9), stream, strict=False):
        pass
    stream.close()
    fleet.wait_until_idle(FREE_WITHIN_S)


def test_an_abort_over_zeromq(fleet: Fleet) -> None:
    async def scenario() -> None:
        async with AsyncBatonClient(fleet.client_address, timeout_s=30) as client:
            body = _body("abort")
            stream = client.submit(body.pop("prompt"), **body)
            num_deltas = 0
            async for _ in stream:
                num_deltas += 1
                if num_deltas == 5:
                    stream.abort()
            assert stream.report is not None
            assert stream.report.outcome.value == "aborted"
            assert stream.report.num_output_tokens < MAX_TOKENS

    asyncio.run(scenario())
    fleet.wait_until_idle(FREE_WITHIN_S)


CLIENT = """
import sys
from baton.client import BatonClient
with BatonClient(sys.argv[1]) as client:
    prompt = [int(token) for token in sys.argv[2].split(",")]
    for delta in client.stream(prompt, max_tokens=1500, temperature=0.0, ignore_eos=True):
        print("token", flush=True)
"""


def test_a_zeromq_client_that_is_killed(fleet: Fleet) -> None:
    """Nobody says good-bye for it: its next token finds no connection."""
    prompt = ",".join(map(str, random_prompt(200, "killed")))
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, fleet.client_address, prompt],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert client.stdout is not None
        with client.stdout:
            for _ in range(5):
                assert client.stdout.readline() == b"token\n"
            os.kill(client.pid, signal.SIGKILL)
    finally:
        client.kill()
        client.wait()
    fleet.wait_until_idle(FREE_WITHIN_S)


def begin(fleet: Fleet, body: dict[str, Any]) -> Any:
    """A request whose answer nobody waits for; closing is leaving."""
    connection = http.client.HTTPConnection("127.0.0.1", fleet.http_port, timeout=30)
    connection.request("POST", "/v1/completions", body=json.dumps(body))
    return connection
