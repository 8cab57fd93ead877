"""A plan becomes a running fleet: `baton plan --fleet-file`, scripts/start_fleet.sh, a request, stop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from tests.scripts.harness import Checkout, complete, free_ports


def test_a_planned_fleet_starts_unchanged_and_answers(checkout: Checkout, tmp_path: Path):
    """
    1. a plan for eight GPUs, engines simulated
    2. its file, with free ports since this machine runs other fleets: coordinator and all workers start
    3. a request is answered; stop leaves nothing
    """
    file = tmp_path / "fleet.yaml"
    planned = subprocess.run(
        [sys.executable, "-m", "baton.cli", "plan", "--model", "Llama-3.1-70B", "--gpus", "1x8:h100",
         "--workload", "lognormal:400,1,max=2000/lognormal:200,1,max=900", "--ttft", "0.4", "--tpot", "0.02",
         "--num-requests", "600", "--engine", "simulated", "--fleet-file", str(file)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    document = yaml.safe_load(file.read_text())
    ports = free_ports()
    document["coordinator"] |= {f"{name}_port": port for name, port in ports.items()}
    file.write_text(yaml.safe_dump(document))

    started = checkout.run("start_fleet.sh", str(file))
    assert started.returncode == 0, started.stderr + started.stdout
    assert "fleet ready" in started.stdout
    expected = {"coordinator"} | {
        f"{role}-{number}"
        for role, part in document["nodes"][0].items()
        for number in range(1, part["num_workers"] + 1)
    }
    assert set(checkout.records()) == expected
    assert complete(ports["http"])["usage"]["completion_tokens"] == 4
    assert checkout.run("stop_fleet.sh").returncode == 0
    assert checkout.records() == {}


def test_a_bad_file_starts_nothing(checkout: Checkout, tmp_path: Path):
    file = tmp_path / "fleet.yaml"
    file.write_text("nodes: []\n")
    for arguments, sentence in (
        ([str(file)], "nodes is missing"),
        ([str(tmp_path / "gone.yaml")], "cannot read"),
        ([], "which fleet file?"),
        ([str(file), "--node", "1"], "needs --coordinator"),
    ):
        refused = checkout.run("start_fleet.sh", *arguments)
        assert refused.returncode != 0
        assert sentence in refused.stderr
    assert checkout.records() == {}


def test_half_a_fleet_is_taken_down_again(checkout: Checkout, tmp_path: Path):
    ports = free_ports()
    file = tmp_path / "fleet.yaml"
    document = {
        "coordinator": {"tokenizer": "none"} | {f"{name}_port": port for name, port in ports.items()},
        "prefill": {"engine": "simulated"},
        "decode": {"engine": "simulated", "no_such_setting": 1},
        "nodes": [{"prefill": {"num_workers": 1}, "decode": {"num_workers": 1}}],
    }
    file.write_text(yaml.safe_dump(document))
    refused = checkout.run("start_fleet.sh", str(file))
    assert refused.returncode != 0
    assert checkout.records() == {}
