from __future__ import annotations

import pytest

from baton.launch.devices import main, split_devices


@pytest.mark.parametrize(
    ("spec", "num_workers", "ranks", "groups"),
    [
        pytest.param("0-7", 4, 2, ["0,1", "2,3", "4,5", "6,7"], id="a range, two ranks each"),
        pytest.param("0,1,2", 2, 1, ["0", "1"], id="more devices than needed"),
        pytest.param("0,1;4,5", 2, 2, ["0,1", "4,5"], id="worker by worker"),
        pytest.param("0-1,4-5", 2, 2, ["0,1", "4,5"], id="two ranges"),
    ],
)
def test_devices_are_dealt_out_in_order(spec: str, num_workers: int, ranks: int, groups: list[str]):
    assert split_devices(spec, num_workers, ranks) == groups


@pytest.mark.parametrize(
    ("spec", "num_workers", "ranks", "sentence"),
    [
        ("0-2", 2, 2, "names 3, 2 workers of 2 ranks need 4"),
        ("0;1", 3, 1, "names 2 workers, there are 3"),
        ("0,1;2", 2, 2, "1 for a worker of 2 ranks"),
        ("0,0", 2, 1, "names a device twice"),
        ("a", 1, 1, "not a list of devices"),
        ("0-", 1, 1, "not a list of devices"),
        ("", 1, 1, "not a list of devices"),
    ],
)
def test_devices_that_do_not_fit_are_refused(spec: str, num_workers: int, ranks: int, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        split_devices(spec, num_workers, ranks)


def test_command_line_prints_one_line_per_worker(capsys: pytest.CaptureFixture[str]):
    assert main(["0-3", "2", "2"]) == 0
    assert capsys.readouterr().out == "0,1\n2,3\n"
    assert main(["0", "2", "2"]) == 2
