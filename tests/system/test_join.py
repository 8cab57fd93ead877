"""A worker that would answer 200 with other text is refused when it joins, before it has had a request."""

from __future__ import annotations

import json
import re
from pathlib import Path

from baton.launch import processes
from tests.system.cases import random_prompt
from tests.system.conftest import REAL_WORKER
from tests.system.fleet import Fleet, wait_for

TEST_WITHIN_S = 2.0


def test_a_worker_with_a_wrong_setting_is_refused(real_fleet: Fleet, model: Path) -> None:
    """
    vllm#52617, sglang#17212: the receiver reports a full hit and the text differs; settings differ.
    1. the first two workers were compared when they joined, in less than two seconds
    2. another one reads the same model folder with one number of its config changed, which no layout
       shows: it is told what differs, and exits 1
    3. it has had no request, and the two others go on serving the same answers
    """
    fleet = real_fleet
    log = fleet.log("coordinator")
    passed, *_ = re.findall(r"join test passed prefill=prefill-1 decode=decode-1 took_s=(\S+)", log)
    assert float(passed) < TEST_WITHIN_S
    before = fleet.complete(random_prompt(70), max_tokens=8, temperature=0).json["choices"]
    config = model / "config.json"
    right = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(right) | {"rope_theta": 10_000.0}))
        worker = fleet.start_worker("decode", "decode-2", *REAL_WORKER)
        while not processes.wait_for_exit([worker], 0.2):
            answer = fleet.complete(random_prompt(70), max_tokens=8, temperature=0)
            assert answer.headers["x-baton-decode-worker"] == "decode-1"
            assert answer.json["choices"] == before
    finally:
        config.write_text(right)
    fleet.ended.append(fleet.members.pop("decode-2"))
    assert worker.exit_status() == 1
    assert "worker decode-2 cannot join: a prompt computed by prefill-1 and continued by decode-2" in (
        worker.log_text()
    )
    wait_for("its leaving", lambda: set(fleet.workers()) == {"prefill-1", "decode-1"}, 5.0)
    fleet.wait_until_idle()
