"""A process dies with its owner. Real processes; nobody waits longer than needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from baton.process_guard import ProcessIdentity

# The child names its grandchild and waits; the grandchild guards itself with the owner it was given.
GUARDED = """
import sys, signal
from baton.process_guard import ProcessIdentity, die_with
die_with(ProcessIdentity(pid=int(sys.argv[1]), start_ticks=int(sys.argv[2])))
print("guarded", flush=True)
signal.pause()
"""
OWNER = """
import subprocess, sys, signal
from baton.process_guard import ProcessIdentity
me = ProcessIdentity.current()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(me.pid), str(me.start_ticks)],
                         stdout=subprocess.PIPE, text=True)
assert child.stdout.readline() == "guarded\\n"
print(child.pid, flush=True)
signal.pause()
"""


def wait_until_gone(identity: ProcessIdentity, timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while identity.is_alive():
        assert time.monotonic() < deadline_s, f"process {identity.pid} is still there"
        time.sleep(0.01)


def test_identity_tells_processes_apart() -> None:
    me = ProcessIdentity.current()
    assert me.is_alive()
    assert ProcessIdentity.from_dict(me.to_dict()) == me
    assert not ProcessIdentity(pid=me.pid, start_ticks=me.start_ticks + 1).is_alive()
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    with pytest.raises(ProcessLookupError):
        ProcessIdentity.of(child.pid)


def test_killed_owner_takes_its_child_along() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, GUARDED], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert owner.stdout is not None
    with owner.stdout:
        child = ProcessIdentity.of(int(owner.stdout.readline()))
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    wait_until_gone(child)


def test_owner_that_is_gone_already() -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    identity = ProcessIdentity.of(owner.pid)
    owner.kill()
    owner.wait()
    child = subprocess.run(
        [sys.executable, "-c", GUARDED, str(identity.pid), str(identity.start_ticks)], timeout=10
    )
    assert child.returncode == -signal.SIGKILL
