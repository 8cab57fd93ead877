import json
import logging
from pathlib import Path

import msgspec
import pytest

from baton.contract.lifecycle import Outcome, WorkerRole
from baton.contract.messages import PhaseTimes, Placement, RequestReport
from baton.workload import read_trace
from coordinator.workload_log import WorkloadLog

DONE = RequestReport(
    outcome=Outcome.COMPLETED,
    num_prompt_tokens=700,
    num_output_tokens=11,
    num_cached_tokens=256,
    phases=PhaseTimes(queue_s=0.1, prefill_s=0.3, handoff_s=0.1, decode_s=0.9),
    placement=Placement(first_token_by=WorkerRole.PREFILL),
)


def test_a_finished_request_is_a_line_that_the_trace_reader_takes(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    log = WorkloadLog(path, lambda: 1_000.0)
    log.on_finished(DONE)
    log.on_finished(RequestReport(outcome=Outcome.FAILED, num_prompt_tokens=5))
    log.close()
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {
        "arrival_s": 998.6,  # 1.4 s of phases before
        "num_prompt_tokens": 700,
        "num_output_tokens": 11,
        "num_cached_tokens": 256,
        "ttft_s": 0.4,
        "tpot_s": 0.1,  # 1 s over the ten tokens after the first
    }
    trace = read_trace(str(path))
    assert (trace.num_prompt_tokens.tolist(), trace.num_output_tokens.tolist()) == ([700], [11])


def test_a_first_token_of_the_decode_worker_comes_after_the_hand_off(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    log = WorkloadLog(path, lambda: 1_000.0)
    log.on_finished(msgspec.structs.replace(DONE, placement=Placement(first_token_by=WorkerRole.DECODE)))
    log.close()
    line = json.loads(path.read_text())
    assert (line["arrival_s"], line["ttft_s"], line["tpot_s"]) == (998.6, 0.5, 0.09)


def test_at_its_limit_it_becomes_the_file_before(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    log = WorkloadLog(path, lambda: 1_000.0, max_bytes=400)
    for _ in range(7):
        log.on_finished(DONE)
    log.close()
    assert path.stat().st_size <= 400
    assert (tmp_path / "asked.jsonl.1").stat().st_size <= 400
    assert len(path.read_text().splitlines()) > 0


def test_a_full_disk_costs_lines_and_one_warning(caplog):
    log = WorkloadLog(Path("/dev/full"), lambda: 1_000.0)
    with caplog.at_level(logging.WARNING):
        log.on_finished(DONE)
        log.on_finished(DONE)
    log.close()
    assert len([record for record in caplog.records if "workload log failed" in record.message]) == 1


def test_a_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path):
    with pytest.raises(OSError, match="No such file"):
        WorkloadLog(tmp_path / "no" / "where", lambda: 0.0)
