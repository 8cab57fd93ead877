import sys
from types import ModuleType, SimpleNamespace

import pytest

from baton.step_time import Scales, gpu_by_name, roofline, shape_by_name
from baton.step_time.aiconfigurator import NotInstalled, observations
from baton.step_time.fit import fit_scales, mean_absolute_error, residuals


def install(monkeypatch: pytest.MonkeyPatch, compile_engine) -> None:
    for name in ("aiconfigurator_core", "aiconfigurator_core.sdk"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    engine = ModuleType("aiconfigurator_core.sdk.engine")
    engine.EngineHandle = SimpleNamespace(compile=compile_engine)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk.engine", engine)


def test_a_table_becomes_observed_steps_in_seconds(monkeypatch: pytest.MonkeyPatch):
    handle = SimpleNamespace(
        predict_prefill_latency=lambda batch, tokens: batch * tokens / 10,
        decode_step_latency=lambda batch, prompt, output: batch + prompt / 1000,
    )
    install(monkeypatch, lambda model, system, backend, tp_size: handle)
    found = observations("Qwen/Qwen3-8B", "h100_sxm", 2)
    assert found[0].work.num_prefill_tokens == 128
    assert found[0].seconds == pytest.approx(0.0128)
    assert all(item.tensor_parallel_size == 2 for item in found)
    last = found[-1]
    assert (last.work.num_decodes, last.work.num_context_tokens) == (256, 256 * 8_192)
    assert last.seconds == pytest.approx((256 + 8.191) / 1e3)


def test_its_absence_and_its_refusals_are_sentences(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: object, **_options: object) -> None:
        raise RuntimeError("no table\nfor this")

    install(monkeypatch, refuse)
    with pytest.raises(ValueError, match="has no X/Y on h100_sxm with TP 1: no table$"):
        observations("X/Y", "h100_sxm")
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk.engine", None)
    with pytest.raises(NotInstalled, match="cannot be asked"):
        observations("X/Y", "h100_sxm")


@pytest.mark.parametrize("system", ["h100_sxm", "h200_sxm", "a100_sxm", "l40s"])
def test_the_installed_aiconfigurator_agrees_with_the_shipped_constants(system: str):
    """Qwen3-32B: the model that the constants were not chosen on."""
    pytest.importorskip("aiconfigurator_core", reason="aiconfigurator 0.12 is not installed")
    spec, shape = gpu_by_name(system), shape_by_name("Qwen3-32B")
    for size in (2, 4):
        steps = observations("Qwen/Qwen3-32B", system, size)
        shipped = roofline(spec, shape, size)
        assert mean_absolute_error(residuals(shipped, steps)) <= 0.10
        scales = fit_scales(steps, lambda tp, scales: roofline(spec, shape, tp, scales=scales))
        fitted = roofline(spec, shape, size, scales=scales)
        assert scales != Scales()
        assert mean_absolute_error(residuals(fitted, steps)) <= 0.05
