"""`baton serve` with real engines: KV moves, and no engine process outlives any kind of end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.launch.processes import wait_until_empty
from tests.scripts.harness import Serve, complete, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

START_TIMEOUT_S = 400.0
"""Half a minute when the machine is idle."""


@pytest.fixture
def running(serve: Callable[..., Serve], tmp_path: Path) -> Serve:
    started = serve("--demo-model", str(tmp_path / "demo"), "--kv-cache-gib", "0.25", engine="vllm")
    return started.wait_until_ready(START_TIMEOUT_S)


def test_kv_moves_and_ctrl_c_leaves_nothing(running: Serve):
    # 4 layers x 2 (K and V) x 4 heads x 32 values x 4 bytes x 32 tokens = 131072 bytes a block
    assert "101 prompt tokens in, 8 tokens out" in running.output
    assert "KV moved: 524288 bytes in 4 blocks" in running.output
    answer = complete(running.ports["http"], model="demo", prompt="Once upon a time", max_tokens=12)
    assert answer["usage"]["completion_tokens"] == 12
    children = list(running.children().values())
    assert sum(len(child.members()) for child in children) >= 5, "engines are children of workers"
    running.signal(signal.SIGINT)
    assert running.exit_code(120) == 0
    assert wait_until_empty(children, 5.0)
    for log in (running.run_dir / "logs").iterdir():
        assert "Traceback" not in log.read_text(), f"a clean stop looks like a failure in {log.name}"


def test_engines_end_with_a_killed_worker(running: Serve):
    """
    1. the prefill worker is killed alone: its engine must not stay behind with the port and the memory
    2. serve names the worker, stops the rest and ends with 1
    """
    children = running.children()
    worker = children["prefill-1"]
    assert len(worker.members()) >= 2
    os.kill(worker.pid, signal.SIGKILL)
    assert running.exit_code(120) == 1
    assert "prefill-1 killed by 9" in running.output
    assert wait_until_empty(children.values(), 5.0)


def test_engines_end_with_a_killed_launcher(running: Serve):
    children = list(running.children().values())
    running.signal(signal.SIGKILL)
    running.process.wait()
    wait_until(lambda: not any(child.members() for child in children), "everything is gone", 30.0)
