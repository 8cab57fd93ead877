"""Request bodies, and the compiled tools against each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import load, servers
from benchmarks.load import completion_body, ids_prompt, text_prompt


def filled(body: bytes) -> dict[str, object]:
    """A body as the load generator sends it, all marks replaced by the same digits."""
    for mark, digit in ((b"\x01", b"a"), (b"\x02", b"7"), (b"\x03", b"1")):
        body = body.replace(mark, digit)
    parsed: dict[str, object] = json.loads(body)
    return parsed


def test_ids_differ_in_the_middle_only():
    body = completion_body(ids_prompt(1000), model="m", max_tokens=1, stream=True)
    assert body.count(b"\x02") == 12 and body.count(b"\x03") == 4  # four ids of four digits
    prompt = filled(body)["prompt"]
    assert isinstance(prompt, list) and len(prompt) == 1000
    assert prompt[498:502] == [1777] * 4
    assert all(1000 <= token_id <= 3999 for token_id in prompt)


def test_fully_random_ids_stay_in_a_small_vocabulary():
    prompt = filled(completion_body(ids_prompt(512, all_unique=True), model="m", max_tokens=1, stream=True))
    assert prompt["prompt"] == [1777] * 512


def test_text_has_the_length_asked_for():
    prompt = filled(completion_body(text_prompt(4000), model="m", max_tokens=1, stream=False))["prompt"]
    assert isinstance(prompt, str) and len(prompt) == 4000
    assert prompt[1992:2008] == "a" * 16


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(load, "BINARIES", tmp_path / "bin")
    monkeypatch.setattr(load, "SCRATCH", tmp_path / "run")
    monkeypatch.setattr(servers, "SCRATCH", tmp_path / "run")
    load.compile_tools()
    return tmp_path / "bin"


def test_the_tools_agree_on_what_was_sent(tools: Path):
    """
    1. streams: every request brings its tokens, one event each
    2. a paced stream takes its steps' time
    3. plain answers, open loop: as many as were due
    4. the prefill port answers one token whatever was asked
    """
    prefill, decode = servers.free_port(), servers.free_port()
    argv = [tools / "mock_backend", "--prefill-port", prefill, "--decode-port", decode, "--tick-us", 2000]
    with servers.Server("mock", argv) as mock:
        mock.wait_until(servers.accepts(decode), 10.0, "no listening socket")

        streams = completion_body(ids_prompt(100), model="m", max_tokens=20, stream=True)
        result = load.run_load(decode, streams, concurrency=8, num_requests=24)
        assert (result.num_requests, result.num_errors, result.num_events) == (24, 0, 480)  # 24 * 20
        assert result.total_ms["p50"] > 19 * 2.0 * 0.9  # 19 steps after the first token
        assert result.num_stalls == 0

        plain = completion_body(text_prompt(4000), model="m", max_tokens=2, stream=False)
        result = load.run_load(decode, plain, rate_per_s=200.0, num_requests=50)
        assert (result.num_requests, result.num_errors, result.num_events) == (50, 0, 0)
        assert 0.0 < result.first_ms["p50"] <= result.total_ms["p50"]

        result = load.run_load(prefill, streams, concurrency=1, num_requests=3)
        assert result.num_events == 3
    assert mock.process is not None and mock.process.poll() is not None
