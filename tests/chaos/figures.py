"""What a run is judged by. Imported, not collected."""

from __future__ import annotations

from collections import Counter

from baton.contract.lifecycle import Outcome
from baton.history.checker import counts
from baton.history.facts import Finished
from baton.history.records import End
from benchmarks.figures import Bar, Figure, Report
from benchmarks.samples import spread
from tests.chaos.scenario import Run
from tests.chaos.users import MAX_RETRIES, SDK_RETRIES

WRONG_RULES = ("token order", "golden text")
NONE = Bar("<=", 0)


def judge(name: str, run: Run, *, num_workers: int, num_kills: int | None = None) -> Report:
    """`num_kills`: so many are the bar."""
    report = Report(f"chaos-{name}")

    def add(row: str, value: float, unit: str, bar: Bar | None = None, note: str = "") -> None:
        report.figures.append(
            Figure(row=row, subject="baton", unit=unit, spread=spread([value]), bar=bar, note=note)
        )

    history, found = run.history, counts(run.violations)
    num_jobs = len(run.done)
    ends = Counter(ask.end for ask in history.asks)
    add("jobs", num_jobs, "jobs")
    add("in flight at most", run.most_in_flight, "requests")
    add("answered in the end", run.num_answered / num_jobs, "of jobs", Bar(">=", 0.99),
        f"right and whole, asked again at most {MAX_RETRIES} times")  # fmt: skip
    num_as_sdk = sum(
        done.last in (End.COMPLETED, End.LEFT) and done.num_asks <= 1 + SDK_RETRIES for done in run.done
    )
    add("answered as openai-python asks", num_as_sdk / num_jobs, "of jobs",
        note=f"asked again at most {SDK_RETRIES} times")  # fmt: skip
    num_lived, num_completed = _under_a_living_coordinator(run)
    add("completed while their coordinator lived", num_completed / max(1, num_lived),
        "of accepted requests", Bar(">=", 0.99), "without asking again")  # fmt: skip
    add("hung", ends[End.HUNG], "requests", NONE)
    add("wrong", sum(found[rule] for rule in WRONG_RULES), "requests", NONE)
    add("held after quiet time", found["nothing held"], "things", NONE, "blocks, legs, promises")
    add("violations of the history's rules", len(run.violations), "violations", NONE)
    add("workers in the end", run.num_workers_back, "workers", Bar(">=", num_workers))
    if run.quiet_after_s is not None:
        add("nothing held any more after", run.quiet_after_s, "s")
    kills = Counter(kill.name.partition("-")[0] for kill in history.kills)
    add(
        "kills",
        kills.total(),
        "kills",
        None if num_kills is None else Bar(">=", num_kills),
        note=", ".join(f"{n} of {role}" for role, n in kills.items()),
    )
    words = _words(run)
    add("requests that needed another attempt",
        sum(word.report.placement.num_attempts > 1 for word in words), "requests")  # fmt: skip
    add("streams that went on elsewhere", sum(word.report.num_resumes > 0 for word in words), "requests",
        note="from the tokens their client had")  # fmt: skip
    codes = Counter(ask.error.code for ask in history.asks if ask.error is not None)
    told = ", ".join(f"{n} {end.value}" for end, n in ends.most_common())
    report.remarks.append(f"How requests ended for their clients: {told}.")
    if codes:
        report.remarks.append(
            "Errors by code: " + ", ".join(f"{n} {code}" for code, n in codes.most_common()) + "."
        )
    broken = {rule: number for rule, number in found.items() if number}
    if broken:
        report.remarks.append(f"Broken rules: {broken}.")
    return report


def _under_a_living_coordinator(run: Run) -> tuple[int, int]:
    """(accepted requests whose coordinator lived until their end, those of them that completed). Clients that
    left are not counted."""
    outcomes = [word.report.outcome for word in _words(run) if word.report.outcome is not Outcome.ABORTED]
    return len(outcomes), outcomes.count(Outcome.COMPLETED)


def _words(run: Run) -> list[Finished]:
    """Every final word of every coordinator."""
    return [
        word
        for coordinator in run.history.coordinators
        for words in coordinator.finished.values()
        for word in words
    ]


def slope_mb_per_min(samples: list[tuple[float, int]]) -> float:
    """Least squares over (seconds, bytes)."""
    mean_s = sum(s for s, _ in samples) / len(samples)
    mean_bytes = sum(b for _, b in samples) / len(samples)
    covariance = sum((s - mean_s) * (b - mean_bytes) for s, b in samples)
    variance = sum((s - mean_s) ** 2 for s, _ in samples)
    return covariance / variance * 60 / 1e6
