"""`baton serve` as a user has it: started, called, interrupted, and killed in every way we know."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from baton.launch.processes import wait_until_empty
from tests.scripts.harness import Serve, complete, wait_until

StartServe = Callable[..., Serve]


def nothing_is_left(serve: Serve, sessions: list) -> bool:
    return wait_until_empty(sessions, 20.0) and not list(serve.run_dir.glob("*.pid"))


def slow_request(serve: Serve) -> threading.Thread:
    """Runs for a minute unless it is stopped; returns when it is in the engine."""

    def call() -> None:
        try:
            complete(serve.ports["http"], max_tokens=600)
        except OSError:
            pass

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    log = serve.run_dir / "logs" / "decode-1.log"
    wait_until(lambda: "decode leg started" in log.read_text(), "the request is being decoded")
    return thread


def test_it_proves_that_kv_moves_and_stops_on_ctrl_c(serve: StartServe):
    """
    1. two prefill and two decode workers come up; the self-test counts the bytes
    2. the address that is printed answers
    3. Ctrl-C: exit 0, no process and no record is left
    """
    running = serve("--num-prefill", "2", "--num-decode", "2").wait_until_ready()
    assert "self-test passed: 101 prompt tokens in, 8 tokens out" in running.output
    assert f"ready: http://127.0.0.1:{running.ports['http']}" in running.output
    assert complete(running.ports["http"])["usage"]["completion_tokens"] == 4
    children = running.children()
    assert set(children) == {"coordinator", "prefill-1", "prefill-2", "decode-1", "decode-2"}
    running.signal(signal.SIGINT)
    assert running.exit_code() == 0
    assert nothing_is_left(running, list(children.values()))
    assert "stopped, nothing is left running" in running.output


def test_a_fleet_of_workers_for_both_phases_moves_no_kv(serve: StartServe):
    running = serve("--num-prefill", "0", "--num-decode", "0", "--num-both", "2").wait_until_ready()
    assert "self-test passed: 101 prompt tokens in, 8 tokens out" in running.output
    assert "one worker served both phases, so no KV moved" in running.output
    assert set(running.children()) == {"coordinator", "both-1", "both-2"}
    assert complete(running.ports["http"])["usage"]["completion_tokens"] == 4


def test_the_three_ways_to_call_are_printed(serve: StartServe):
    output = serve().wait_until_ready().output
    assert "curl http://127.0.0.1:" in output
    assert "from openai import OpenAI" in output
    assert "baton submit --address 127.0.0.1:" in output


def test_a_request_in_flight_finishes_after_ctrl_c(serve: StartServe, tmp_path: Path):
    decode = tmp_path / "decode.yaml"
    decode.write_text("simulated_step_s: 0.02\n")
    running = serve("--decode-config", str(decode)).wait_until_ready()
    answers: list[dict] = []
    thread = threading.Thread(
        target=lambda: answers.append(complete(running.ports["http"], max_tokens=100)), daemon=True
    )
    thread.start()
    log = running.run_dir / "logs" / "decode-1.log"
    num_before = log.read_text().count("decode leg started")
    wait_until(lambda: log.read_text().count("decode leg started") > num_before, "decode began")
    running.signal(signal.SIGINT)
    assert running.exit_code() == 0
    thread.join(10)
    assert answers[0]["usage"]["completion_tokens"] == 100


def test_a_second_ctrl_c_does_not_wait(serve: StartServe, tmp_path: Path):
    decode = tmp_path / "decode.yaml"
    decode.write_text("simulated_step_s: 0.1\n")
    running = serve("--decode-config", str(decode)).wait_until_ready()
    slow_request(running)
    children = list(running.children().values())
    running.signal(signal.SIGINT)
    wait_until(lambda: "stopping: " in running.output, "it drains")
    started_s = time.monotonic()
    running.signal(signal.SIGINT)
    assert running.exit_code() == 130
    assert time.monotonic() - started_s < 5
    assert wait_until_empty(children, 20.0)


def test_sigterm_while_starting_leaves_nothing(serve: StartServe):
    running = serve()
    wait_until(lambda: "starting decode-1" in running.output, "all children are started")
    running.signal(signal.SIGTERM)
    assert running.exit_code() == 0
    assert nothing_is_left(running, list(running.children().values()))


def test_a_worker_that_dies_is_named_and_ends_everything(serve: StartServe):
    running = serve().wait_until_ready()
    children = running.children()
    children["decode-1"].kill()
    assert running.exit_code() == 1
    assert "decode-1 killed by 9; the end of" in running.output
    assert "worker ready" in running.output.partition("the end of")[2]
    assert nothing_is_left(running, list(children.values()))


def test_children_die_with_a_killed_launcher(serve: StartServe):
    running = serve().wait_until_ready()
    children = list(running.children().values())
    running.signal(signal.SIGKILL)
    running.process.wait()
    assert wait_until_empty(children, 20.0)


def test_records_of_a_killed_launcher_do_not_stop_the_next(serve: StartServe):
    first = serve().wait_until_ready()
    children = list(first.children().values())
    first.signal(signal.SIGKILL)
    assert wait_until_empty(children, 20.0)
    second = serve("--run-dir", str(first.run_dir)).wait_until_ready()
    second.signal(signal.SIGINT)
    assert second.exit_code() == 0


def test_a_run_folder_in_use_is_refused(serve: StartServe):
    first = serve().wait_until_ready()
    second = serve("--run-dir", str(first.run_dir))
    assert second.exit_code() == 1
    assert "is still running" in second.output
    assert first.process.poll() is None


def test_a_taken_port_is_an_error_before_anything_starts(serve: StartServe):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        running = serve("--http-port", str(port))
        assert running.exit_code() == 1
    assert f"port {port} on 127.0.0.1 is taken" in running.output
    assert "starting" not in running.output


def test_bad_settings_are_a_usage_error(serve: StartServe):
    running = serve("--num-prefill", "0")
    assert running.exit_code() == 2
    assert "num_prefill is 0, expected at least 1" in running.output


def test_a_worker_that_refuses_its_settings_ends_the_start(serve: StartServe, tmp_path: Path):
    config = tmp_path / "prefill.yaml"
    config.write_text("block_sise_tokens: 32\n")
    running = serve("--prefill-config", str(config))
    assert running.exit_code() == 1
    assert "prefill-1 exited with 2" in running.output
    assert "unknown key 'block_sise_tokens'" in running.output
