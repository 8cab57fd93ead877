"""Which stories a failed test tells."""

from __future__ import annotations

from pathlib import Path

from baton.contract.lifecycle import Outcome
from tests.history.recorded import coordinator_log, write_run
from tests.system.stories import stories


def test_the_requests_that_a_failure_names(tmp_path: Path):
    told = stories(write_run(tmp_path), "assert 500 == 200, {'x-request-id': 'r1', 'x-other': 'r10'}")
    assert told.startswith("request r1, ") and told.count("\nrequest ") == 0


def test_those_that_did_not_end_well_where_it_names_none(tmp_path: Path):
    """
    1. one failed: told
    2. all ended well: nothing to tell
    """
    failed = coordinator_log("r2", outcome=Outcome.FAILED)
    run = write_run(tmp_path / "failed", logs={"coordinator-1": failed})
    assert stories(run, "assert 1 == 2").startswith("request r2, ")
    assert stories(write_run(tmp_path / "well"), "assert 1 == 2") == ""
