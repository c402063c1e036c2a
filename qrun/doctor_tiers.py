"""What trying kernels on a device came to: which are right there, which are not, and why. It tries none itself."""

from collections.abc import Iterator, Sequence

from qrun.backends.base import Trial
from qrun.doctor_check import Check


def tiers(trials: Sequence[Trial]) -> Iterator[Check]:
    """A line for each kernel that was right, and one for each reason for which it was not, with the operations."""
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.tier, trial.kernel, trial.reason), []).append(trial)
    for (tier, kernel, reason), group in groups.items():
        came = reason or f"right, error up to {max(trial.error or 0.0 for trial in group):.1e}"
        yield Check(
            section="xpu tiers",
            name=tier,
            status="note" if reason else "ok",
            detail=f"{kernel}: {came}; {', '.join(dict.fromkeys(trial.op for trial in group))}",
            kernel=kernel,
        )
