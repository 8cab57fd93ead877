"""`baton plan`: questions that make sense, questions that do not, and the fleet file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from baton.launch.fleet_file import FleetFileError, read_fleet_file
from baton.step_time import StepWork, shape_by_name
from baton.step_time.profile import Fits, HeldOut, LinearFit, MeasuredStep, Profile, save_profile
from placement.__main__ import main

LENGTHS = "lognormal:600,1,max=4000/lognormal:100,1,max=800"
COMMON = ["--model", "Llama-3.1-8B", "--workload", LENGTHS, "--num-requests", "1500"]
FEASIBLE = [*COMMON, "--gpus", "1x2:h100", "--ttft", "0.4", "--tpot", "0.03"]


def plan(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(list(arguments))
    except SystemExit as stopped:  # usage errors leave through the settings
        code = int(stopped.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_has_all_parts(capsys):
    code, out, _ = plan(capsys, *FEASIBLE)
    assert code == 0
    for part in (
        "split (joint), best first",
        "colocated, best first",
        "verdict",
        "choose",
        "limited by",
        "+20 %",
    ):
        assert part in out, part


def test_json_says_the_same(capsys):
    code, out, _ = plan(capsys, *FEASIBLE, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["best"]["goodput_per_gpu"] > 0
    low, high = found["best"]["interval_per_gpu"]
    assert low <= found["best"]["goodput_per_gpu"] <= high
    assert {w["change"] for w in found["what_ifs"]} == {"-20 %", "as planned", "+20 %"}
    assert found["binding"]["sentence"]


def test_a_plan_keeps_the_slo_at_the_rate_it_is_shown_with(capsys):
    """Its goodput is a mean over draws, and with decode memory full a draw falls off within 2 per cent."""
    options = ("--model", "Llama-3.1-70B", "--gpus", "2x8:h100", "--ttft", "0.6", "--tpot", "0.03")
    workload = ("--workload", "lognormal:755,1.1,max=4000/lognormal:200,1.1,max=1500")
    code, out, _ = plan(capsys, *options, *workload, "--json")
    shown = {w["change"]: w for w in json.loads(out)["what_ifs"]}
    assert code == 0
    assert shown["as planned"]["attainment"] >= 0.9 > shown["+20 %"]["attainment"]


def test_the_same_question_has_the_same_answer(capsys):
    def answer() -> dict:
        found = json.loads(plan(capsys, *FEASIBLE, "--json")[1])
        return {key: value for key, value in found.items() if not key.startswith("search_")}

    assert answer() == answer()


@pytest.mark.parametrize("mode", ["high-affinity", "low-affinity"])
def test_the_papers_modes_have_the_baseline_beside_them(capsys, mode):
    code, out, _ = plan(capsys, *FEASIBLE, "--mode", mode)
    assert code == 0
    assert f"split ({mode})" in out and "colocated, best first" in out


def test_published_constants(capsys):
    code, out, _ = plan(
        capsys, "--model", "OPT-13B", "--gpus", "1x4:a100", "--step-times", "distserve", "--ttft", "0.25",
        "--tpot", "0.1", "--workload", "lognormal:600,1,max=1500/lognormal:150,1,max=500",
        "--num-requests", "1500",
    )  # fmt: skip
    assert code == 0 and "DistServe's constants" in out


def test_a_plot_is_written(capsys, tmp_path: Path):
    path = tmp_path / "curves.png"
    assert plan(capsys, *FEASIBLE, "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_measured_profiles_are_a_source_for_the_splits_they_have(capsys, tmp_path: Path):
    path = tmp_path / "profile.json"
    save_profile(measured_profile(), path)
    arguments = [*FEASIBLE, "--model", "Qwen3-0.6B", "--ttft", "0.2", "--step-times", str(path)]
    code, out, err = plan(capsys, *arguments)
    assert code == 0, err
    assert "Qwen3-0.6B, measured for TP1" in out and "TP2" not in out
    code, _, err = plan(capsys, *FEASIBLE, "--step-times", str(tmp_path / "gone.json"))
    assert code == 2 and "gone.json" in err
    code, _, err = plan(capsys, *FEASIBLE, "--step-times", f"{path},{path}")
    assert code == 2 and "only 1 different splits" in err


def measured_profile() -> Profile:
    works = (StepWork(512, 131_328.0), StepWork(num_decodes=4, num_context_tokens=2000))
    return Profile(
        model="Qwen3-0.6B", shape=asdict(shape_by_name("Qwen3-0.6B")), tensor_parallel_size=1,
        pipeline_parallel_size=1, measured_at="2026-11-21T06:00:00+00:00", hardware={}, software={},
        settings={}, kv_tokens=50_000, max_batch_size=64, max_step_tokens=2048, leg_overhead_s=0.0,
        steps=[MeasuredStep(**work._asdict(), seconds=0.02, repeats_s=[0.02]) for work in works],
        transfers=[],
        fits=Fits(
            prefill=LinearFit(base_s=0.004, per_prefill_token_s=3e-5),
            decode=LinearFit(base_s=0.003, per_decode_s=1e-4, per_context_token_s=3e-8),
        ),
        held_out=HeldOut(mean_error=0.02, worst_error=0.05, num_steps=1), link=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(["--gpus", "1x8:b9000"], "no GPU 'b9000' is known", id="unknown GPU"),
        pytest.param(["--gpus", "eight"], "expected NODESxGPUS:NAME", id="no cluster"),
        pytest.param(["--gpus", "0x8:h100"], "both start at 1", id="no nodes"),
        pytest.param(["--gpus", "gone.yaml"], "cannot read gone.yaml", id="no file"),
        pytest.param(["--model", "GPT-9"], "no shape 'GPT-9' is shipped", id="unknown model"),
        pytest.param(["--model", "Llama-3.1-70B", "--gpus", "1x1:h100"], "no split fits", id="too large"),
        pytest.param(["--rate", "0"], "--rate is 0 requests/s", id="zero rate"),
        pytest.param(["--ttft", "-1"], "--ttft is -1 s, expected more than 0", id="negative SLO"),
        pytest.param(["--attainment", "1.5"], "--attainment is 1.5", id="attainment"),
        pytest.param(["--workload", "gone.csv"], "neither a file nor lengths", id="no trace"),
        pytest.param(["--workload", "lognormal:1/fixed:2"], "lognormal", id="bad lengths"),
        pytest.param(["--burstiness", "-2"], "--burstiness is -2", id="burstiness"),
        pytest.param(["--prefix-hits", "1"], "--prefix-hits is 1", id="hits"),
        pytest.param(["--budget", "0"], "--budget is 0", id="budget"),
        pytest.param(["--step-times", "distserve"], "DistServe's constants cover", id="no constants"),
        pytest.param(["--plot", "curve.exe"], "expected a name ending in", id="plot"),
        pytest.param(["--tensor-parallel-sizes", "a"], "expected numbers", id="TP"),
        pytest.param(["--plot", "/nowhere/at/all.png"], "cannot write", id="unwritable"),
    ],
)  # fmt: skip
def test_bad_questions_get_a_sentence(capsys, arguments, sentence):
    code, _, err = plan(capsys, *FEASIBLE, *arguments)
    assert code == 2
    assert sentence in err and "Traceback" not in err


def test_traces_that_cannot_be_used(capsys, tmp_path: Path):
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    broken = tmp_path / "broken.csv"
    broken.write_text("input_length,output_length\n10,x\n")
    zero = tmp_path / "histogram.csv"
    zero.write_text("num_prompt_tokens,num_output_tokens,count\n100,10,0\n")
    for path, sentence in ((empty, "is empty"), (broken, "line 2"), (zero, "no rows with a count")):
        code, _, err = plan(capsys, *FEASIBLE, "--workload", str(path))
        assert code == 2 and sentence in err, err


def test_a_histogram_and_a_trace_are_workloads(capsys, tmp_path: Path):
    histogram = tmp_path / "histogram.csv"
    histogram.write_text("num_prompt_tokens,num_output_tokens,count\n200,50,10\n2000,100,1\n")
    code, out, _ = plan(capsys, *FEASIBLE, "--workload", str(histogram))
    assert code == 0 and "prompts of 364 tokens on average" in out  # (200*10 + 2000) / 11
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 100 * n, "input_length": 1024, "output_length": 20, "hash_ids": [n % 3, 100 + n]}
        for n in range(300)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = plan(capsys, *FEASIBLE, "--workload", str(trace))
    assert code == 0
    assert "50% of prompt tokens cached" in out  # the first of two blocks, but for its first three uses
    assert "300 requests only" in out


def test_nobody_keeps_it_is_an_answer_with_its_own_exit_code(capsys):
    code, out, _ = plan(capsys, *COMMON, "--gpus", "1x2:h100", "--ttft", "0.001", "--tpot", "0.03")
    assert code == 3
    assert "no placement keeps the SLO" in out and "nearest SLO" in out
    code, out, _ = plan(capsys, *FEASIBLE, "--rate", "5000", "--json")
    assert code == 3
    assert json.loads(out)["most_requests_per_s"] > 10


def test_the_fleet_file_names_the_gpus_of_each_worker(capsys, tmp_path: Path):
    path = tmp_path / "fleet.yaml"
    code, _, _ = plan(
        capsys, *COMMON, "--model", "Llama-3.1-70B", "--gpus", "2x8:h100", "--ttft", "0.6", "--tpot", "0.03",
        "--fleet-file", str(path),
    )  # fmt: skip
    assert code == 0
    fleet = read_fleet_file(path)
    used = 0
    for node in fleet.nodes:
        groups = [group for part in node.values() for group in (part.devices or "").split(";")]
        gpus = [gpu for group in groups for gpu in group.split(",")]
        assert len(gpus) == len(set(gpus)) <= 8
        used += len(gpus)
    assert used == fleet.plan["num_gpus"]
    assert all(fleet.settings[role]["device"] == "cuda" for node in fleet.nodes for role in node)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param({"nodes": None}, "nodes is missing", id="no nodes"),
        pytest.param({"nodes": [{"prefill": {"num_workers": 1}}]}, "0 decode workers", id="half a fleet"),
        pytest.param({"nodes": [{"prefill": {"num_workers": 0}}]}, "num_workers is 0", id="zero"),
        pytest.param({"nodes": [{"router": {}}]}, "unknown role 'router'", id="role"),
        pytest.param({"fleet": {}}, "unknown key 'fleet'", id="key"),
        pytest.param({"prefill": {"device": "cuda"}}, "devices is missing", id="no devices"),
        pytest.param({"decode": {"worker_id": "x"}}, "sets worker_id", id="worker id"),
    ],
)
def test_a_fleet_file_is_checked_before_anything_starts(tmp_path: Path, change, sentence):
    document = {
        "prefill": {"engine": "simulated"}, "decode": {"engine": "simulated"},
        "nodes": [{"prefill": {"num_workers": 2}, "decode": {"num_workers": 1}}],
    }  # fmt: skip
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(document))
    assert read_fleet_file(path).num_workers("prefill") == 2
    path.write_text(yaml.safe_dump(document | change))
    with pytest.raises(FleetFileError, match=sentence):
        read_fleet_file(path)
