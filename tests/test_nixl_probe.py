"""The probe on the real library: doctor's answers about transfer rest on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from baton.doctor import ChildResult, check_transfer, probe_report, transport

pytestmark = pytest.mark.slow


def probe(**env: str) -> ChildResult:
    result = subprocess.run(
        [sys.executable, "-m", "baton.transfer.nixl_probe", "--mib", "8"],
        capture_output=True, text=True, timeout=120, env={**os.environ, **env},
    )  # fmt: skip
    return ChildResult(status=result.returncode, stdout=result.stdout, stderr=result.stderr)


def test_bytes_arrive_and_the_transport_is_named():
    result = probe(UCX_PROTO_INFO="y")
    assert result.status == 0, result.stderr
    report = probe_report(result.stdout)
    assert report is not None
    assert report["num_bytes"] == 8 << 20
    assert float(report["mb_per_s"]) > 0
    assert transport(result.stdout), "UCX says how it reads"
    assert check_transfer(result, 0.001).is_ok


def test_a_transport_that_cannot_work_is_a_finding_not_a_crash():
    """Shared memory alone has no way to open a connection."""
    finding = check_transfer(probe(UCX_TLS="shm,self"), 1.0)
    assert not finding.is_ok
    assert "NIXL moved nothing" in finding.sentence
    assert "UCX_TLS" in finding.remedy


def test_the_whole_doctor_runs_on_this_installation():
    result = subprocess.run(
        [sys.executable, "-m", "baton.cli", "doctor", "--json", "--transfer-mib", "8"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode in (0, 3), result.stderr
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    for check in ("python", "packages", "vllm", "torch", "engine", "transfer"):
        assert findings[check]["is_ok"], findings[check]


def test_a_transport_that_was_forced_is_named_and_a_floor_refuses_it():
    """
    1. left alone, and forced to sockets, as happens unnoticed between containers: both move all bytes
    2. the two reports name different transports, and a floor above what sockets move is a problem
    """
    chosen, forced = probe(UCX_PROTO_INFO="y"), probe(UCX_PROTO_INFO="y", UCX_TLS="tcp")
    assert transport(chosen.stdout) != transport(forced.stdout)
    assert "tcp" in str(transport(forced.stdout))
    report = probe_report(forced.stdout)
    assert report is not None
    mb_per_s = float(report["mb_per_s"])
    assert check_transfer(forced, 0.9 * mb_per_s).is_ok
    refused = check_transfer(forced, 1.1 * mb_per_s)
    assert not refused.is_ok
    assert "tcp" in refused.sentence and "below" in refused.sentence
