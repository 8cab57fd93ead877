"""One request's story over all processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.history import BrokenRun, Kill, Pause, RunWriter, story
from baton.history.story_command import main
from tests.history.recorded import START_S, Log, ask, decode_log, write_run


def test_a_story_has_every_process_in_the_order_of_time(tmp_path: Path):
    told = story(write_run(tmp_path), "r1").splitlines()
    assert told[0].startswith("request r1, 1 attempt, 0.503 s from ")
    assert [line.split()[1] for line in told[1:]] == [
        "client", "coordinator-0", "coordinator-0", "prefill-1-0", "prefill-1-0", "client",
        "decode-1-0", "decode-1-0", "coordinator-0", "client", "decode-1-0", "coordinator-0", "client",
        "client",
    ]  # fmt: skip
    # The warning names the hand-off only; the story knows whose it is.
    assert "kv not received handoff_id=h1" in told[8]


def test_what_a_process_says_within_a_millisecond_stays_in_its_order(tmp_path: Path):
    log = (
        Log("coordinator")
        .say(0.0, "coordinator ready boot_id=abc pid=1")
        .say(5.0, "request accepted request_id=r1 num_prompt_tokens=7 max_tokens=5")
        .say(5.0, "attempt started request_id=r1 handoff_id=h1 prefill_worker=prefill-1")
    )
    told = story(write_run(tmp_path, logs={"coordinator-0": log}), "r1")
    assert told.index("request accepted") < told.index("attempt started")


def test_what_happened_to_its_workers_meanwhile_belongs_to_it(tmp_path: Path):
    """
    1. its decode worker is killed and starts again while it runs: told
    2. the same happens to a worker that had no part in it: not told
    """
    kills = [Kill(at_s=START_S + 5.3, name=name) for name in ("decode-1", "decode-2")]
    again = Log("decode").say(5.4, "worker starting worker_id=decode-1 boot_id=b9 pid=8")
    other = Log("decode").say(5.4, "worker starting worker_id=decode-2 boot_id=b8 pid=7")
    run = write_run(tmp_path, kills=kills, logs={"decode-1-1": again, "decode-2-0": other})
    told = story(run, "r1")
    assert "kills decode-1" in told and "boot_id=b9" in told
    assert "decode-2" not in told


def test_a_worker_that_stood_still_is_told(tmp_path: Path):
    run = write_run(tmp_path)
    with RunWriter(run) as writer:
        writer.note(Pause(at_s=START_S + 5.2, name="decode-1", until_s=START_S + 5.4))
    told = story(run, "r1")
    assert told.index("stops decode-1") < told.index("lets decode-1 go on")


def test_another_requests_lines_are_not_told(tmp_path: Path):
    log = decode_log().say(5.3, "leg started handoff_id=h12 request_id=r12 num_prompt_tokens=3")
    told = story(write_run(tmp_path, [ask(), ask("r12")], logs={"decode-1-0": log}), "r1")
    assert "r12" not in told


def test_a_story_needs_no_clients_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path)
    (run / "requests.jsonl").unlink()
    assert main(["r1", "--run", str(run)]) == 0
    told = capsys.readouterr().out
    assert "request accepted" in told and "client" not in told


def test_an_unknown_request_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path)
    with pytest.raises(BrokenRun):
        story(run, "r7")
    assert main(["r7", "--run", str(run)]) == 1
    assert "knows request r7" in capsys.readouterr().err
