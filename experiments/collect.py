"""What the runs of an experiment gave, and what that says about a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from runs import TRAINED, Run, told

from patchgd_jax.runs.folder import CONFIG, SUMMARY

RESAMPLES = 10_000


@dataclass(frozen=True)
class Result:
    """A run's figures; those that it does not have are None."""

    label: str
    seed: int
    columns: Mapping[str, str | int | float] = field(default_factory=dict)
    reason: str | None = None
    """Why there are no figures; None for a run that is finished."""
    accuracy: float | None = None
    """On the validation images at the end of the run; not of the best checkpoint, which those
    same images would have chosen."""
    examples: int | None = None
    """Validation images."""
    quadratic_weighted_kappa: float | None = None
    loss: float | None = None
    step_memory_mib: float | None = None
    """What the compiled training step takes of the device, by XLA."""
    peak_memory_mib: float | None = None
    """Of the process on the CPU, else of the device."""
    seconds: float | None = None
    images_per_s: float | None = None
    images: int | None = None
    """Images trained on, counting each as often as it was."""
    code: str = ""
    """The commits that trained it."""

    def told(self) -> str:
        """In a few words."""
        if self.reason is not None:
            return f"failed: {self.reason}"
        if self.accuracy is None:
            return f"{self.images_per_s:g} images/s"
        return f"accuracy {100 * self.accuracy:.1f} %, {self.seconds:.0f} s"


@dataclass(frozen=True)
class Summary:
    """What the runs of a row have in common: means over its finished runs, but for the peak."""

    label: str
    columns: Mapping[str, str | int | float]
    seeds: int
    """Finished runs."""
    reasons: tuple[str, ...]
    """Why the others failed."""
    accuracy: float | None
    low: float | None
    high: float | None
    """The 95 % interval of the accuracy; see `bootstrap_interval`."""
    quadratic_weighted_kappa: float | None
    step_memory_mib: float | None
    peak_memory_mib: float | None
    """The median: of the seeds, one may have compiled what the others found in the cache, and a
    compiler takes more memory than a small model's training."""
    seconds: float | None
    images_per_s: float | None
    images: float | None


def collect(run: Run) -> Result:
    """The figures of a run, or why it has none."""
    label, columns = run.row.label, run.row.columns
    code = " ".join(told(identity) for identity in run.origin.get("code", []))
    path = run.folder / TRAINED / SUMMARY
    if not path.exists():
        reason = run.failure.get("reason", "not run")
        return Result(label, run.seed, columns, reason=reason, code=code)
    summary = json.loads(path.read_text(encoding="utf-8"))
    last, perf = summary.get("last", {}), summary["perf"]
    return Result(
        label,
        run.seed,
        columns,
        accuracy=last.get("accuracy"),
        examples=last.get("examples"),
        quadratic_weighted_kappa=last.get("quadratic_weighted_kappa"),
        loss=last.get("loss"),
        step_memory_mib=perf.get("step_memory_mib"),
        peak_memory_mib=perf["peak_memory_mib"],
        seconds=perf.get("seconds"),
        images_per_s=perf["images_per_s"],
        images=last["step"] * _batch_size(run.folder / TRAINED) if last else None,
        code=code,
    )


def _batch_size(folder: Path) -> int:
    # The run's own file: the settings of the row may leave it to the planner.
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return int(config["batch_size"])


def summarise(results: Sequence[Result]) -> list[Summary]:
    """A summary for each label, in the order of their first results."""
    labels = list(dict.fromkeys(result.label for result in results))
    return [_summary([r for r in results if r.label == label]) for label in labels]


def _summary(results: Sequence[Result]) -> Summary:
    finished = [r for r in results if r.reason is None]
    scored = [(r.accuracy, r.examples) for r in finished if r.accuracy is not None and r.examples]
    low = high = None
    if scored:
        low, high = bootstrap_interval([a for a, _ in scored], [n for _, n in scored])

    def middle(name: str, of: Any = np.mean) -> Any:
        values = [getattr(r, name) for r in finished if getattr(r, name) is not None]
        return float(of(values)) if values else None

    return Summary(
        label=results[0].label,
        columns=results[0].columns,
        seeds=len(finished),
        reasons=tuple(dict.fromkeys(r.reason for r in results if r.reason is not None)),
        accuracy=middle("accuracy"),
        low=low,
        high=high,
        quadratic_weighted_kappa=middle("quadratic_weighted_kappa"),
        step_memory_mib=middle("step_memory_mib"),
        peak_memory_mib=middle("peak_memory_mib", np.median),
        seconds=middle("seconds"),
        images_per_s=middle("images_per_s"),
        images=middle("images"),
    )


def bootstrap_interval(
    accuracies: Sequence[float], examples: Sequence[int], *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % percentile interval of a mean accuracy, by a bootstrap in two levels.

    Each resample draws as many seeds as there are, with replacement, and for each drawn seed as
    many of its validation examples. Of n examples drawn from n with a share p of right answers, the
    right ones are binomial with n and p, so counts do, and no example is looked at. Few seeds know
    little of how much seeds differ: of three, the first level sees two thirds of the variance.

    Args:
        accuracies: of each seed.
        examples: validation examples of each seed.
        resamples: number of them.

    Returns:
        Both ends.
    """
    rng = np.random.default_rng(0)
    shares, counts = np.asarray(accuracies, np.float64), np.asarray(examples)
    seeds = rng.integers(len(shares), size=(resamples, len(shares)))
    means = (rng.binomial(counts[seeds], shares[seeds]) / counts[seeds]).mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
