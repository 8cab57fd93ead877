"""Which GPUs each worker of a fleet gets.

    python -m baton.launch.devices SPEC NUM_WORKERS RANKS_PER_WORKER      one line per worker

`0-7` or `0,1,2,3` is dealt out in order, as many per worker as it has ranks; `0,1;4,5` names each
worker's own. The lines are values for CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import sys


def split_devices(spec: str, num_workers: int, ranks_per_worker: int) -> list[str]:
    """Raises ValueError with the numbers when the devices do not fit the workers."""
    if ";" in spec:
        groups = [_indices(group) for group in spec.split(";")]
        if len(groups) != num_workers:
            raise ValueError(f"devices {spec!r} names {len(groups)} workers, there are {num_workers}")
    else:
        indices = _indices(spec)
        needed = num_workers * ranks_per_worker
        if len(indices) < needed:
            raise ValueError(
                f"devices {spec!r} names {len(indices)}, {num_workers} workers of {ranks_per_worker} "
                f"ranks need {needed}"
            )
        starts = range(0, needed, ranks_per_worker)
        groups = [indices[start : start + ranks_per_worker] for start in starts]
    for group in groups:
        if len(group) != ranks_per_worker:
            named = ",".join(map(str, group))
            raise ValueError(f"devices {named!r}: {len(group)} for a worker of {ranks_per_worker} ranks")
    used = [index for group in groups for index in group]
    if len(set(used)) != len(used):
        raise ValueError(f"devices {spec!r} names a device twice")
    return [",".join(map(str, group)) for group in groups]


def _indices(text: str) -> list[int]:
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"not a list of devices like 0,1 or 0-3: {text!r}")
        indices += range(int(first), int(last if dash else first) + 1)
    return indices


def main(argv: list[str]) -> int:
    spec, num_workers, ranks_per_worker = argv
    try:
        print("\n".join(split_devices(spec, int(num_workers), int(ranks_per_worker))))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
