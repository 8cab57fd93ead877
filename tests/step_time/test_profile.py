import json
from dataclasses import asdict

import pytest

from baton.step_time import LinearStepTime, RooflineStepTime, StepWork, prefill_pairs, shape_by_name
from baton.step_time.phased import PhasedStepTime
from baton.step_time.profile import (
    MeasuredStep,
    MeasuredTransfer,
    Profile,
    ProfileError,
    load_profile,
    save_profile,
)
from baton.step_time.profile_fit import fit_link, fit_steps

SHAPE = shape_by_name("Qwen3-0.6B")
PREFILL = LinearStepTime(base_s=4e-3, per_prefill_token_s=3e-5, per_prefill_pair_s=2e-9)
DECODE = LinearStepTime(base_s=2e-3, per_decode_s=1e-4, per_context_token_s=3e-8)


def step(work: StepWork) -> MeasuredStep:
    seconds = (DECODE if work.num_decodes else PREFILL).step_s(work)
    return MeasuredStep(**work._asdict(), seconds=seconds, repeats_s=[seconds, seconds * 1.01])


STEPS = [
    *(step(StepWork(n, prefill_pairs(n))) for n in (32, 64, 128, 256, 512, 1_024, 2_048)),
    *(step(StepWork(0, 0, b, b * c)) for b in (1, 4, 16, 64) for c in (64, 512, 2_000)),
]


def profile(**changes: object) -> Profile:
    fitted = fit_steps(STEPS, shape=SHAPE, tp=1, pp=1, gpu=None)
    values: dict = {
        "model": "Qwen/Qwen3-0.6B",
        "shape": asdict(SHAPE),
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "measured_at": "2026-11-21T06:00:00+00:00",
        "hardware": {"device": "cpu"},
        "software": {"engine": "vllm 0.32.0"},
        "settings": {},
        "kv_tokens": 10_000,
        "max_batch_size": 64,
        "max_step_tokens": 2_048,
        "leg_overhead_s": 2e-3,
        "steps": STEPS,
        "transfers": [],
        "fits": fitted.fits,
        "held_out": fitted.held_out,
        "link": None,
    }
    return Profile(**(values | changes))


def test_each_phase_is_fitted_by_itself_and_predicts_what_it_was_not_shown():
    fitted = fit_steps(STEPS, shape=SHAPE, tp=1, pp=1, gpu=None)
    assert fitted.held_out.num_steps == len(STEPS)  # every step is held out once
    assert fitted.held_out.worst_error < 1e-6
    assert fitted.fits.prefill is not None and fitted.fits.decode is not None
    assert fitted.fits.prefill.base_s == pytest.approx(4e-3)
    assert fitted.fits.decode.base_s == pytest.approx(2e-3)
    assert fitted.fits.decode.per_prefill_token_s == 0


def test_with_a_gpu_its_roofline_is_scaled():
    fitted = fit_steps(STEPS, shape=SHAPE, tp=1, pp=1, gpu="h100")
    assert fitted.fits.gpu == "h100-sxm"
    assert isinstance(profile(fits=fitted.fits).step_time(), RooflineStepTime)


def test_a_profile_comes_back_from_its_file(tmp_path):
    path = tmp_path / "profile.json"
    save_profile(profile(), path)
    loaded = load_profile(path)
    assert loaded == profile()
    model = loaded.step_time()
    assert isinstance(model, PhasedStepTime)
    for item in STEPS:
        assert model.step_s(item.work) == pytest.approx(item.seconds)
    assert model.region is not None
    assert model.region.outside(StepWork(0, 0, 80, 80)) == ["80 sequences decode together, checked up to 64"]


def test_a_mixed_step_pays_the_larger_constant_once():
    model = profile().step_time()
    prompt, decodes = StepWork(512, prefill_pairs(512)), StepWork(0, 0, 16, 16 * 500)
    mixed = StepWork(512, prefill_pairs(512), 16, 16 * 500)
    assert model.step_s(mixed) == pytest.approx(model.step_s(prompt) + model.step_s(decodes) - 2e-3)
    assert model.step_s(StepWork()) == model.cadence_s(StepWork()) == 0


def test_a_link_is_a_latency_and_a_rate():
    moved = [
        MeasuredTransfer(kv_bytes=size, seconds=3e-3 + size / 2e9, repeats_s=[])
        for size in (10**5, 10**6, 10**7)
    ]
    link = fit_link(moved)
    assert link is not None
    assert link.latency_s == pytest.approx(3e-3)
    assert link.bytes_per_s == pytest.approx(2e9)
    flat = fit_link([MeasuredTransfer(kv_bytes=size, seconds=3e-3, repeats_s=[]) for size in (10**3, 10**4)])
    assert flat is not None
    assert flat.latency_s == pytest.approx(3e-3)
    assert fit_link(moved[:1]) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "x"}, "is not a profile written by"),
        ({"version": 2}, "a profile of version 2, this is for 1"),
        ({"kv_tokens": "many"}, r"Expected `int`, got `str` - at `\$.kv_tokens`"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"steps": []}, "no prefill step was measured"),
        ({"tensor_parallel_size": 3}, "do not split by TP 3"),
        ({"fits": {}}, "neither prefill and decode nor a gpu"),
        ({"fits": {"gpu": "tpu", "scales": {}}}, "no GPU 'tpu' is known"),
        ({"fits": {"gpu": "h100", "scales": {"speed": 2.0}}}, "speed"),
        ({"link": {"bytes_per_s": 0.0, "latency_s": 0.0}}, "bytes_per_s is 0"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_sentence(tmp_path, change: dict, sentence: str):
    path = tmp_path / "profile.json"
    save_profile(profile(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ProfileError, match=sentence):
        load_profile(path)


def test_no_file_and_no_json_are_sentences(tmp_path):
    with pytest.raises(ProfileError, match="cannot read the profile"):
        load_profile(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ProfileError, match="is not JSON"):
        load_profile(tmp_path / "broken.json")


def test_too_few_steps_are_refused_with_their_number():
    with pytest.raises(ValueError, match="2 prefill steps were measured, a fit needs at least 3"):
        fit_steps([*STEPS[:2], *STEPS[7:]], shape=SHAPE, tp=1, pp=1, gpu=None)
