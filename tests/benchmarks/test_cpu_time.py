"""CPU accounting from /proc: what is read, and whose it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cpu_time import (
    TICKS_PER_S,
    MachineTimes,
    ProcessTimes,
    busy_cores,
    parse_stat,
    snapshot,
    tree_seconds,
)

STAT_TAIL = "S {parent} 1 1 0 -1 4194560 100 0 0 0 {utime} {stime} {cutime} {cstime} 20 0 3 0 1000 1 1"


def stat_line(pid: int, name: str, parent: int, utime: int, stime: int, cutime: int, cstime: int) -> str:
    tail = STAT_TAIL.format(parent=parent, utime=utime, stime=stime, cutime=cutime, cstime=cstime)
    return f"{pid} ({name}) {tail}\n"


@pytest.mark.parametrize("name", ["python", "tokio runtime", "odd) (name", "((", ") S 1"])
def test_a_command_name_may_hold_anything(name: str):
    line = stat_line(7, name, parent=3, utime=10, stime=20, cutime=4, cstime=1)
    assert parse_stat(line) == ProcessTimes(pid=7, parent=3, ticks=35)  # 10 + 20 + 4 + 1


def test_a_tree_is_the_roots_and_all_their_descendants():
    """
    1. a router (10) has a child (11) that has a child (12); 20 is another router, 30 nobody's
    2. asking for 10 counts 10, 11 and 12; asking for 10 and its own child counts nothing twice
    """
    processes = {
        times.pid: times
        for times in (
            ProcessTimes(10, 1, 100),
            ProcessTimes(11, 10, 20),
            ProcessTimes(12, 11, 3),
            ProcessTimes(20, 1, 5000),
            ProcessTimes(30, 1, 9000),
        )
    }
    assert tree_seconds([10], processes) == pytest.approx(123 / TICKS_PER_S)
    assert tree_seconds([10, 11], processes) == pytest.approx(123 / TICKS_PER_S)
    assert tree_seconds([10, 20], processes) == pytest.approx(5123 / TICKS_PER_S)
    assert tree_seconds([99], processes) == 0.0


def test_a_snapshot_reads_processes_and_skips_the_rest(tmp_path: Path):
    for pid, parent in ((10, 1), (11, 10)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(stat_line(pid, "x", parent, 1, 2, 0, 0))
    (tmp_path / "12").mkdir()  # ended between listing and reading
    (tmp_path / "self").mkdir()
    assert sorted(snapshot(tmp_path)) == [10, 11]
    assert tree_seconds([10], snapshot(tmp_path)) == pytest.approx(6 / TICKS_PER_S)


def test_waiting_for_the_disk_is_not_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """cpu: user nice system idle iowait irq softirq steal guest guest_nice; guest is in user."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    (tmp_path / "stat").write_text("cpu  100 0 50 1000 30 0 5 15 40 0\ncpu0 1 1 1 1\n")
    before = MachineTimes.read(tmp_path)
    assert before == MachineTimes(busy=170, total=1200)  # 100 + 50 + 5 + 15; + 1000 + 30
    (tmp_path / "stat").write_text("cpu  150 0 50 1130 50 0 5 15 90 0\n")
    after = MachineTimes.read(tmp_path)
    assert busy_cores(before, after) == pytest.approx(0.5)  # 2 cores * 50 of 200 ticks
    assert busy_cores(after, after) == 0.0
