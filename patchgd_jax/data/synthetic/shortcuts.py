"""How far a classifier gets that looks at one simple property of the image only.

A score means little before it is compared with these: UltraMNIST's highest digit alone already
predicts 37 % of its ten labels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable

import numpy as np

from patchgd_jax.data.synthetic.ultramnist import Plan, UltraMnist


def _largest_value(plan: Plan) -> Hashable:
    return max(d.value for d in plan.digits)


def _biggest(plan: Plan) -> Hashable:
    return max(plan.digits, key=lambda d: d.side).value


def _zeros(plan: Plan) -> Hashable:
    return sum(d.value == 0 for d in plan.digits)


def _number(plan: Plan) -> Hashable:
    return len(plan.digits)


def majority_scores(train: np.ndarray, validation: np.ndarray, classes: int) -> dict[str, float]:
    """Validation accuracy of a blind guess and of always naming the commonest class.

    Args:
        train: `int [n]`, labels.
        validation: `int [m]`, labels.
        classes: K.
    """
    commonest = np.bincount(train, minlength=classes).argmax()
    return {"chance": 1 / classes, "commonest class": float((validation == commonest).mean())}


def shortcut_scores(
    train: UltraMnist, validation: UltraMnist, examples: int = 4000
) -> dict[str, float]:
    """Validation accuracy of the best guess from each property, learned from training plans.

    Args:
        train: source of the plans that the guesses are learned from.
        validation: source of the plans they are scored on.
        examples: plans used of each, at most what there are.

    Returns:
        Accuracy by property, `chance` included.
    """

    def brightness(source: UltraMnist) -> Callable[[Plan], Hashable]:
        ink = source.pool.glyphs.mean((1, 2))
        # 20 steps a decade: fine enough to tell classes apart, coarse enough to meet again.
        return lambda plan: round(
            20 * np.log10(1 + sum(ink[d.glyph] * d.side**2 for d in plan.digits))
        )

    features: dict[str, Callable[[UltraMnist], Callable[[Plan], Hashable]]] = {
        "number of digits": lambda _: _number,
        "number of zeros": lambda _: _zeros,
        "digits and zeros": lambda _: lambda plan: (_number(plan), _zeros(plan)),
        "brightness": brightness,
    }
    if not (train.config.task == "most-frequent" and train.config.label_share == 1):
        # Where every digit shows the label, reading one of them is the task itself.
        features["largest value only"] = lambda _: _largest_value
        features["biggest digit only"] = lambda _: _biggest
    train_plans = [train.plan(i) for i in range(min(examples, len(train)))]
    val_plans = [validation.plan(i) for i in range(min(examples, len(validation)))]
    scores = {"chance": 1 / train.num_classes}
    for name, make in features.items():
        seen: dict[Hashable, Counter[int]] = defaultdict(Counter)
        of_train, of_validation = make(train), make(validation)
        for plan in train_plans:
            seen[of_train(plan)][plan.label] += 1
        guesses = {value: counts.most_common(1)[0][0] for value, counts in seen.items()}
        right = sum(guesses.get(of_validation(p), 0) == p.label for p in val_plans)
        scores[name] = right / len(val_plans)
    return scores
