"""Measuring, against the simulated engine, whose step times are known."""

import asyncio
import sys

import pytest

from baton.contract.messages import WorkerCapacity
from baton.engine.simulated.engine import SimulatedEngine
from baton.engine.simulated.faults import Faults
from baton.engine.simulated.settings import SimulatedEngineSettings
from baton.profiling.command import main
from baton.profiling.grid import HEADROOM_TOKENS, grid
from baton.profiling.probe import MeasuringFailed, Probe
from baton.step_time import LinearStepTime, StepWork, prefill_pairs
from baton.step_time.profile import load_profile

TRUE = LinearStepTime(base_s=0.02, per_prefill_token_s=1e-4, per_decode_s=1e-3, per_context_token_s=1e-6)
"""Slow steps: the engine's timers and a busy machine are a few ms off."""


def capacity(**changes: int) -> WorkerCapacity:
    values = {"num_blocks": 4_096, "max_batch_size": 64, "max_model_len": 4_096, "kv_bytes_per_block": 1}
    return WorkerCapacity(**(values | changes))


def test_the_grid_keeps_within_what_the_engine_holds():
    points = grid(capacity(num_blocks=300), block_size_tokens=32, max_step_tokens=2_048)
    assert max(points.prompts) == 2_048
    assert min(points.prompts) == 32
    assert all(batch <= 64 for batch, _ in points.decodes)
    assert all(batch * (context + HEADROOM_TOKENS) <= 300 * 32 for batch, context in points.decodes)
    assert {batch for batch, _ in points.decodes} >= {1, 4, 16}
    costs = [batch * context for batch, context in points.decodes]
    assert costs == sorted(costs)


def test_an_engine_too_small_to_measure_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match="takes 200 tokens a sequence and 2048 a step"):
        grid(capacity(max_model_len=200), block_size_tokens=32, max_step_tokens=2_048)


def probed(ask, **settings):
    async def run():
        probe = Probe(SimulatedEngine(SimulatedEngineSettings(step_time=TRUE), **settings))
        await probe.start()
        try:
            return await ask(probe)
        finally:
            await probe.stop()

    return asyncio.run(run())


def test_a_prompts_step_and_a_batchs_step_are_seen_as_they_are():
    prompt = probed(lambda probe: probe.prefill(probe.prompt(1_000)))
    assert prompt.step_s == pytest.approx(TRUE.step_s(StepWork(1_000, prefill_pairs(1_000))), rel=0.1)
    assert prompt.wall_s >= prompt.step_s
    batch = probed(lambda probe: probe.decode_batch(8, 500, num_steps=8, max_tokens=200))
    assert 8 * 500 < batch.num_context_tokens < 8 * 600
    true_s = TRUE.step_s(StepWork(0, 0, 8, batch.num_context_tokens))
    assert batch.seconds == pytest.approx(true_s, rel=0.25)


def test_an_engine_that_fails_ends_the_measuring_with_its_words():
    with pytest.raises(MeasuringFailed, match="fault accept:error"):
        probed(lambda probe: probe.prefill(probe.prompt(10)), faults=Faults("accept:error"))


def test_the_command_writes_a_profile_that_loads(tmp_path, capsys):
    out = tmp_path / "profile.json"
    flags = "--engine simulated --shape Qwen3-0.6B --max-model-len 1024 --max-batch-size 8 --budget-s 4"
    times = "linear:base_s=0.02,per_prefill_token_s=1e-4,per_decode_s=1e-3,per_context_token_s=1e-6"
    assert main([*flags.split(), "--simulated-step-time", times, "--out", str(out)]) == 0
    assert "not shown to the fit" in capsys.readouterr().out
    profile = load_profile(out)
    assert profile.max_batch_size == 8
    assert profile.software["engine"].startswith("simulated")
    work = StepWork(500, prefill_pairs(500))
    assert profile.step_time().step_s(work) == pytest.approx(TRUE.step_s(work), rel=0.15)
    assert profile.link is not None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--engine", "simulated", "--shape", "GPT-9"], "no shape 'GPT-9'"),
        (["--engine", "simulated", "--shape", "Qwen3-8B", "--gpu", "tpu"], "no GPU 'tpu'"),
        (
            ["--engine", "simulated", "--shape", "Qwen3-8B", "--tensor-parallel-size", "7"],
            "do not split by TP 7",
        ),
        (["--engine", "simulated", "--shape", "Qwen3-8B", "--out", "/no/where.json"], "/no does not exist"),
    ],
)
def test_bad_input_is_a_sentence_before_an_engine_starts(capsys, flags: list[str], sentence: str):
    assert main(flags) == 2
    assert sentence in capsys.readouterr().err


def test_without_aiconfigurator_its_tables_are_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk.engine", None)
    flags = ["--model", "Qwen/Qwen3-32B", "--tables", "h100_sxm", "--out", str(tmp_path / "p.json")]
    assert main(flags) == 1
    assert "aiconfigurator 0.12 cannot be asked" in capsys.readouterr().err


def test_the_installed_aiconfigurators_tables_become_a_profile(tmp_path, capsys):
    pytest.importorskip("aiconfigurator_core", reason="aiconfigurator 0.12 is not installed")
    out = tmp_path / "p.json"
    flags = ["--model", "Qwen/Qwen3-32B", "--tensor-parallel-size", "2", "--tables", "h100_sxm"]
    assert main([*flags, "--out", str(out)]) == 0
    profile = load_profile(out)
    assert profile.fits.gpu == "h100-sxm"
    assert profile.held_out.mean_error < 0.06
    assert "roofline of h100-sxm, scaled" in capsys.readouterr().out


def test_a_budget_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--engine", "simulated", "--budget-s", "0"])
    assert exit_.value.code == 2
    assert "budget_s is 0" in capsys.readouterr().err
