import json
from pathlib import Path

import pytest

from baton.launch.fleet_file import FleetFile, NodeFleet, write_fleet_file
from baton.workload import WorkloadError
from placement.__main__ import main
from placement.cluster import Split
from placement.plans import ColocatedPlan, SplitPlan
from placement.watch import read_recorded, running_plan


def log(path: Path, rate_per_s: float, *, num_requests: int = 600, num_prompt_tokens: int = 1_000) -> Path:
    lines = [
        json.dumps(
            {
                "arrival_s": 1.7e9 + index / rate_per_s,
                "num_prompt_tokens": num_prompt_tokens + index % 7,
                "num_output_tokens": 100,
                "num_cached_tokens": 0,
                "ttft_s": 0.1,
                "tpot_s": 0.01,
            }
        )
        for index in range(num_requests)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def running(path: Path, num_prefill: int = 1, num_decode: int = 1) -> Path:
    settings = {"engine": "simulated", "tensor_parallel_size": 1}
    node = {"prefill": NodeFleet(num_workers=num_prefill), "decode": NodeFleet(num_workers=num_decode)}
    fleet = FleetFile(nodes=[node], settings={"prefill": settings, "decode": settings, "coordinator": {}})
    write_fleet_file(fleet, path, heading="test")
    return path


def watch(tmp_path: Path, rate_per_s: float, *flags: str, num_prefill: int = 1, num_decode: int = 1) -> int:
    return main(
        [
            "--watch", str(log(tmp_path / "asked.jsonl", rate_per_s)),
            "--running", str(running(tmp_path / "fleet.yaml", num_prefill, num_decode)),
            "--model", "Llama-3.1-8B", "--gpus", "1x4:h100", "--ttft", "0.5", "--tpot", "0.02",
            "--num-requests", "1000", "--max-pipeline", "1", "--once", *flags,
        ]
    )  # fmt: skip


def test_a_plan_that_serves_what_comes_is_fresh(tmp_path: Path, capsys):
    assert watch(tmp_path, 30.0) == 0
    out = capsys.readouterr().out
    assert "fresh: 1P TP1 + 1D TP1 keeps the SLO with" in out
    assert "600 requests in 20 s" in out


def test_more_requests_than_it_can_serve_make_it_stale_and_name_another(tmp_path: Path, capsys):
    assert watch(tmp_path, 60.0, "--json") == 4
    advice = json.loads(capsys.readouterr().out)
    assert advice["stale"] is True
    assert advice["highest_per_s"] < advice["rate_per_s"] == pytest.approx(60.0, rel=0.01)
    assert advice["predicted_attainment"] < 0.9
    assert advice["suggested_gpus"] > 2


def test_far_fewer_requests_make_it_stale_as_well(tmp_path: Path, capsys):
    assert watch(tmp_path, 1.0, num_prefill=2, num_decode=2) == 4
    out = capsys.readouterr().out
    assert "1 GPU would do for 1.2 requests/s, it has 4" in out
    assert "would do:" in out


def test_only_the_latest_window_counts_and_the_file_before_it_is_read_too(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    log(tmp_path / "asked.jsonl.1", 10.0, num_requests=400)
    whole = log(path, 10.0, num_requests=400).read_text().replace("1700000", "1700001")  # later ones
    path.write_text(whole + '{"arrival_s": 17\n')
    found = read_recorded(path, window_s=1e6)
    assert (found.num_requests, found.num_skipped) == (800, 1)
    latest = read_recorded(path, window_s=25.0)
    assert 245 <= latest.num_requests <= 255
    assert latest.rate_per_s == pytest.approx(10.0, rel=0.02)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no requests yet"),
        ('{"arrival_s": 1.0, "num_prompt_tokens": 5, "num_output_tokens": 5}\n' * 3, "has 3 requests of"),
        ('{"arrival_s": 1.0, "num_prompt_tokens": 5, "num_output_tokens": 5}\n' * 300, "came at one moment"),
    ],
)
def test_too_little_is_said_with_its_number(tmp_path: Path, text: str, sentence: str):
    (tmp_path / "asked.jsonl").write_text(text)
    with pytest.raises(WorkloadError, match=sentence):
        read_recorded(tmp_path / "asked.jsonl", window_s=60.0)


def test_no_file_is_a_sentence(tmp_path: Path, capsys):
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_recorded(tmp_path / "none.jsonl", window_s=60.0)
    flags = ["--model", "Llama-3.1-8B", "--ttft", "1", "--once"]
    with pytest.raises(SystemExit) as exit_:
        main(["--watch", "x.jsonl", *flags])
    assert exit_.value.code == 2
    assert "--running is missing" in capsys.readouterr().err
    assert main(["--watch", "x.jsonl", "--running", str(tmp_path / "none.yaml"), *flags]) == 2


def test_the_running_plan_is_read_from_the_fleet_file():
    two = NodeFleet(num_workers=2)
    file = FleetFile(
        nodes=[{"prefill": two}, {"decode": NodeFleet(num_workers=1), "prefill": two}],
        settings={"prefill": {"tensor_parallel_size": 2}, "decode": {"pipeline_parallel_size": 2}},
    )
    assert running_plan(file) == SplitPlan(Split(2, 1), 4, Split(1, 2), 1)
    both = FleetFile(nodes=[{"both": two}], settings={"both": {"max_num_batched_tokens": 512}})
    assert running_plan(both) == ColocatedPlan(Split(1, 1), 2, 512)
    with pytest.raises(WorkloadError, match="mixes workers"):
        running_plan(FleetFile(nodes=[{"both": two, "decode": two}], settings={}))
