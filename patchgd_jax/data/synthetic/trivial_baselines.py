"""Trivial baselines: accuracy of classifiers that look at one simple property of an image only.

They put a score into perspective: UltraMNIST's highest digit alone predicts 37 % of its ten labels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable

import numpy as np

from patchgd_jax.data.synthetic.ultramnist import Plan, UltraMnist

_Property = Callable[[Plan], Hashable]


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
        train: source of the plans that the guesses are learned from.
        validation: source of the plans that they are scored on.
        examples: most plans used of each.

    Returns:
        Validation accuracy by property, `chance` included.
    """

    def brightness(source: UltraMnist) -> _Property:
        ink = source.pool.glyphs.mean((1, 2))
        # 20 steps a decade: fine enough to tell classes apart, coarse enough to meet again.
        return lambda plan: round(
            20 * np.log10(1 + sum(ink[d.glyph] * d.side**2 for d in plan.digits))
        )

    def zeros(plan: Plan) -> int:
        return sum(d.value == 0 for d in plan.digits)

    properties: dict[str, tuple[_Property, _Property]] = {
        name: (of, of)
        for name, of in {
            "number of digits": lambda plan: len(plan.digits),
            "number of zeros": zeros,
            "digits and zeros": lambda plan: (len(plan.digits), zeros(plan)),
        }.items()
    } | {"brightness": (brightness(train), brightness(validation))}
    if not (train.config.task == "most-frequent" and train.config.label_share == 1):
        # Where every digit shows the label, reading one of them is the task itself.
        for name, of in {
            "largest value only": lambda plan: max(d.value for d in plan.digits),
            "biggest digit only": lambda plan: max(plan.digits, key=lambda d: d.side).value,
        }.items():
            properties[name] = (of, of)
    train_plans = [train.plan(i) for i in range(min(examples, len(train)))]
    val_plans = [validation.plan(i) for i in range(min(examples, len(validation)))]
    scores = {"chance": 1 / len(train.class_names)}
    for name, (of_train, of_validation) in properties.items():
        seen: dict[Hashable, Counter[int]] = defaultdict(Counter)
        for plan in train_plans:
            seen[of_train(plan)][plan.label] += 1
        guesses = {value: counts.most_common(1)[0][0] for value, counts in seen.items()}
        right = sum(guesses.get(of_validation(p), 0) == p.label for p in val_plans)
        scores[name] = right / len(val_plans)
    return scores
