"""A file of lines at its limit, with a file system that says no."""

import os

from coordinator.bounded_file import BoundedFile


def test_at_its_limit_it_becomes_its_own_predecessor(tmp_path):
    path = tmp_path / "log"
    log = BoundedFile(path, what="log", max_bytes=10)
    for line in (b"first\n", b"second\n", b"third\n"):
        log.write(line)
    log.close()
    assert path.read_bytes() == b"third\n"
    assert (tmp_path / "log.1").read_bytes() == b"second\n"


def test_a_new_file_that_cannot_be_opened_costs_lines_and_nobody_elses_file(tmp_path, monkeypatch, caplog):
    """
    1. the limit is reached, and the process has no file descriptor left: one warning
    2. something else is opened, a client's socket say; it stays open and untouched
    3. as soon as there are descriptors again, lines are written again
    """
    path = tmp_path / "log"
    log = BoundedFile(path, what="log", max_bytes=10)
    log.write(b"first\n")
    with monkeypatch.context() as patch:

        def none_left(*arguments):
            raise OSError(24, "Too many open files")

        patch.setattr(os, "open", none_left)
        log.write(b"second\n")
    other = tmp_path / "other"
    with other.open("wb", buffering=0) as file:
        log.write(b"third\n")
        log.write(b"fourth\n")
        log.close()
        file.write(b"mine")
    assert other.read_bytes() == b"mine"
    assert path.read_bytes() == b"fourth\n"
    assert (tmp_path / "log.1").read_bytes() == b"third\n"
    assert caplog.text.count("Too many open files") == 1


def test_a_file_that_was_taken_away_is_made_again(tmp_path):
    path = tmp_path / "log"
    log = BoundedFile(path, what="log", max_bytes=10)
    log.write(b"first\n")
    path.unlink()
    log.write(b"second\n")
    log.close()
    assert path.read_bytes() == b"second\n"
