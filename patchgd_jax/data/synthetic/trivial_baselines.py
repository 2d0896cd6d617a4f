"""Trivial baselines: accuracy of classifiers of a single simple property of an image.

For comparison with a model: UltraMNIST's highest digit alone predicts 37 % of its ten labels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable

import numpy as np

from patchgd_jax.data.synthetic.ultramnist import Plan, UltraMnist

_Property = Callable[[Plan, np.ndarray], Hashable]
"""Of an image's plan, and the mean pixel values of the glyphs, `float [n]`."""


def label_baselines(train: np.ndarray, validation: np.ndarray, classes: int) -> dict[str, float]:
    """Scores a blind guess and the most frequent class: validation accuracy by name.

    Args:
        train: `int [n]`, labels.
        validation: `int [m]`, labels.
        classes: K.
    """
    commonest = np.bincount(train, minlength=classes).argmax()
    return {"chance": 1 / classes, "commonest class": float((validation == commonest).mean())}


def plan_baselines(
    train: UltraMnist, validation: UltraMnist, examples: int = 4000
) -> dict[str, float]:
    """Scores the best guess from each property, learned from training plans.

    Args:
        train: examples to learn the guesses from.
        validation: examples to score them on.
        examples: largest number of either.

    Returns:
        Validation accuracy by property, `chance` included.
    """

    def zeros(plan: Plan) -> int:
        return sum(d.value == 0 for d in plan.digits)

    def brightness(plan: Plan, ink: np.ndarray) -> int:
        # 20 steps a decade: fine enough to tell classes apart, coarse enough to meet again.
        return round(20 * np.log10(1 + sum(ink[d.glyph] * d.side**2 for d in plan.digits)))

    properties: dict[str, _Property] = {
        "number of digits": lambda plan, _: len(plan.digits),
        "number of zeros": lambda plan, _: zeros(plan),
        "digits and zeros": lambda plan, _: (len(plan.digits), zeros(plan)),
        "brightness": brightness,
    }
    if not (train.config.task == "most-frequent" and train.config.label_share == 1):
        # Where every digit shows the label, reading one of them is the task itself.
        properties |= {
            "largest value only": lambda plan, _: max(d.value for d in plan.digits),
            "biggest digit only": lambda plan, _: max(plan.digits, key=lambda d: d.side).value,
        }
    train_plans = [train.plan(i) for i in range(min(examples, len(train)))]
    val_plans = [validation.plan(i) for i in range(min(examples, len(validation)))]
    train_ink, val_ink = (source.pool.glyphs.mean((1, 2)) for source in (train, validation))
    scores = {"chance": 1 / len(train.class_names)}
    for name, of in properties.items():
        seen: dict[Hashable, Counter[int]] = defaultdict(Counter)
        for plan in train_plans:
            seen[of(plan, train_ink)][plan.label] += 1
        guesses = {value: counts.most_common(1)[0][0] for value, counts in seen.items()}
        right = sum(guesses.get(of(plan, val_ink), 0) == plan.label for plan in val_plans)
        scores[name] = right / len(val_plans)
    return scores
