import pytest

from baton.step_time import LinearStepTime, StepWork
from baton.step_time.text import parse_step_time


def test_linear_constants_by_name():
    assert parse_step_time("linear:base_s=0.004, per_prefill_token_s=2e-5,num_stages=2") == LinearStepTime(
        base_s=0.004, per_prefill_token_s=2e-5, num_stages=2
    )


def test_a_model_on_a_gpu():
    alone, four = (parse_step_time(f"llama-3-8b@h100{ranks}") for ranks in ("", "x4"))
    work = StepWork(8192, 8192 * 8192 / 2)
    assert four.step_s(work) < alone.step_s(work) < 5.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h100", "expected MODEL@GPU"),
        ("absent.json", "cannot read the profile absent.json"),
        ("llama-3-8b@h1000", "h1000"),
        ("lama@h100", "lama"),
        ("linear:base=1", "'base' is no part of a linear step time, known: base_s, num_stages"),
        ("linear:base_s=quick", "base_s is 'quick', expected a number"),
        ("linear:base_s=-1", "base_s is -1"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, says: str):
    with pytest.raises(ValueError, match=says):
        parse_step_time(text)
