"""Step times that others published, as the benchmarks and tests compare them with ours."""

from __future__ import annotations

from typing import NamedTuple

from baton.step_time import StepWork, prefill_pairs


class Published(NamedTuple):
    tensor_parallel_size: int
    work: StepWork
    seconds: float

    @property
    def is_prefill(self) -> bool:
        return self.work.num_prefill_tokens > 0

    def __str__(self) -> str:
        what = (
            f"prefill {self.work.num_prefill_tokens}"
            if self.is_prefill
            else f"decode {self.work.num_decodes}"
        )
        return f"{what} TP{self.tensor_parallel_size}"


def _prefill(num_tokens: int, *milliseconds: float) -> list[Published]:
    work = StepWork(num_prefill_tokens=num_tokens, num_prefill_pairs=prefill_pairs(num_tokens))
    return [Published(1 << index, work, ms / 1e3) for index, ms in enumerate(milliseconds)]


DECODE_CONTEXT_TOKENS = 3_150
"""The middle of 300 tokens generated after a prompt of 3,000."""


def _decode(tensor_parallel_size: int, *milliseconds: float) -> list[Published]:
    batches = (1, 16, 64, 128)
    return [
        Published(
            tensor_parallel_size,
            StepWork(num_decodes=batch, num_context_tokens=batch * DECODE_CONTEXT_TOKENS),
            ms / 1e3,
        )
        for batch, ms in zip(batches, milliseconds, strict=True)
    ]


H100_QWEN3_32B: list[Published] = [
    # aiconfigurator 0.12.0, h100_sxm, vllm tables, bf16: one prompt on TP 1, 2, 4, 8.
    *_prefill(3_000, 272.3, 164.5, 100.6, 64.8),
    *_prefill(512, 50.9, 30.1, 21.9, 16.7),
    *_prefill(16_000, 1877, 1020, 578, 356),
    # Batches of 1, 16, 64, 128.
    *_decode(1, 24.5, 31.3, 44.3, 62.6),
    *_decode(2, 13.5, 17.1, 24.4, 33.2),
    *_decode(4, 8.3, 9.9, 14.2, 18.8),
    *_decode(8, 5.8, 6.5, 9.4, 12.2),
]
