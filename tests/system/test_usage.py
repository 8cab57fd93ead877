"""users' pain 14: what was computed and sent is on record, however requests end."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.system.cases import random_prompt
from tests.system.fleet import Fleet

NUM_REQUESTS = 80
WORKER = ("--max-model-len", "2048", "--num-blocks", "4096", "--simulated-step-s", "0.003")


def test_usage_records_add_up_to_what_the_workers_computed(tmp_path: Any) -> None:
    """
    1. eighty streams; half of their clients leave after some tokens, or before the first one
    2. each has one record; what a client read to the end is what its record says, what one left is at least
       what it had read
    3. tokens on record, and those that arrived for nobody, are all that the workers say they sent
    """
    fleet = Fleet(tmp_path, engine="simulated")
    fleet.start_coordinator("--no-join-test")
    fleet.start_worker("prefill", "prefill-1", *WORKER, "--simulated-prefill-tokens-per-s", "20000")
    fleet.start_worker("decode", "decode-1", *WORKER, "--max-batch-size", "16")

    def one(number: int) -> tuple[str, int, bool]:
        """(request id, events read, whether to the end)"""
        rng = random.Random(number)
        body = {"prompt": random_prompt(rng.randrange(10, 300), number), "max_tokens": rng.randrange(1, 60)}
        body |= {"ignore_eos": True} | ({"seed": 1, "temperature": 1.0} if number % 5 == 0 else {})
        stream = fleet.stream("/v1/completions", body)
        num_read, will_leave_after = 0, rng.randrange(0, 40) if number % 2 else 1_000
        try:
            for event in stream:
                num_read += bool(event["choices"][0]["text"])
                if num_read >= will_leave_after:
                    break
        finally:
            stream.close()
        return stream.headers["x-request-id"], num_read, stream.is_done

    try:
        fleet.wait_until_ready()
        with ThreadPoolExecutor(24) as clients:
            told = list(clients.map(one, range(NUM_REQUESTS)))
        fleet.wait_until_idle()
        records = {}
        for line in fleet.log("coordinator").splitlines():
            if '"event":"request finished"' in line:
                record = json.loads(line[line.index("{") :])
                assert record["request_id"] not in records
                records[record["request_id"]] = record["report"]
        assert set(records) == {request_id for request_id, _, _ in told}
        for request_id, num_read, is_whole in told:
            report = records[request_id]
            num_sent = report.get("num_output_tokens", 0)
            assert report["outcome"] == "completed" if is_whole else num_sent >= num_read
            assert not is_whole or num_sent == num_read
            assert ("phase" in report) == (report["outcome"] == "aborted")
        assert {report["outcome"] for report in records.values()} == {"completed", "aborted"}
        computed = re.findall(
            r" leg (?:finished|failed) .*num_tokens=(\d+)", fleet.log("prefill-1") + fleet.log("decode-1")
        )
        metrics = fleet.ask("GET", "/metrics").body.decode()
        discarded = re.search(r"^baton_discarded_tokens (\S+)$", metrics, re.MULTILINE)
        billed = re.search(r"^baton_output_tokens_total (\S+)$", metrics, re.MULTILINE)
        assert discarded is not None and billed is not None
        assert float(billed[1]) == sum(report.get("num_output_tokens", 0) for report in records.values())
        assert float(billed[1]) + float(discarded[1]) == sum(map(int, computed))
    finally:
        fleet.stop()
