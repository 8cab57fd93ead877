"""Every role of a fleet is killed while hundreds ask. The full size is `scripts/chaos.sh`."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.history import End, RunWriter
from tests.chaos.figures import judge
from tests.chaos.fleets import SIMULATED_LIMITS, start_simulated
from tests.chaos.jobs import simulated_jobs
from tests.chaos.scenario import Load, run
from tests.chaos.supervisor import kills_of

NUM_USERS = 200


@pytest.mark.timeout(240)
def test_each_role_is_killed_while_hundreds_ask(tmp_path: Path):
    """
    1. 200 users of a simulated 2P2D fleet ask all the time; one in twenty hangs up on the way
    2. a prefill worker, a decode worker and the coordinator are killed, 4 s apart, and started again
    3. afterwards no rule of the history is broken: nothing hung, no wrong token, no block held
    4. all workers are back, and every job was answered in the end; what a living coordinator had accepted
       was answered without asking again, some of it by going on elsewhere
    """
    load = Load(
        num_users=NUM_USERS,
        load_s=16.0,
        ramp_s=1.0,
        disturbances=kills_of(["prefill-1", "decode-1", "coordinator"], every_s=4.0),
    )
    with RunWriter(tmp_path) as writer:
        supervised = start_simulated(tmp_path, writer, step_s=0.05)
        found = run(supervised, writer, SIMULATED_LIMITS, load, simulated_jobs((8, 32), share_leaving=0.05))
    assert found.violations == [], found.told(tmp_path)
    assert found.num_workers_back == 4
    assert len(found.history.kills) == 3
    assert found.most_in_flight == NUM_USERS
    assert len(found.done) > NUM_USERS
    assert {done.last for done in found.done} <= {End.COMPLETED, End.LEFT}
    report = {figure.row: figure for figure in judge("test", found, num_workers=4).figures}
    assert report["completed while their coordinator lived"].spread.median == 1.0
    assert report["streams that went on elsewhere"].spread.median > 0
