"""The fleet scripts with simulated engines: start, grow, call, shrink, stop, and nothing left."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from baton.demo_model import build_demo_model
from baton.launch.processes import wait_until_empty
from tests.scripts.harness import REPOSITORY, Checkout, complete, free_ports, port_flags


@pytest.fixture
def coordinator(checkout: Checkout) -> dict[str, int]:
    ports = free_ports()
    started = checkout.run("start_coordinator.sh", *port_flags(ports), "--tokenizer", "none")
    assert started.returncode == 0, started.stderr
    assert f"http=http://127.0.0.1:{ports['http']}" in started.stdout
    return ports


def start_fleet(checkout: Checkout, role: str, ports: dict[str, int], *flags: str) -> str:
    address = f"127.0.0.1:{ports['fleet']}"
    started = checkout.run(
        f"start_{role}_fleet.sh", "--coordinator", address, "--engine", "simulated", *flags
    )
    assert started.returncode == 0, started.stderr
    return started.stdout


def test_a_2p2d_fleet_grows_shrinks_and_stops(checkout: Checkout, coordinator: dict[str, int]):
    """
    1. two prefill and two decode workers: each start returns when all have registered
    2. a request is answered at once, without waiting for anything
    3. a second call adds a decode worker under the next free name
    4. the decode fleet is stopped alone; the rest goes on
    5. stop without names stops what is left, by record
    """
    output = start_fleet(checkout, "prefill", coordinator, "--num-workers", "2")
    assert output.count("ready after") == 2
    start_fleet(checkout, "decode", coordinator, "--num-workers=2")
    assert complete(coordinator["http"])["usage"]["completion_tokens"] == 4
    start_fleet(checkout, "decode", coordinator)
    everything = checkout.records()
    assert set(everything) == {
        "coordinator", "prefill-1", "prefill-2", "decode-1", "decode-2", "decode-3",
    }  # fmt: skip
    assert checkout.run("stop_fleet.sh", "decode").returncode == 0
    assert set(checkout.records()) == {"coordinator", "prefill-1", "prefill-2"}
    stopped = checkout.run("stop_fleet.sh")
    assert stopped.returncode == 0, stopped.stderr
    assert "decode: nothing recorded" in stopped.stdout
    assert wait_until_empty(everything.values(), 1.0)
    assert checkout.records() == {}


def test_workers_for_both_phases_are_a_fleet(checkout: Checkout, coordinator: dict[str, int]):
    output = start_fleet(checkout, "both", coordinator, "--num-workers", "2")
    assert output.count("ready after") == 2
    assert complete(coordinator["http"])["usage"]["completion_tokens"] == 4
    assert set(checkout.records()) == {"coordinator", "both-1", "both-2"}
    assert checkout.run("stop_fleet.sh").returncode == 0
    assert checkout.records() == {}


def test_a_prompt_is_submitted_by_script(checkout: Checkout, tmp_path: Path):
    model = str(build_demo_model(tmp_path / "model"))
    ports = free_ports()
    assert checkout.run("start_coordinator.sh", *port_flags(ports), "--model", model).returncode == 0
    start_fleet(checkout, "prefill", ports, "--model", model)
    start_fleet(checkout, "decode", ports, "--model", model)
    address = f"127.0.0.1:{ports['client']}"
    submitted = checkout.run("submit.sh", "--address", address, "--max-tokens", "8", "Once upon a time")
    assert submitted.returncode == 0, submitted.stderr
    assert len(submitted.stdout.strip()) > 0
    assert checkout.run("stop_fleet.sh").returncode == 0


def test_each_worker_has_its_own_log_and_command(checkout: Checkout, coordinator: dict[str, int]):
    output = start_fleet(checkout, "prefill", coordinator, "--num-workers", "2")
    for number in (1, 2):
        assert f"--worker-id prefill-{number}-" in output
        log = checkout.root / ".run" / "prefill" / "logs" / f"prefill-{number}.log"
        assert "worker ready" in log.read_text()
    assert checkout.run("stop_fleet.sh").returncode == 0


def test_a_fleet_that_does_not_start_is_taken_back(checkout: Checkout, coordinator: dict[str, int]):
    started = checkout.run(
        "start_decode_fleet.sh", "--num-workers", "2", "--engine", "simulated", "--max-batch-size", "0",
        "--coordinator", f"127.0.0.1:{coordinator['fleet']}",
    )  # fmt: skip
    assert started.returncode == 1
    assert "max_batch_size is 0, expected at least 1" in started.stderr
    assert "what had been started was stopped" in started.stderr
    assert set(checkout.records()) == {"coordinator"}
    assert checkout.run("stop_fleet.sh").returncode == 0


def test_a_second_coordinator_is_refused(checkout: Checkout, coordinator: dict[str, int]):
    again = checkout.run("start_coordinator.sh", *port_flags(coordinator))
    assert again.returncode == 1
    assert "coordinator is running; stop it first" in again.stderr
    assert checkout.run("stop_fleet.sh").returncode == 0


def test_stopping_nothing_is_fine(checkout: Checkout):
    stopped = checkout.run("stop_fleet.sh")
    assert stopped.returncode == 0
    assert stopped.stdout.count("nothing recorded") == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--num-workers", "0"], "--num-workers is 0, expected 1 or more"),
        (["--num-workers"], "--num-workers needs a value"),
        (["--devices", "0-1"], "--devices names GPUs, and --device is cpu"),
    ],
)
def test_bad_arguments_start_nothing(checkout: Checkout, arguments: list[str], sentence: str):
    started = checkout.run("start_prefill_fleet.sh", "--engine", "simulated", *arguments)
    assert started.returncode != 0
    assert sentence in started.stderr
    assert checkout.records() == {}


def test_a_forgotten_flag_costs_no_environment(checkout: Checkout):
    """Another device makes .venv anew, gigabytes of it: only once the command line is right."""
    (checkout.root / "requirements").unlink()  # whoever wants to install something fails here
    started = checkout.run("start_prefill_fleet.sh", "--device", "cuda")
    assert (started.returncode, started.stdout) == (1, "")
    assert started.stderr.startswith("--devices is needed with --device cuda")
    assert (checkout.root / ".venv").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "scripts").glob("*.sh")))
def test_every_script_parses_and_is_strict(script: str):
    path = REPOSITORY / "scripts" / script
    assert subprocess.run(["bash", "-n", str(path)], timeout=20).returncode == 0
    text = path.read_text(encoding="utf-8")
    if text.startswith("#!"):
        assert text.startswith("#!/usr/bin/env bash\n# ")
        assert "\nset -euo pipefail\n" in text
        assert path.stat().st_mode & 0o111


def bash(expression: str) -> str:
    command = f'source "{REPOSITORY}/scripts/env.sh"; {expression}'
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


def test_the_device_comes_from_flag_file_or_default(tmp_path: Path):
    config = tmp_path / "settings.yaml"
    config.write_text("model: m\ndevice: cuda\n")
    assert bash("device_of --num-workers 2") == "cpu"
    assert bash("device_of --device cuda") == "cuda"
    assert bash("device_of --device=cuda --device cpu") == "cpu"
    assert bash(f"device_of --config {config}") == "cuda"
    assert bash(f"device_of --config {config} --device cpu") == "cpu"
