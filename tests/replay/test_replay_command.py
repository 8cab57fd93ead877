"""`baton replay` as it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.replay.command import main
from baton.replay.options import parser
from baton.workload import SessionWorkload, write_trace


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "sessions.jsonl"
    write_trace(SessionWorkload(num_sessions=30, session_rate_per_s=3.0).generate(seed=1), path)
    return str(path)


def test_a_table_with_a_row_per_policy(trace: str, capsys: pytest.CaptureFixture[str]):
    assert main([trace, "--fleet", "2P2D", "--policy", "lmetric,linear:0.7,round-robin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trace")
    assert [line.split()[2] for line in lines[1:]] == ["lmetric", "linear:0.7", "round-robin"]


def test_json_and_a_picture(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "out.png"
    options = ["--fleet", "2both", "--load", "0.4,0.8", "--seeds", "2", "--json", "--plot", str(picture)]
    assert main([trace, *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["load"] for row in rows] == [0.4, 0.8]
    assert all(len(row["seeds"]) == 2 and row["goodput"] > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_prompts_stay_unless_they_may_not(trace: str, capsys: pytest.CaptureFixture[str]):
    shares = []
    for options in ([], ["--no-stay"]):
        assert main([trace, "--fleet", "3P3D1both", "--speedup", "4", "--json", "--no-guard", *options]) == 0
        shares.append(json.loads(capsys.readouterr().out)["stay_ratio"])
    assert shares[0] > 0.0 and shares[1] == 0.0


def test_parameters_of_a_policy_may_hold_commas():
    assert parser().parse_args(["t", "--policy", "slo:1.0,0.02,lmetric"]).policy == [
        "slo:1.0,0.02",
        "lmetric",
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--policy", "best"], "no policy is called 'best'"),
        (["--scheduler", "luck"], "no scheduler is called 'luck'"),
        (["--gpu", "abacus"], "no GPU 'abacus' is known"),
        (["--model", "gpt-9"], "no shape 'gpt-9' is shipped"),
        (["--model", "Llama-3.1-70B"], "leaves no room for KV on 1 x"),
        (["--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--num-blocks", "0"], "num_blocks is 0, expected at least 1"),
        (["--block-size", "24"], "which is no multiple of the engine's 24 per block"),
        (["--num-blocks", "1"], "fits into"),
        (["--plot", "/nowhere/at/all.png", "--first", "5"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_one_sentence(
    trace: str, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert main([trace, "--fleet", "1P1D", *options]) in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("options", [["--fleet", "8"], ["--load", "x"], ["--load", "-1"], ["--slo", "0,1"]])
def test_what_cannot_be_read_shows_usage(trace: str, options: list[str]):
    with pytest.raises(SystemExit) as ended:
        main([trace, *options])
    assert ended.value.code == 2


def test_no_file(capsys: pytest.CaptureFixture[str]):
    assert main(["no/such/file"]) == 2
    assert "no/such/file cannot be read" in capsys.readouterr().err
