from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton.launch import processes
from baton.launch.processes import RecordedProcess, main
from baton.launch.self_test import DecodeSide, SelfTestFailed, check_usage

SLEEP = "import time; print('hello', flush=True); time.sleep(600)"
WITH_GRANDCHILD = (
    "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('hello', flush=True); time.sleep(600)"
)
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('hello', flush=True); time.sleep(600)"
)

Start = Callable[[str], RecordedProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[RecordedProcess] = []

    def start_one(code: str) -> RecordedProcess:
        log = tmp_path / "logs" / f"{len(started)}.log"
        process = processes.start([sys.executable, "-c", code], log)
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
    assert processes.wait_until_empty(started, 10.0)


def say_hello(process: RecordedProcess) -> RecordedProcess:
    deadline_s = time.monotonic() + 20
    while "hello" not in process.log_text():
        assert time.monotonic() < deadline_s, process.log_tail()
        time.sleep(0.02)
    return process


def test_a_process_leads_its_own_session(start: Start):
    process = say_hello(start(SLEEP))
    assert os.getsid(process.pid) == process.pid
    assert process.members() == [process.pid]


def test_stop_ends_grandchildren_too(start: Start):
    process = say_hello(start(WITH_GRANDCHILD))
    assert len(process.members()) == 2
    assert processes.stop([process], 10.0)
    assert process.members() == []


def test_grandchildren_of_a_dead_process_are_still_found(start: Start):
    process = say_hello(start(WITH_GRANDCHILD))
    os.kill(process.pid, signal.SIGKILL)
    assert processes.wait_for_exit([process], 10.0)
    assert len(process.members()) == 1
    assert processes.stop([process], 10.0)


def test_who_ignores_sigterm_is_killed_after_the_deadline(start: Start):
    process = say_hello(start(STUBBORN))
    assert processes.stop([process], 0.3)
    assert process.exit_status() == -signal.SIGKILL


def test_a_recycled_pid_is_left_alone(start: Start):
    process = say_hello(start(SLEEP))
    identity = replace(process.identity, start_ticks=process.identity.start_ticks - 1)
    stale = replace(process, identity=identity)
    assert not stale.is_alive()
    assert processes.stop([stale], 0.1)
    assert process.is_alive()


def test_the_first_death_is_reported_with_its_status(start: Start):
    say_hello(sleeper := start(SLEEP))
    dying = start("import sys; sys.exit(3)")
    assert processes.wait_for_any_exit([sleeper, dying], 20.0) is dying
    assert dying.exit_status() == 3


LAST_THREAD_STAYS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1.0,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_the_status_of_a_process_whose_threads_are_still_ending(start: Start):
    """Its first thread is gone and so it is dead to everybody, but there is nothing to collect yet."""
    dying = start(LAST_THREAD_STAYS)
    while dying.is_alive():
        time.sleep(0.01)
    assert dying.exit_status() == 0


def test_a_wakeup_ends_the_wait(start: Start):
    process = say_hello(start(SLEEP))
    read, write = os.pipe()
    os.write(write, b"x")
    started_s = time.monotonic()
    assert processes.wait_for_any_exit([process], 60.0, read) is None
    assert time.monotonic() - started_s < 10
    os.close(read)
    os.close(write)


def test_a_record_survives_the_disk(start: Start, tmp_path: Path):
    process = start(SLEEP)
    process.save(tmp_path / "worker.pid")
    assert RecordedProcess.load(tmp_path / "worker.pid") == process
    (tmp_path / "broken.pid").write_text("12")
    with pytest.raises(ValueError, match=r"broken\.pid is not a record"):
        RecordedProcess.load(tmp_path / "broken.pid")


def test_the_command_line_starts_waits_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record, log = tmp_path / "run" / "worker.pid", tmp_path / "run" / "logs" / "worker.log"
    starting = ["start", "--record", str(record), "--log", str(log), "--", sys.executable, "-c", SLEEP]
    assert main(starting) == 0
    assert main(["wait", "--line", "hello", "--timeout-s", "20", str(record)]) == 0
    assert main(starting) == 1
    assert "worker is running; stop it first" in capsys.readouterr().err
    process = RecordedProcess.load(record)
    assert main(["stop", "--timeout-s", "10", str(record)]) == 0
    assert process.members() == []
    assert not record.exists()


def test_waiting_for_a_dead_process_fails_at_once_and_shows_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record = tmp_path / "worker.pid"
    code = "print('out of luck')"
    main(
        ["start", "--record", str(record), "--log", str(tmp_path / "w.log"), "--", sys.executable, "-c", code]
    )
    assert main(["wait", "--line", "hello", "--timeout-s", "60", str(record)]) == 1
    assert "out of luck" in capsys.readouterr().err


def test_waiting_ends_at_the_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record = tmp_path / "worker.pid"
    main(
        [
            "start",
            "--record",
            str(record),
            "--log",
            str(tmp_path / "w.log"),
            "--",
            sys.executable,
            "-c",
            SLEEP,
        ]
    )
    assert main(["wait", "--line", "goodbye", "--timeout-s", "0.3", str(record)]) == 1
    assert "worker is not ready after" in capsys.readouterr().err
    assert main(["stop", "--timeout-s", "10", str(record)]) == 0


# ── the arithmetic of the self-test ───────────────────────────────────────────────────────────


def fleet(*received: int) -> dict[str, object]:
    prefill = {"role": "prefill", "load": {"num_kv_bytes_received": 99}}
    decode = [
        {
            "role": "decode",
            "layout": {"block_size_tokens": 32},
            "capacity": {"kv_bytes_per_block": 131_072},
            "load": {"num_kv_bytes_received": num_bytes},
        }
        for num_bytes in received
    ]
    return {"workers": [prefill, *decode]}


def test_bytes_of_all_decode_workers_count_and_prefill_workers_do_not():
    assert DecodeSide.from_fleet(fleet(100, 20)) == DecodeSide(
        block_size_tokens=32, kv_bytes_per_block=131_072, num_kv_bytes_received=120
    )


def test_a_fleet_without_decode_worker_fails_the_test():
    with pytest.raises(SelfTestFailed, match="no worker that decodes"):
        DecodeSide.from_fleet(fleet())


def test_an_answer_of_other_length_fails_the_test():
    check_usage({"prompt_tokens": 101, "completion_tokens": 8}, 101)
    with pytest.raises(SelfTestFailed, match="usage says prompt_tokens 5, expected 101"):
        check_usage({"prompt_tokens": 5, "completion_tokens": 8}, 101)
